"""Compressed models of transformers, saved and loaded as its own are."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxlrd
from fxlrd import FxlrdError
from fxlrd.saving.pretrained import save_pretrained
from tests.support.compression import quick

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
X = {"input_ids": torch.arange(5, 15)[None]}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, intermediate_size=128)
    return transformers.BertForMaskedLM(config).eval()


def t5():
    torch.manual_seed(0)
    sizes = {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 1,
        "num_heads": 4,
        "vocab_size": 99,
        "decoder_start_token_id": 0,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, intermediate_size=128)).eval()


def assert_same(model, other, x):
    with torch.no_grad():
        assert torch.equal(model(**x)[0], other(**x)[0])
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}


@pytest.mark.parametrize("make", [bert, t5, llama])
def test_save_pretrained_loses_nothing(make, tmp_path):
    model = make()
    x = X | ({"decoder_input_ids": X["input_ids"]} if make is t5 else {})
    result = quick(model, x, ratio=2.0).model
    assert "save_pretrained" not in vars(model)
    for twin in (result, copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        twin.save_pretrained(tmp_path, max_shard_size="50KB")
        loaded = fxlrd.load(tmp_path)
        assert type(loaded) is type(model)
        assert_same(loaded, twin, x)
        again = type(model).from_pretrained(tmp_path)
        assert_same(again, twin, x)
        assert not [name for name in (*vars(again), *vars(again.config)) if "quant" in name or name == "fxlrd"]
    loaded.save_pretrained(tmp_path / "again")  # and what was loaded is saved likewise, in both ways
    assert_same(fxlrd.load(tmp_path / "again"), result, x)
    fxlrd.save(loaded, tmp_path / "plan")
    assert_same(fxlrd.load(tmp_path / "plan", make()), result, x)
    assert not hasattr(result.config, "fxlrd")
    if make is not bert:
        new = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(loaded.generate(X["input_ids"], **new), result.generate(X["input_ids"], **new))


def test_a_model_in_another_saves_itself(tmp_path):
    result = quick(bert(), X, ratio=2.0).model
    result.bert.save_pretrained(tmp_path)
    assert_same(fxlrd.load(tmp_path), result.bert, X)


def test_both_kinds_in_one_directory_are_told_apart_by_the_architecture(tmp_path):
    a, b = quick(bert(), X, ratio=2.0).model, quick(bert(), X, ratio=4.0).model
    a.save_pretrained(tmp_path)
    fxlrd.save(b, tmp_path)
    assert_same(fxlrd.load(tmp_path), a, X)
    assert_same(fxlrd.load(tmp_path, bert()), b, X)


def test_what_does_not_fit_is_an_error(tmp_path):
    result = quick(bert(), X, ratio=2.0).model
    with pytest.raises(FxlrdError, match="holds no model that save_pretrained wrote: give the architecture"):
        fxlrd.load(tmp_path)
    with pytest.raises(FxlrdError, match=r"call model\.push_to_hub"):
        result.save_pretrained(tmp_path, push_to_hub=True)
    unknown = copy.deepcopy(result)
    del unknown._fxlrd
    with pytest.raises(FxlrdError, match=r"not known what this model was made from: use fxlrd\.save"):
        save_pretrained(unknown, tmp_path)
    result.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    name = next(iter(config["fxlrd"]["layers"]))
    del config["fxlrd"]["layers"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FxlrdError, match=f"keys: {name}"):
        fxlrd.load(tmp_path)
    config["fxlrd"]["layers"][name] = {"kind": "Shell", "options": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FxlrdError, match="the plan is damaged"):
        fxlrd.load(tmp_path)


@pytest.fixture
def without_fxlrd(monkeypatch):
    """Let from_pretrained be as in a process that has not used fxlrd."""

    def forget():
        for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
            monkeypatch.delitem(getattr(transformers.quantizers.auto, name), "fxlrd")

    return forget


@pytest.mark.parametrize("cls", [transformers.BertModel, transformers.AutoModel])
def test_from_pretrained_refuses_where_fxlrd_takes_no_part(cls, tmp_path, without_fxlrd):
    quick(bert(), X, ratio=2.0).model.bert.save_pretrained(tmp_path)
    without_fxlrd()
    with pytest.raises(ValueError, match=r"load it with fxlrd\.load"):
        cls.from_pretrained(tmp_path)


def test_from_pretrained_makes_no_layer_anew(tmp_path):
    result = quick(bert(), X, ratio=2.0).model
    result.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("query.first.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        FxlrdError, match=rf"has not the tensors of {name.removesuffix('.weight')}: save the model again"
    ):
        type(result).from_pretrained(tmp_path)


def test_another_class_is_refused_by_the_names_of_its_modules(tmp_path):
    quick(bert(), X, ratio=2.0).model.save_pretrained(tmp_path)
    with pytest.raises(FxlrdError, match="the model has no module"):
        transformers.BertModel.from_pretrained(tmp_path)


def test_a_directory_that_was_left_half_written_refuses_too(monkeypatch, tmp_path, without_fxlrd):
    result = quick(bert(), X, ratio=2.0).model
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result.save_pretrained(tmp_path)
    assert "fxlrd" in json.loads((tmp_path / "config.json").read_text()), "it is written first"
    assert "fxlrd" not in result.config.to_dict()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        type(result).from_pretrained(tmp_path)
    without_fxlrd()
    with pytest.raises(ValueError, match="fxlrd"):
        type(result).from_pretrained(tmp_path)


def interrupted(*_, **__):
    raise KeyboardInterrupt


class Adapted(torch.nn.Module):
    """As PEFT's models, whose save_pretrained writes their adapters alone."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, **x):
        return self.base(**x)

    def save_pretrained(self, folder):
        raise AssertionError("nothing of the base model would be written")


def test_adapters_alone_are_not_written_in_the_place_of_a_model(tmp_path):
    result = quick(Adapted(Adapted(bert())), X, ratio=2.0).model
    with pytest.raises(FxlrdError, match=r"base\.base\.bert.* is compressed, .*: use fxlrd\.save and fxlrd\.load$"):
        result.base.save_pretrained(tmp_path)
    base = result.base.base
    base.save_pretrained(tmp_path / "base")
    assert_same(fxlrd.load(tmp_path / "base"), base, X)
    base._hf_peft_config_loaded = True
    with pytest.raises(FxlrdError, match=r"with adapters it writes these alone: use fxlrd\.save and fxlrd\.load$"):
        base.save_pretrained(tmp_path)
