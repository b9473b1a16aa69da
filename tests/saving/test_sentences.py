"""save_pretrained of a compressed model of sentence-transformers, or of another library, loses nothing or raises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd.errors import FxlrdError
from tests.support.compression import quick

sentence_transformers = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")
SENTENCES = ["the cat sat", "a dog ran on the mat", "mat"]
WORDS = ["the", "cat", "sat", "a", "dog", "ran", "on", "mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a directory that sentence-transformers wrote, with prompts and a normalisation."""
    path = tmp_path_factory.mktemp("sentences")
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(path / "bert")
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path / "bert")
    parts = sentence_transformers.sentence_transformer.modules
    encoder = parts.Transformer(str(path / "bert"), max_seq_length=16)
    modules = [encoder, parts.Pooling(32), parts.Dense(32, 24), parts.Normalize()]
    model = sentence_transformers.SentenceTransformer(
        modules=modules, device="cpu", prompts={"query": "the "}, default_prompt_name="query"
    )
    model.save_pretrained(str(path / "model"))
    return path / "model"


def compressed(folder, **options):
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()
    return quick(model, {"input": dict(model.tokenize(SENTENCES))}, ratio=2.0, **options).model


def test_it_is_loaded_with_all_of_its_modules(folder, tmp_path):
    model = compressed(folder, skip=["2.linear"])
    model.save_pretrained(str(tmp_path / "a"))
    loaded = fxlrd.load(tmp_path / "a")
    assert type(loaded) is sentence_transformers.SentenceTransformer
    assert [type(m) for m in loaded] == [type(m) for m in model]
    assert (loaded.prompts, loaded.default_prompt_name) == (model.prompts, "query")
    assert loaded.max_seq_length == 16
    wanted = model.encode(SENTENCES, convert_to_tensor=True)
    assert torch.equal(loaded.encode(SENTENCES, convert_to_tensor=True), wanted)
    read = sentence_transformers.SentenceTransformer(str(tmp_path / "a"), device="cpu", local_files_only=True)
    assert torch.equal(read.encode(SENTENCES, convert_to_tensor=True), wanted)

    loaded.save_pretrained(str(tmp_path / "b"))  # and what is loaded is saved, both ways
    again = fxlrd.load(tmp_path / "b", loaded)
    assert torch.equal(again.encode(SENTENCES, convert_to_tensor=True), wanted)
    fxlrd.save(loaded, tmp_path / "c")
    fresh = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    again = fxlrd.load(tmp_path / "c", fresh)
    assert torch.equal(again.encode(SENTENCES, convert_to_tensor=True), wanted)


def test_a_module_of_its_own_that_is_compressed_is_refused(folder, tmp_path):
    model = compressed(folder)
    with pytest.raises(FxlrdError, match=r"^save_pretrained: 2\.linear is compressed.* use fxlrd\.save"):
        model.save_pretrained(str(tmp_path))
    assert not [*tmp_path.iterdir()]


def test_another_librarys_save_pretrained_is_refused(tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(x) if x.sum() < 1e9 else x

        def save_pretrained(self, path):
            raise AssertionError

    result = quick(Network(), torch.randn(2, 64), ratio=2.0)
    with pytest.raises(FxlrdError, match=r"fc is compressed"):
        result.model.save_pretrained(tmp_path)
    fxlrd.save(result, tmp_path)


def test_a_damaged_directory_is_one_line(folder, tmp_path):
    compressed(folder, skip=["2.linear"]).save_pretrained(str(tmp_path))
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(FxlrdError, match=r"^load: "):
        fxlrd.load(tmp_path)
