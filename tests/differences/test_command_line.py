from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fxlrd
from fxlrd.cli import main

SMALL = ["--input", "3x32x32"]
MODEL = ["diff", "torchvision:resnet18", *SMALL]


def test_the_exit_status_is_that_of_diff(capsys):
    assert main([*MODEL, "torchvision:resnet18"]) == 0
    assert capsys.readouterr().out == ""
    assert main([*MODEL, "torchvision:resnet18", "--seed", "0", "--passes", "decompose"]) == 2
    assert "give another model, or --passes, or --preset" in capsys.readouterr().err
    assert main([*MODEL, "torchvision:resnet34", "--no-values"]) == 1
    assert "48 added" in capsys.readouterr().out


def test_a_defect_is_trouble_and_not_a_difference(capsys, monkeypatch):
    def broken(*args, **options):
        raise KeyError("defect")

    monkeypatch.setattr("fxlrd.app.commands.diff", broken)
    assert main([*MODEL, "torchvision:resnet18"]) == 2
    assert "KeyError: 'defect'" in capsys.readouterr().err


@pytest.mark.slow
def test_passes_and_steps_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    path = tmp_path / "d.json"
    spec = "decompose{ratio=4},merge{mode=exact,norms=true}"
    assert main([*MODEL, "--passes", spec, "--steps", "--json", str(path), "--html", str(tmp_path / "d.html")]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b[" not in out
    assert out.startswith("decompose{ratio=4}\n\nparameters")
    assert "\nall\n\nparameters" in out
    data = json.loads(path.read_text())
    assert [step["pass"] for step in data["steps"]] == ["decompose{ratio=4}", "merge{mode=exact,norms=true}"]
    assert data["counts"]["merged"] == 20
    assert "layer4" in (tmp_path / "d.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "status", "message"),
    [
        (">&-", 1, ""),
        (f"| {sys.executable} -c ''", 1, ""),
        (">/dev/full", 2, "fxlrd: standard output: OSError: [Errno 28] No space left on device\n"),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_the_exit_status_does_not_depend_on_who_reads_unless_none_can(tmp_path, out, status, message):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef a():\n    return nn.ReLU()\ndef b():\n    return nn.GELU()\n"
    )
    command = f"{sys.executable} -m fxlrd diff nets:a nets:b --input 4 {out}; exit ${{PIPESTATUS[0]}}"
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(fxlrd.__file__).parents[1]), str(tmp_path)])}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=os.environ | paths, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (status, message)


def test_a_terminal_that_has_no_arrows(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert main([*MODEL, "--passes", "decompose{ranks=4}"]) == 1
    assert rb"rewritten 1 \u2192 3" in sys.stdout.buffer.getvalue()


@pytest.mark.slow
def test_the_environment_may_ask_for_colour_or_against_it(capsys, monkeypatch):
    command = [*MODEL, "--passes", "decompose{ranks=4}"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(command) == 1
    assert "\x1b[32m+ layer1.0.conv1.core" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(command) == 1
    assert "\x1b[" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give another model, or --passes, or --preset"),
        (["torchvision:resnet81"], "did you mean resnet18"),
        (["torchvision:resnet18", "--steps"], "two models have no steps"),
        (["--passes", "decmopose"], "unknown pass"),
        (["--preset", "lrd", "--html", "no/such/folder/d.html"], "does not exist"),
    ],
)
def test_trouble_is_one_line_and_status_2(arguments, message, capsys):
    assert main([*MODEL, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
