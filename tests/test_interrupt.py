"""Ctrl-C at any time: status 130, one line, and no file that is half-written."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd import cli

MOMENTS = [
    ("fxlrd.capturing.whole", "trace"),
    ("fxlrd.calibration.moments", "Moments.add"),
    ("fxlrd.calibration.importance", "Samples.add"),
    ("fxlrd.allocation.choices", "left_basis"),
    ("fxlrd.passes.decompose", "Decompose.__call__"),
    ("fxlrd.passes.refit", "Refit.__call__"),
    ("fxlrd.timing.clock", "_sample"),
    ("fxlrd.saving.storage", "Disk.write_tensors"),
    ("fxlrd.saving.storage", "Disk.rename"),
    ("fxlrd.saving.storage", "Disk.write_text"),
    ("fxlrd.app.output", "write_out"),
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(96, 10)).eval()


@pytest.mark.parametrize(("module", "name"), MOMENTS, ids=[name for _, name in MOMENTS])
def test_a_command_that_is_interrupted(module, name, tmp_path, monkeypatch, capsys):
    fxlrd.save(fxlrd.compress(network(), torch.randn(2, 3, 6, 6), ratio=4.0, measure=False), tmp_path / "saved")
    *holders, function = name.split(".")
    place = importlib.import_module(module)
    for holder in holders:
        place = getattr(place, holder)
    original, reached = getattr(place, function), []

    def interrupted(*args, **kwargs):
        if not reached:
            reached.append(True)
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, function, interrupted)
    (tmp_path / "report.json").write_text('"old"')
    files = [f"--{kind}={tmp_path / f'report.{kind}'}" for kind in ("json", "html")]
    options = ["--input=3x6x6", "--budget=params=0.7", "--calibration=random", f"--save={tmp_path / 'saved'}", *files]
    assert cli.main(["compress", f"{__name__}:network", *options]) == 130
    assert reached
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("fxlrd: interrupted")
    assert "Traceback" not in captured.err
    json.loads((tmp_path / "report.json").read_text())
    assert not (tmp_path / "report.html").exists()
    assert fxlrd.load(tmp_path / "saved", network())(torch.zeros(1, 3, 6, 6)).isfinite().all()
    assert not [path.name for path in tmp_path.rglob(".*")]
    assert len([*(tmp_path / "saved").iterdir()]) == 2  # a plan and its weights


IMPORTING = """
import signal, sys
from fxlrd import __main__
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "fxlrd.cli":
            try: signal.raise_signal(signal.SIGINT)
            except BaseException: pass  # as some of torch's imports do
sys.meta_path.insert(0, Interrupting())
__main__.run()
"""
WORKING = """
import signal, sys, types
from fxlrd import __main__
def main(loaded):
    loaded()
    try: exec("signal.raise_signal(signal.SIGINT)")  # as dataclasses do; Python would end by the signal
    except KeyboardInterrupt: return 130
sys.modules["fxlrd.cli"] = types.SimpleNamespace(main=main)
__main__.run()
"""


@pytest.mark.parametrize("program", [IMPORTING, WORKING], ids=["importing", "working"])
def test_the_status_of_the_process(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
