"""Models by name and the user's images, on the command line."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from torch import nn

from fxlrd import FxlrdError
from fxlrd.app.commands import _check_folder
from fxlrd.app.models import load_model, source_of
from fxlrd.cli import main
from tests.support.pictures import write_images


def net(classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, classes))


NET = f"{__name__}:net"
IMAGES = ["--size", "8", "--mean", "0.5", "--std", "0.5"]


@pytest.fixture
def photos(tmp_path):
    return str(write_images(tmp_path / "photos"))


def run(tmp_path, *arguments):
    file = tmp_path / "report.json"
    assert main([*arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_model_is_fitted_to_images_trained_on_them_and_measured(photos, tmp_path, capsys):
    trained = ["--finetune", photos, "--epochs", "8", "--lr", "0.01", "--batch", "4"]
    report = run(tmp_path, "compress", NET, *IMAGES, *trained, "--budget", "params=0.8")
    evaluation = report["evaluation"]
    assert (evaluation["measure"], evaluation["examples"]) == ("accuracy", 4)
    assert evaluation["models"]["fine-tuned"] == 1.0, "brightness tells the classes"
    assert report["before"]["accuracy"] == evaluation["models"]["original"]
    assert report["after"]["params"] <= 0.8 * report["before"]["params"]
    out, err = capsys.readouterr()
    assert "top-1 accuracy on 4 images" in out
    assert "dark is output 0, light is output 1" in err


def test_images_without_classes_show_how_often_answers_are_the_same(tmp_path, capsys):
    flat = write_images(tmp_path / "photos") / "dark"
    report = run(tmp_path, "compress", NET, *IMAGES, "--eval", str(flat), "--ratio", "1.01")
    assert report["evaluation"] == {
        "measure": "agreement", "on": str(flat), "examples": 10, "models": {"original": 1.0, "compressed": 1.0},
    }  # fmt: skip
    assert main(["compress", NET, "--size", "8", "--eval", str(flat)]) == 2
    assert "--mean and --std: give the mean" in capsys.readouterr().err


@pytest.mark.slow
def test_a_frontier_measures_its_models(photos, tmp_path, capsys):
    report = run(tmp_path, "frontier", NET, *IMAGES, "--calibration", photos, "--budgets", "params=0.9,0.7")
    models = report["evaluation"]["models"]
    assert list(models) == ["original", "params=0.9", "params=0.7"]
    assert [models["original"], *(point["accuracy"] for point in report["points"])] == list(models.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--finetune", "PHOTOS", "--eval", "PHOTOS"], "the same examples are fitted to"),
        (["--calibration", "PHOTOS"], "calibration: no pass of decompose reads it; give --budget"),
        (["--finetune", "PHOTOS/dark"], "its images have no classes: put them into a folder for each"),
        (["--finetune", "nowhere"], "--finetune nowhere: it does not exist; give a folder"),
        (["--finetune", "PHOTOS", "--distill", "2"], "--distill 2.0: a weight is between 0 and 1"),
        (["--epochs", "2"], "--epochs: that is for training; give --finetune DIR"),
        (["--finetune", "PHOTOS", "--dtype", "bfloat16"], "small steps are lost in bfloat16"),
        (["--eval", "PHOTOS", "--batch", "99"], "--batch 99: PHOTOS has 20 images"),
        (["--input", "3x8x8"], "--input and --size: give one of the two"),
        (["--length", "8"], "--length is for texts"),
    ],
)
def test_examples_that_do_not_do_are_one_line(arguments, message, photos, capsys):
    images = IMAGES if "PHOTOS" in str(arguments) else IMAGES[:2]
    assert main(["compress", NET, *images, *(a.replace("PHOTOS", photos) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message.replace("PHOTOS", photos) in err.splitlines()[-1]


def test_weights_of_a_file_tell_the_number_of_classes(tmp_path):
    from torchvision.models import squeezenet1_1

    torch.manual_seed(1)
    state = {f"module.{name}": value for name, value in squeezenet1_1(num_classes=7).state_dict().items()}
    file = str(tmp_path / "mine.pth")
    torch.save({"epoch": 3, "state_dict": state}, file)
    model = load_model("torchvision:squeezenet1_1", file, seed=0)
    assert torch.equal(model.classifier[1].weight, state["module.classifier.1.weight"])
    source = source_of("torchvision:squeezenet1_1", file)
    assert source == "torchvision:squeezenet1_1{num_classes=7}"
    assert load_model(source, None, seed=0).classifier[1].out_channels == 7
    with pytest.raises(
        FxlrdError, match=r"it lacks conv1\.weight \(\d+ such\): not the weights of torchvision:resnet18"
    ):
        load_model("torchvision:resnet18", file, seed=0)
    torch.save([1], file)
    with pytest.raises(FxlrdError, match="it holds no state dict; save"):
        load_model("torchvision:resnet18", file, seed=0)


@pytest.mark.slow
def test_a_model_of_timm_is_saved_and_opened_again(tmp_path, capsys):
    pytest.importorskip("timm")
    name = "timm:test_resnet{num_classes=3}"
    assert main(["compress", name, "--size", "64", "--save", str(tmp_path / "out")]) == 0
    again = load_model(str(tmp_path / "out"), None, seed=0)
    assert again(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert source_of(str(tmp_path / "out")) == name
    photos = write_images(tmp_path / "photos", ("a", "b", "c"), count=2)
    report = run(tmp_path, "compress", str(tmp_path / "out"), "--eval", str(photos), "--ratio", "1.01")
    assert report["settings"]["inputs"].startswith("float32[1, 3, 160, 160]")
    for text, message in [("timm:hf-hub:a/b", "unknown timm model"), ("timm:test_resnet.nope", "unknown timm model")]:
        with pytest.raises(FxlrdError, match=message):
            load_model(text, None, seed=0)


def test_options_of_a_name_stay_where_weights_tell_the_number_of_classes(tmp_path, capsys):
    from torchvision.models import googlenet

    torch.manual_seed(1)
    file = str(tmp_path / "mine.pth")
    torch.save(googlenet(num_classes=3, aux_logits=False, init_weights=False).state_dict(), file)
    assert source_of("torchvision:googlenet{aux_logits=0}", file) == "torchvision:googlenet{aux_logits=0,num_classes=3}"
    name = "torchvision:googlenet{aux_logits=0,init_weights=0}"
    assert not load_model(name, file, seed=0).transform_input
    assert "published weights scale their inputs; if those of the file do too, write googlenet{" in (
        capsys.readouterr().err
    )
    assert load_model(f"{name[:-1]},transform_input=1}}", file, seed=0).transform_input
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_greys_of_timm_want_a_mean(tmp_path, capsys):
    pytest.importorskip("timm")
    photos = write_images(tmp_path / "photos", count=3)
    command = ["compress", "timm:test_resnet{in_chans=1,num_classes=2}", "--size", "64", "--eval", str(photos)]
    assert main([*command, "--ratio", "1.01"]) == 2
    assert "--mean and --std: give the mean" in capsys.readouterr().err
    assert main([*command, "--ratio", "1.01", "--mean", "0.5", "--std", "0.5"]) == 0


def test_a_folder_of_hugging_face_that_is_read_is_not_replaced(tmp_path):
    for inside, save in (((), tmp_path / "params=0.9"), (("params=0.9",), tmp_path)):
        options = argparse.Namespace(model=f"hf:{tmp_path / 'params=0.9'}", save=save)
        with pytest.raises(FxlrdError, match="the original model is there; name another directory"):
            _check_folder(options, inside)
        _check_folder(argparse.Namespace(model="hf:elsewhere", save=save), inside)


@pytest.mark.slow
def test_what_was_saved_is_compared_with_a_model_of_a_file(tmp_path, capsys):
    from torchvision.models import squeezenet1_1

    torch.manual_seed(1)
    torch.save(squeezenet1_1().state_dict(), tmp_path / "mine.pth")
    model = ["torchvision:squeezenet1_1", "--weights", str(tmp_path / "mine.pth"), "--size", "64"]
    assert main(["compress", *model, "--save", str(tmp_path / "out")]) == 0
    assert main(["diff", model[0], str(tmp_path / "out"), *model[1:]]) == 1
    assert main(["diff", str(tmp_path / "out"), *model]) == 1


def test_a_function_of_the_users_measures_without_examples_held_out(photos, tmp_path, monkeypatch):
    from fxlrd.app import prepared

    monkeypatch.setattr(prepared, "_split", None)  # which would fail
    module = f"{__name__}:one"
    command = ["frontier", NET, *IMAGES, "--calibration", photos, "--budgets", "params=0.9", "--evaluate", module]
    assert [point["accuracy"] for point in run(tmp_path, *command)["points"]] == [1.0]


def one(model: nn.Module) -> float:
    return 1.0
