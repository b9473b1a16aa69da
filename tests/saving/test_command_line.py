"""The command line opens what it saved."""

from __future__ import annotations

import pytest

from fxlrd.app.models import load_model
from fxlrd.cli import main
from fxlrd.graph.guards import FACTOR
from fxlrd.saving.load import load
from fxlrd.saving.save import save
from fxlrd.saving.storage import read_plan
from tests.saving.nets import Net, compressed, empty


def test_the_command_line_opens_what_it_saved(tmp_path, capsys, monkeypatch):
    (tmp_path / "net_for_save.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["compress", "net_for_save:net", "--input", "64", "--save", "saved"]) == 0
    assert main(["compress", "net_for_save:net@saved", "--input", "64", "--save", "saved"]) == 0
    assert capsys.readouterr().out.count(str(FACTOR)) == 4
    assert main(["compress", "saved", "--input", "64"]) == 2
    assert "if you trust it, write net_for_save:net@saved" in capsys.readouterr().err
    plan = read_plan(tmp_path / "saved")
    assert plan.architecture.source == "net_for_save:net"
    from net_for_save import net

    assert load("saved", empty(net))[0].first.out_features == 16


@pytest.mark.slow
def test_the_command_line_opens_a_model_that_cannot_be_made_without_weights(tmp_path):
    command = ["compress", "torchvision:regnet_y_400mf", "--input", "3x32x32", "--skip", "trunk_output.*"]
    assert main([*command, "--save", str(tmp_path)]) == 0
    assert load_model(str(tmp_path), None, seed=0).fc.first.out_features < 440


def test_the_command_line_on_a_directory_that_it_cannot_open(tmp_path, capsys):
    save(compressed(Net()), tmp_path / "a")
    assert main(["compress", str(tmp_path / "a")]) == 2
    assert "does not name its architecture: open it with fxlrd.load" in capsys.readouterr().err
    assert main(["compress", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert main(["compress", str(tmp_path / "a"), "--weights", "DEFAULT"]) == 2
    assert "--weights is for torchvision" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["compress", "torchvision:resnet18", "--save", str(tmp_path / "file")]) == 2
    assert "name a directory" in capsys.readouterr().err
    save(compressed(Net()), tmp_path / "a", source=str(tmp_path / "a"))
    assert main(["compress", str(tmp_path / "a")]) == 2
    assert "the plan is damaged" in capsys.readouterr().err
