"""Completion in a shell, by argcomplete: of commands, options, models by their names, and values."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fxlrd.app.arguments import PRESETS
from fxlrd.errors import FxlrdError

_PASSES = ("calibrate", "allocate", "decompose", "snap", "merge", "branch", "refit", "recalibrate", "freeze")
_MEASURES = ("latency=", "params=", "flops=", "layers=")
_PACKAGES = ("torchvision", "timm")
_DATA = (".txt", ".jsonl", ".csv", ".npy", ".pt")
_ZSH = """# The code below calls compdef, which compinit defines.
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }

"""


def shell_code(shell: str) -> str:
    """Return what a shell evaluates to complete the command line. Raises FxlrdError where argcomplete is missing."""
    code: str = _argcomplete().shellcode(["fxlrd"], shell=shell)
    return _ZSH + code if shell == "zsh" else code


def complete(parser: argparse.ArgumentParser) -> None:
    """Print the completions that a shell has asked for, and exit."""
    argcomplete = _argcomplete()
    for action in _actions(parser):
        completer = _completer(action)
        if completer is not None:
            action.completer = completer  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long")


def _argcomplete() -> Any:
    try:
        import argcomplete
    except ImportError as error:
        raise FxlrdError("completion needs argcomplete: pip install argcomplete") from error
    return argcomplete


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
        else:
            yield action


def _completer(action: argparse.Action) -> Callable[..., Iterable[str]] | None:
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter, SuppressCompleter

    known: Mapping[str, Callable[..., Iterable[str]]] = {
        "model": models,
        "other": models,
        "weights": weights,
        "preset": lambda **_: PRESETS,
        "passes": passes,
        "budget": lambda **_: _MEASURES,
        "budgets": lambda **_: _MEASURES,
        "device": lambda **_: ("cpu", "cuda", "mps"),
        "calibration": lambda prefix, **_: [
            *_paths(prefix, _DATA),
            *(["random"] if "random".startswith(prefix) else []),
        ],
        "eval": lambda prefix, **_: _paths(prefix, _DATA),
        "finetune": lambda prefix, **_: _paths(prefix, _DATA),
        "save": DirectoriesCompleter(),
        "json": FilesCompleter(("json",)),
        "html": FilesCompleter(("html",)),
    }
    if action.dest in known:
        return known[action.dest]
    return None if action.choices is not None or action.nargs == 0 else SuppressCompleter()


def models(prefix: str, **_: Any) -> list[str]:
    """Return the models whose names begin so: packages, the names in one, and folders."""
    package, colon, rest = prefix.partition(":")
    if not colon:
        return [f"{name}:" for name in (*_PACKAGES, "hf") if name.startswith(prefix)] + _paths(prefix, ())
    if package == "hf":
        return [f"hf:{path}" for path in _paths(rest, ())]
    return [f"{package}:{name}" for name in _names(package) if name.startswith(rest)]


def weights(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the published weights of the model that the command line names, and files."""
    package, _colon, name = (getattr(parsed_args, "model", None) or "").partition(":")
    published = ["DEFAULT", *_names(package).get(name, [])] if package in _PACKAGES else []
    return [each for each in published if each.startswith(prefix)] + _paths(prefix, (".pth", ".pt", ".safetensors"))


def passes(prefix: str, **_: Any) -> list[str]:
    """Return what the last pass in a pipeline's text may be."""
    before, comma, _last = prefix.rpartition(",")
    if prefix.count("{") > prefix.count("}") or prefix.endswith("}"):
        return []
    return [f"{before}{comma}{name}" for name in _PASSES]


def _paths(prefix: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the folders, and the files with such suffixes, whose paths begin so."""
    head, tail = os.path.split(prefix)
    try:
        entries = sorted(os.scandir(os.path.expanduser(head) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    found = []
    for entry in entries:
        if not entry.name.startswith(tail) or (entry.name.startswith(".") and not tail):
            continue
        if entry.is_dir():
            found.append(os.path.join(head, entry.name) + "/")
        elif entry.name.endswith(suffixes) and suffixes:
            found.append(os.path.join(head, entry.name))
    return found


def _names(package: str) -> dict[str, list[str]]:
    """Return the models of a package, each with its published weights. They are cached: to list them imports torch."""
    if package not in _PACKAGES:
        return {}
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return {}
    file = _cache() / f"names-{package}-{version}.json"
    try:
        names: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        names = _listed(package)
        _remember(file, names)
    return names


def _listed(package: str) -> dict[str, list[str]]:
    if package == "torchvision":
        from torchvision import models

        return {name: [w.name for w in models.get_model_weights(name)] for name in models.list_models()}
    import timm

    names: dict[str, list[str]] = {name: [] for name in timm.list_models()}
    for published in timm.list_pretrained():
        name, _, tag = published.partition(".")
        if tag and name in names:
            names[name].append(tag)
    return names


def _remember(file: Path, names: Mapping[str, list[str]]) -> None:
    from fxlrd.files import write_out

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_out(file, json.dumps(names))
    except OSError:
        return  # they are listed again next time


def _cache() -> Path:
    folder = os.environ.get("FXLRD_CACHE_DIR")
    return Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxlrd"
