"""Texts as inputs of models of transformers."""

from __future__ import annotations

import json

import pytest
import torch

from fxlrd.app.documents import Document
from fxlrd.app.prepared import _like
from fxlrd.app.texts import as_inputs, random_ids, sequences, texts
from fxlrd.cli import main
from tests.support.folders import WORDS, write_classifier

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
SIZES = {"d_model": 16, "vocab_size": 40, "max_position_embeddings": 32}
LAYERS = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}


def bart() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BartConfig(**SIZES, **LAYERS, encoder_attention_heads=2, decoder_attention_heads=2)
    return transformers.BartForSequenceClassification(config).eval()


def test_a_classifier_with_a_decoder_gets_what_it_gets_when_it_is_served():
    model = bart()
    ids = random_ids(model, 3, 8)
    assert (ids == model.config.eos_token_id).sum(1).tolist() == [1, 1, 1], "it looks for the one end of a text"
    assert torch.equal(model(**as_inputs(model, ids)).logits, model(ids).logits)


class Tokenizer:
    """A token a letter, and one before each text."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, begins: bool) -> None:
        self.begins = begins

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(letter) for letter in text]
        return {"input_ids": [self.bos_token_id] * (add_special_tokens and self.begins) + ids}


@pytest.mark.parametrize(("begins", "expected"), [(True, [[1, 97, 98], [1, 99, 2]]), (False, [[97, 98, 99]])])
def test_sequences_begin_as_the_tokenizer_begins_a_text(begins, expected):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    read = sequences("it", [Document("abc")], Tokenizer(begins), model, 3)
    assert read.read(read.numbers)[0]["input_ids"].tolist() == expected


def test_a_text_without_a_class_among_others_is_named(capsys):
    documents = [Document("a", 1), Document("b"), Document("c", 0)]
    assert [*texts("it", documents, None, bart(), 8).classes] == []
    assert "it: classes are not read: text 2 has none (1 such)" in capsys.readouterr().err


def test_kinds_of_tokens_stay_with_other_tokens():
    ids, kinds = torch.arange(6).view(2, 3), torch.zeros(2, 3, dtype=torch.long)
    made = _like(ids + 9, {"token_type_ids": kinds, "decoder_input_ids": ids, "use_cache": False})
    assert torch.equal(made["token_type_ids"], kinds)
    assert torch.equal(made["decoder_input_ids"], ids + 9)
    assert made["use_cache"] is False


def test_random_tokens_calibrate_where_texts_are_measured(tmp_path):
    folder = write_classifier(tmp_path / "model")
    rows = [{"text": " ".join(WORDS[i : i + 4]), "label": ("bad", "good")[i % 2]} for i in range(12)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["compress", f"hf:{folder}", "--preset", "merge", "--calibration", "random", "--length", "16"]
    assert main([*command, "--eval", str(tmp_path / "reviews.jsonl")]) == 0


def test_any_token_pads_where_a_tokenizer_has_none(tmp_path):
    from fxlrd.app.huggingface import tokenizer_of

    folder = write_classifier(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    special = ("pad_token", "eos_token", "unk_token")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in special}))
    plain = transformers.AutoTokenizer.from_pretrained(folder)
    assert (plain.pad_token, plain.eos_token, plain.unk_token) == (None, None, None)
    assert tokenizer_of(folder)(["a", "a a"], padding=True)["attention_mask"] == [[1, 0], [1, 1]]
