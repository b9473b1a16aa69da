"""What a shell is offered."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

import pytest

from fxlrd.app import completion
from fxlrd.app.arguments import PRESETS, parser_of
from fxlrd.app.completion import models, passes, weights
from fxlrd.app.inputs import DTYPES
from fxlrd.cli import main
from fxlrd.passes import PASSES
from fxlrd.pipeline import PRESETS as PIPELINES


def offered(line: str, folder) -> set[str]:
    """Return what argcomplete offers for a command line, as a shell asks for it."""
    code = "import os; os.dup2(1, 8); from fxlrd.cli import main; main()"
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    environment = {**os.environ, **shell, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    return {word.strip() for word in done.stdout.split("\n") if word.strip()}


def test_a_shell_is_offered_commands_models_and_values(tmp_path):
    pytest.importorskip("argcomplete")
    (tmp_path / "photos").mkdir()
    assert offered("fxlrd co", tmp_path) == {"compress", "completion"}
    assert offered("fxlrd compress h", tmp_path) == {"hf:"}
    assert offered("fxlrd compress x:y --preset m", tmp_path) == {"merge"}
    assert offered("fxlrd compress x:y --calibration p", tmp_path) == {"photos/"}
    assert offered("fxlrd compress x:y --fi", tmp_path) == {"--finetune"}


FIRST_WORDS = {
    "zsh": ["zsh", "-f", "-c", "{code}; print -r -- ${_comps[fxlrd]}"],
    "fish": ["fish", "--no-config", "-c", "{code}; complete -C 'fxlrd compress x:y --preset m'"],
}
"""How to start a shell without the user's settings, let it evaluate the code, and ask what it has made of it."""


@pytest.mark.parametrize(("shell", "answer"), [("zsh", "_python_argcomplete"), ("fish", "merge")])
def test_a_shell_without_settings_completes(shell, answer, tmp_path):
    pytest.importorskip("argcomplete")
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    command = tmp_path / "fxlrd"
    command.write_text(f"#!{sys.executable}\nfrom fxlrd.cli import main\nmain()\n")
    command.chmod(0o755)
    folders = [str(tmp_path), os.environ["PATH"]]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(folders),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    words = [word.replace("{code}", completion.shell_code(shell)) for word in FIRST_WORDS[shell]]
    done = subprocess.run(words, env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.split() == [answer], done.stderr


def test_names_of_a_package_are_listed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FXLRD_CACHE_DIR", str(tmp_path))
    assert "torchvision:resnet18" in models("torchvision:resnet1")
    monkeypatch.setattr(completion, "_listed", lambda package: 1 / 0)
    assert models("torchvision:resnet1") == ["torchvision:resnet101", "torchvision:resnet152", "torchvision:resnet18"]
    options = argparse.Namespace(model="torchvision:resnet50")
    monkeypatch.chdir(tmp_path)
    assert weights("IM", options) == ["IMAGENET1K_V1", "IMAGENET1K_V2"]
    next(tmp_path.iterdir()).write_text("{")
    with pytest.raises(ZeroDivisionError):
        models("torchvision:")


def test_passes_follow_each_other():
    assert "snap,merge" in passes("snap,me")
    assert passes("merge{mode=") == []


def test_the_names_that_wait_for_no_import_are_those_of_the_library():
    assert set(PRESETS) == set(PIPELINES)
    assert tuple(PASSES) == completion._PASSES
    dtypes = next(a.choices for a in completion._actions(parser_of("")) if a.dest == "dtype")
    assert list(dtypes) == list(DTYPES)


def test_the_help_of_each_command_ends_with_an_example(capsys):
    for command in ("compress", "frontier", "ranks", "diff", "profile", "demo", "completion"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "example:\n  " in capsys.readouterr().out


def test_help_and_mistakes_do_not_wait_for_torch():
    code = (
        "import sys; from fxlrd.cli import main; status = main(['compress', '--nonsense']); "
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2 False"
