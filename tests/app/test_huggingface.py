"""Local folders of Hugging Face on the command line: in, compressed, trained, saved, and in again."""

from __future__ import annotations

import json

import pytest
import torch

from fxlrd import FxlrdError, load
from fxlrd.app.huggingface import folder_model
from fxlrd.cli import main
from tests.support.folders import text, write_classifier, write_image_classifier, write_language_model
from tests.support.pictures import write_images

pytestmark = pytest.mark.slow
pytest.importorskip("transformers")


def report(tmp_path):
    return json.loads((tmp_path / "report.json").read_text())


def compress(tmp_path, *arguments):
    return main(["compress", *map(str, arguments), "--json", str(tmp_path / "report.json")])


def test_a_classifier_of_texts_is_trained_on_texts_and_opened_again(tmp_path, capsys):
    folder = write_classifier(tmp_path / "model")
    rows = [{"text": text(3 + i % 5) + f" {word}" * 12, "label": word} for i in range(20) for word in ("good", "bad")]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    command = ["hf:" + str(folder), "--passes", "decompose{ratio=1.5}", "--finetune", data]
    assert (
        compress(tmp_path, *command, "--epochs", "4", "--lr", "0.01", "--batch", "4", "--save", tmp_path / "out") == 0
    )
    evaluation = report(tmp_path)["evaluation"]
    assert (evaluation["measure"], evaluation["examples"]) == ("accuracy", 8)
    assert list(evaluation["models"]) == ["original", "compressed", "fine-tuned"]
    assert evaluation["models"]["fine-tuned"] == 1.0, "the word tells"
    assert "top-1 accuracy on 8 texts" in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    model = load(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == report(tmp_path)["after"]["params"]
    for name in (tmp_path / "out", f"hf:{tmp_path / 'out'}"):
        assert compress(tmp_path, name, "--passes", "decompose{ratio=1.01}", "--eval", data, "--length", "24") == 0
        assert report(tmp_path)["evaluation"]["models"]["original"] >= 0.9


def test_a_language_model_keeps_its_dtype_and_its_perplexity_is_measured(tmp_path, capsys):
    folder = write_language_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text(1000))
    command = [f"hf:{folder}", "--calibration", tmp_path / "text.txt", "--length", "16", "--budget", "params=0.8"]
    assert compress(tmp_path, *command, "--batch", "2", "--save", tmp_path / "out") == 0
    assert report(tmp_path)["settings"]["inputs"].startswith("int64[2, 16]")
    evaluation = report(tmp_path)["evaluation"]
    assert (evaluation["measure"], evaluation["examples"]) == ("perplexity", 12)
    assert 10 < evaluation["models"]["original"] < 30
    assert "perplexity on 12 sequences" in capsys.readouterr().out
    assert {p.dtype for p in load(tmp_path / "out").parameters()} == {torch.bfloat16}
    assert compress(tmp_path, *command[:1], "--finetune", tmp_path / "text.txt", "--length", "16") == 2
    assert "small steps are lost in bfloat16: give --dtype float32" in capsys.readouterr().err
    trained = ["--finetune", tmp_path / "text.txt", "--length", "16", "--dtype", "float32", "--lr", "0.01"]
    assert compress(tmp_path, *command[:1], *trained, "--epochs", "2") == 0
    models = report(tmp_path)["evaluation"]["models"]
    assert models["fine-tuned"] < 0.9 * models["compressed"]


def test_a_classifier_of_images_uses_its_processor(tmp_path, capsys):
    folder = write_image_classifier(tmp_path / "model")
    photos = write_images(tmp_path / "photos")
    trained = ["--finetune", photos, "--epochs", "4", "--lr", "0.003", "--distill", "0.1"]
    assert compress(tmp_path, f"hf:{folder}", *trained, "--batch", "4", "--save", tmp_path / "out") == 0
    assert report(tmp_path)["settings"]["inputs"].startswith("float32[4, 3, 16, 16]")
    assert report(tmp_path)["evaluation"]["models"]["fine-tuned"] == 1.0
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    budgets = ["--budgets", "params=0.9,0.8", "--calibration", str(photos), "--json", str(tmp_path / "report.json")]
    assert main(["frontier", f"hf:{folder}", *budgets, "--save", str(tmp_path / "points")]) == 0
    assert report(tmp_path)["original"]["accuracy"] == report(tmp_path)["evaluation"]["models"]["original"]
    assert list(report(tmp_path)["evaluation"]["models"]) == ["original", "params=0.9", "params=0.8"]
    assert (tmp_path / "points" / "params=0.8" / "preprocessor_config.json").is_file()


def test_a_folder_that_holds_no_model(tmp_path, capsys):
    with pytest.raises(FxlrdError, match="hf:bert-base: there is no such folder, and nothing is downloaded"):
        folder_model("bert-base")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(FxlrdError, match=r"config\.json is missing, found: weights\.bin; name a folder with it"):
        folder_model(str(tmp_path))
    with pytest.raises(FxlrdError, match="that is a file; name the folder"):
        folder_model(str(tmp_path / "weights.bin"))
    folder = write_classifier(tmp_path / "model")
    assert main(["compress", str(folder)]) == 2
    assert f"is a folder of Hugging Face: write hf:{folder}" in capsys.readouterr().err
    assert main(["compress", f"hf:{folder}", "--save", str(folder)]) == 2
    assert "the original model is there; name another directory" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MyOwnBert"]}))
    with pytest.raises(FxlrdError, match="has no class MyOwnBert, and code in a folder is never run"):
        folder_model(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(FxlrdError, match=r"the weights lack bert\.encoder\.layer\.2"):
        folder_model(str(folder))
