from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fxlrd.cli import main
from fxlrd.files import write_out

SMALL = ["--input", "3x64x64"]


@pytest.mark.slow
def test_compress_prints_tables_and_writes_json(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["compress", "torchvision:resnet18", *SMALL, "--batch", "2", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "parameters" in out
    assert err == "", "no progress bar where there is no terminal"
    data = json.loads(path.read_text())
    assert data["model"] == "torchvision:resnet18"
    assert data["after"]["params"] < data["before"]["params"]
    assert len(data["layers"]) == 21
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
def test_merge_with_calibration_inputs_from_a_file(tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).normal(size=(6, 3, 64, 64)).astype("float32"))
    command = ["compress", "torchvision:resnet18", *SMALL, "--batch", "2", "--passes", "calibrate,merge"]
    assert main([*command, "--calibration", str(tmp_path / "images.npy")]) == 0
    assert "channels kept" in capsys.readouterr().out
    assert main([*command, "--calibration", "random"]) == 0
    capsys.readouterr()
    np.save(tmp_path / "small.npy", np.zeros((6, 3, 32, 32), "float32"))
    for name, message in [("small.npy", "the model takes [N, 3, 64, 64]"), ("none.npy", "give a .npy or .pt file")]:
        assert main([*command, "--calibration", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert main(command) == 2
    assert "no calibration inputs" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_prints_the_papers_table(capsys):
    assert main(["ranks", "torchvision:resnet18", "--input", "3x32x32"]) == 0
    out = capsys.readouterr().out
    assert "rank by ratio" in out
    assert "38x38" in out


def test_a_factory_of_the_users(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_for_cli.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["compress", "mine_for_cli:net", "--input", "64", "--ratio", "4"]) == 0
    assert "svd at rank 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "torchvision:resnet81"], "did you mean resnet18"),
        (
            ["compress", "resnet18"],
            "write torchvision:resnet50, timm:resnet50, hf:FOLDER, package.module",
        ),
        (["compress", "no_such_module:net"], "cannot be imported"),
        (["compress", "nets/detector.py:make"], "in the file's folder, name its module: detector:make"),
        (["compress", "os:getcwd"], "returns a str, not a torch.nn.Module"),
        (["compress", "torchvision:resnet18", "--preset", "rnaks"], "did you mean ranks"),
        (["compress", "torchvision:resnet18", "--passes", "decompose{ratoi=2}"], "did you mean ratio"),
        (["compress", "torchvision:resnet18", "--ratio", "0.5"], "finite number above 1"),
        (["compress", "torchvision:resnet18", "--ratio", "x"], "invalid float value"),
        (["compress", "torchvision:resnet18", "--input", "3xx"], "write the shape of one example"),
        (["compress", "torchvision:resnet18", "--input", "5x32x32"], "the model fails on the example inputs"),
        (["compress", "torchvision:resnet18", "--batch", "0"], "at least one example"),
        (["compress", "torchvision:resnet18", "--threads", "0"], "at least one is needed"),
        (["compress", "torchvision:resnet18", "--device", "nowhere"], "--device nowhere"),
        (["compress", "torchvision:resnet18", "--json", "no/such/folder/r.json"], "does not exist"),
        (["compress", "torchvision:resnet18", "--skip", "head"], "unknown layer 'head'"),
        (["comprss"], "invalid choice"),
        ([], "required"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("fxlrd: ")
    assert err.count("\n") == 1


def test_nothing_is_written_when_the_request_fails(tmp_path):
    path = tmp_path / "report.json"
    assert main(["compress", "torchvision:resnet18", "--ratio", "1e9", *SMALL, "--json", str(path)]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_to_and_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_out(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_out(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)


@pytest.mark.slow
def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "fxlrd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fxlrd ")


def test_importing_fxlrd_pulls_in_nothing_heavy():
    script = (
        "import sys, torch; before = set(sys.modules); import fxlrd; "
        "print([m for m in ('torchvision', 'triton', 'sympy', 'torch._dynamo', 'torch._inductor', 'tqdm') "
        "if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "text", ["raise RuntimeError('boom')", "def (", "raise SystemExit(0)"], ids=["raises", "syntax", "ends"]
)
def test_a_factory_module_that_fails_at_import(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_factory.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["compress", "broken_factory:make"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_input_too_large_for_memory(capsys):
    assert main(["compress", "torchvision:resnet18", "--input", "3x999999999x999999999"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


NET = """
import torch
from torch import nn

def net():
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(64, 64), nn.ReLU())], nn.Linear(64, 10))
"""


@pytest.fixture
def net(tmp_path, monkeypatch) -> list[str]:
    (tmp_path / "net_for_budget.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["compress", "net_for_budget:net", "--input", "64", "--batch", "4"]


@pytest.mark.parametrize("measure", ["params", "flops"])
def test_a_budget(net, measure, tmp_path, capsys):
    torch.save(torch.randn(200, 64), tmp_path / "data.pt")
    path = tmp_path / "report.json"
    data = ["--calibration", str(tmp_path / "data.pt"), "--json", str(path)]
    assert main([*net, "--budget", f"{measure}=0.6", *data]) == 0
    assert f"of {measure}; predicted output error" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert 0.58 <= report["after"][measure] / report["before"][measure] <= 0.6
    assert [p["name"] for p in report["passes"]][:4] == ["calibrate", "allocate", "merge", "decompose"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0.5"], "unknown budget '0.5'"),
        (["--budget", "latecny=0.5"], "did you mean latency?"),
        (["--budget", "params"], "--budget params: '' is not a number"),
        (["--budget", "params=half"], "--budget params=half: 'half' is not a number"),
        (["--budget", "params=nan"], "--budget params=nan: params=nan is not a fraction"),
        (["--budget", "params=0"], "--budget params=0: params=0.0 is not a fraction"),
        (["--budget", "params=-1"], "--budget params=-1: params=-1.0 is not a fraction"),
        (["--budget", "params=1"], "--budget params=1: params=1.0 is not a fraction"),
        (["--budget", "params=0.5,flops=0.5"], "is not a number"),
        (["--budget", "params=0.5", "--ratio", "2"], "ratio and budget: give one of the two"),
        (["--budget", "params=0.5", "--preset", "lrd"], "only allocate spends one"),
        (["--budget", "params=0.5", "--passes", "decompose"], "only allocate spends one"),
        (["--budget", "params=0.5"], "no calibration inputs; give calibration= (on the command line --calibration)"),
        (["--budget", "params=0.001", "--calibration", "random"], "is out of reach: the cheapest forms leave 0."),
        (["--budget", "params=0.5", "--calibration", "random", "--skip", "*"], "nothing in it can be made cheaper"),
        (["--preset", "lrd", "--calibration", "random"], "calibration: no pass of decompose"),
    ],
)
def test_a_budget_that_cannot_be_met_is_one_line(net, arguments, message, capsys):
    assert main([*net, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("fxlrd: ")
    assert err.count("\n") == 1


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    from fxlrd.app.output import write_json

    write_json({"error": float("inf"), "rows": [float("nan"), 1.5]}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"error": None, "rows": [None, 1.5]}


def test_the_tilde_of_a_path_is_the_users_home(monkeypatch):
    from fxlrd.app.arguments import path

    monkeypatch.setenv("HOME", "/home/me")
    assert str(path("~/out")) == "/home/me/out"
