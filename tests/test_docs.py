"""Every code block of the README and of docs/ runs, and every script in examples/."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import fxlrd
from docs.hooks.results import table
from fxlrd.app import fashion
from tests.support.timers import WeightTimer

ROOT = Path(__file__).parents[1]
SLOW = "<!--- slow -->"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "bash", "text", "json"}
"""Those of the blocks; the last two are not run."""


def run_shell(example):
    """Run a block of commands as they stand, with this interpreter's folder first on the path."""
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(folders), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-euc", example.parsed], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{example.path}:{example.line}: {done.stdout}{done.stderr}"


PARSER = Sybil([SkipParser(), PythonCodeBlockParser(), CodeBlockParser("bash", run_shell)], pattern="*.md")


def page(path):
    slow = [pytest.mark.slow] if SLOW in path.read_text() else []
    return pytest.param(path, id=str(path.relative_to(ROOT)), marks=slow)


@pytest.fixture
def in_a_new_folder(tmp_path, monkeypatch):
    """Blocks run in an empty folder, on fewer images, and time by the sizes of weights, whatever the machine's load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    images, (test_images, labels) = fashion.calibration()[:40], fashion.test()
    monkeypatch.setattr(fashion, "calibration", lambda: images)
    monkeypatch.setattr(fashion, "test", lambda: (test_images[:60], labels[:60]))
    timer = WeightTimer(lambda name, weights: 1e-6 + 1e-9 * weights)
    for name in ("compress", "frontier"):
        monkeypatch.setattr(fxlrd, name, partial(getattr(fxlrd, name), timer=timer))


@pytest.mark.parametrize("path", list(map(page, PAGES)))
def test_the_code_on_a_page_runs(path, in_a_new_folder):
    for example in PARSER.parse(path):
        try:
            example.evaluate()
        except SkipTest:
            continue


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_block_is_of_a_language_that_is_not_run(path):
    fences = re.findall(r"^ *```(.*)$", path.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= LANGUAGES
    assert set(fences[1::2]) <= {""}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda script: script.stem)
def test_an_example_runs(script, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_of_results_is_a_table(tmp_path):
    file = tmp_path / "table1.json"
    assert "python -m bench.table1" in table(file)
    rows = [{"model": "a|b", "published": 25.56}, {"model": "c", "measured": 1 / 3}]
    file.write_text(json.dumps({"title": "T", "date": "D", "machine": "M", "command": "C", "rows": rows}))
    lines = table(file).splitlines()
    assert lines[0] == "**T** (M, D, `C`)"
    assert lines[2:] == [
        "| model | published | measured |",
        "| --- | --- | --- |",
        "| a\\|b | 25.56 |  |",
        "| c |  | 0.3333 |",
    ]
