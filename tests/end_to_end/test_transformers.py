"""compress() of small models of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxlrd import Budget, Pipeline, load, save
from fxlrd.capturing.model import capture_any
from fxlrd.graph.guards import shared_parameter
from fxlrd.graph.inputs import Inputs
from fxlrd.passes import Calibrate, Decompose, Merge, Refit
from tests.support.compression import FULL_RANK, assert_same_outputs, decisions, largest_error, layer_reasons, quick
from tests.support.refitted import assert_fitted
from tests.support.results import reasons

pytestmark = pytest.mark.slow


def ids(shape=(2, 9)):
    return torch.randint(0, 99, shape)


def hugging_face(name):
    """A small model with random weights, and inputs for it."""
    tf = pytest.importorskip("transformers")
    small = {
        "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    tokens = {"bos_token_id": 0, "eos_token_id": 99, "pad_token_id": 0}
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    whisper = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 100,
        "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 1,
    }  # fmt: skip
    made = {
        "bert": lambda: (
            tf.BertModel(tf.BertConfig(**small)),
            {"input_ids": ids(), "attention_mask": torch.ones(2, 9)},
        ),
        "gpt2": lambda: (
            tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=100, n_positions=64, **tokens)),
            {"input_ids": ids()},
        ),
        "llama": lambda: (
            tf.LlamaForCausalLM(tf.LlamaConfig(**small, num_key_value_heads=1, **tokens)),
            {"input_ids": ids()},
        ),
        "vit": lambda: (tf.ViTForImageClassification(tf.ViTConfig(**small, image_size=32, patch_size=8)), pixels),
        "whisper": lambda: (
            tf.WhisperModel(tf.WhisperConfig(**{**whisper, **tokens})),
            {"input_features": torch.randn(2, 8, 40, dtype=torch.float64), "decoder_input_ids": ids((2, 5))},
        ),
        "resnet": lambda: (
            tf.ResNetForImageClassification(
                tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck")
            ),
            pixels,
        ),
        "deberta": lambda: (
            tf.DebertaV2Model(tf.DebertaV2Config(**small, relative_attention=True, pos_att_type=["p2c", "c2p"])),
            {"input_ids": ids()},
        ),
        "t5": lambda: (
            tf.T5ForConditionalGeneration(
                tf.T5Config(
                    vocab_size=100, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
                )
            ),
            {"input_ids": ids(), "decoder_input_ids": ids((2, 4))},
        ),
    }
    torch.manual_seed(0)
    model, inputs = made[name]()
    return model.double().eval(), inputs


MODELS = ["bert", "gpt2", "llama", "vit", "whisper", "resnet", "deberta", "t5"]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_at_full_rank_give_the_same_outputs(name):
    model, inputs = hugging_face(name)
    result = quick(model, inputs, pipeline=FULL_RANK)
    assert type(result.model) is type(model)
    assert result.model.config.to_dict() == model.config.to_dict()
    assert result.report.settings["output_error"] < 1e-9
    assert_same_outputs(result.model, model, **inputs)
    with torch.no_grad():
        compressed, expected = result.model(**inputs), model(**inputs)
    assert type(compressed) is type(expected)
    assert compressed.keys() == expected.keys()
    cut = sum(d in ("svd", "tucker2") for d in decisions(result).values())
    assert cut >= 0.7 * len(decisions(result))
    assert all(layer_reasons(result).values())
    assert quick(model, inputs, ratio=1.5).report.after["params"] < result.report.before["params"]


def test_bert_with_another_length_and_a_mask_given_later():
    model, inputs = hugging_face("bert")
    compressed = quick(model, {"input_ids": inputs["input_ids"]}, pipeline=FULL_RANK).model
    mask = torch.ones(3, 12)
    mask[:, 7:] = 0
    assert_same_outputs(compressed, model, input_ids=ids((3, 12)), attention_mask=mask)
    assert_same_outputs(compressed, model, ids(), output_hidden_states=True)
    assert_same_outputs(compressed, model, inputs_embeds=torch.randn(1, 5, 16, dtype=torch.float64))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generate_gives_the_same_tokens(name):
    model, inputs = hugging_face(name)
    compressed = quick(model, inputs, pipeline=FULL_RANK).model
    prompt = ids((2, 4))
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    assert torch.equal(compressed.generate(prompt, **options), model.generate(prompt, **options))
    cut = quick(model, inputs, ratio=1.5).model.generate(prompt, max_new_tokens=3)
    assert cut.shape[0] == 2


def test_conv1d_of_gpt2_is_a_linear_layer_and_its_cache_is_not_written_into():
    model, inputs = hugging_face("gpt2")
    result = quick(model, inputs, pipeline=FULL_RANK)
    rows = {row["name"]: row for row in result.report.layers}
    assert rows["transformer.h.0.attn.c_attn"]["op"] == "Linear"
    assert rows["transformer.h.0.attn.c_attn"]["shape"] == [48, 16]
    assert rows["lm_head"]["reason"] == str(shared_parameter("weight", "transformer.wte.weight"))
    assert result.model.lm_head.weight is result.model.transformer.wte.weight
    with torch.no_grad():
        cache = model(ids((1, 6))).past_key_values
    step = {"input_ids": ids((1, 1)), "past_key_values": cache}
    compressed = quick(model, step, pipeline=FULL_RANK)
    assert cache.get_seq_length() == 6  # the example is not written into
    assert compressed.report.settings["output_error"] < 1e-9


def test_a_conv1d_of_gpt2_with_a_hook_is_left_alone():
    model, inputs = hugging_face("gpt2")
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda m, a, y: y * 2)
    result = quick(model, inputs, pipeline=FULL_RANK)
    assert "has hooks" in layer_reasons(result)["transformer.h.0.mlp.c_fc"]
    assert_same_outputs(result.model, model, **inputs)


def test_llama_trains_with_labels_and_saves(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, inputs = hugging_face("llama")
    compressed = quick(model, inputs, ratio=1.5).model.train()
    compressed.gradient_checkpointing_enable()
    compressed(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert compressed.model.layers[0].mlp.up_proj.first.weight.grad.abs().sum() > 0
    compressed.save_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    assert torch.equal(
        state["model.layers.0.mlp.up_proj.last.weight"], compressed.model.layers[0].mlp.up_proj.last.weight
    )
    assert set(state) == set(compressed.state_dict())


def test_calibration_data_as_a_tokenizer_gives_them():
    model, inputs = hugging_face("bert")
    BatchEncoding = pytest.importorskip("transformers").BatchEncoding
    data = [BatchEncoding({"input_ids": ids((3, n)), "attention_mask": torch.ones(3, n)}) for n in (4, 9, 6, 9, 5)]
    result = quick(model, BatchEncoding(inputs), budget=Budget(params=0.9), calibration=data)
    assert result.report.after["params"] <= 0.9 * result.report.before["params"]


def test_vit_is_quantized_after_compression():
    model, inputs = hugging_face("vit")
    inputs = {k: v.float() for k, v in inputs.items()}
    compressed = quick(model.float(), inputs, ratio=1.5).model
    with pytest.warns(DeprecationWarning, match="quantiz"):
        small = torch.ao.quantization.quantize_dynamic(compressed, {nn.Linear}, dtype=torch.qint8)
    assert sum(type(m).__module__.startswith("torch.ao.nn.quantized") for m in small.modules()) >= 20
    with torch.no_grad():
        assert largest_error(small.vit(**inputs)[0], compressed.vit(**inputs)[0]) < 0.1


def test_vit_in_torchao_int8_after_compression():
    torchao = pytest.importorskip("torchao.quantization")
    model, inputs = hugging_face("vit")
    inputs = {k: v.float() for k, v in inputs.items()}
    compressed = quick(model.float(), inputs, ratio=1.5).model
    small = copy.deepcopy(compressed)
    torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    with torch.no_grad():
        assert largest_error(small.vit(**inputs)[0], compressed.vit(**inputs)[0]) < 0.1


INNER = {
    "bert": {"encoder.layer.0.intermediate.dense": "encoder.layer.0.output.dense"},
    "gpt2": {"transformer.h.0.mlp.c_fc": "transformer.h.0.mlp.c_proj"},
    "llama": {"model.layers.0.mlp.gate_proj": "model.layers.0.mlp.down_proj"},
    "vit": {"vit.layers.0.mlp.fc1": "vit.layers.0.mlp.fc2"},
    "whisper": {"encoder.layers.0.fc1": "encoder.layers.0.fc2", "decoder.layers.0.fc1": "decoder.layers.0.fc2"},
}


@pytest.mark.parametrize("name", INNER)
def test_the_inner_widths_of_feed_forward_blocks_are_cut(name, tmp_path):
    model, x = hugging_face(name)
    ranks = dict.fromkeys(INNER[name], 12)
    pipeline = Pipeline([Calibrate(x), Merge(ranks=ranks)])
    result = quick(model, x, pipeline=pipeline)
    for producer, consumer in INNER[name].items():
        assert result.model.get_submodule(producer).out_features == 12
        assert result.model.get_submodule(consumer).in_features == 12
    save(result, tmp_path / "saved")
    loaded = load(tmp_path / "saved", copy.deepcopy(model))
    other = {k: v.roll(1, -1) if k != "attention_mask" else v for k, v in x.items()}
    assert_same_outputs(loaded, result.model, **other)


@pytest.mark.usefixtures("without_ridge")
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_refit_fits_every_layer_to_what_the_refitted_model_feeds_it(name):
    model, inputs = hugging_face(name)
    batches = [{key: ids((24, *t.shape[1:])) if "ids" in key else t for key, t in inputs.items()} for _ in range(4)]
    batches = [each | {k: torch.ones(24, 9) for k in each if "mask" in k} for each in batches]
    gm = capture_any(model, Inputs.of(inputs))
    gm = Pipeline([Calibrate(batches, outputs=False), Decompose(ranks=4)])(gm).graph_module
    result = Refit(batches, guard=False)(gm)
    names = [site.name for site in result.sites]
    assert set(reasons(result).values()) <= {"called-again"}
    assert len(names) >= 0.9 * sum(n.op == "call_module" and str(n.target).endswith(".last") for n in gm.graph.nodes)
    for layer in (names[0], names[len(names) // 2], names[-1]):
        assert_fitted(gm, result.graph_module, model, layer, batches)
