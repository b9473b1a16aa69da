"""A model by its name on the command line."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxlrd.app import zoo
from fxlrd.app.arguments import MODEL
from fxlrd.app.huggingface import SCHEME, folder_model, is_compressed
from fxlrd.errors import FxlrdError, one_line
from fxlrd.saving.load import load
from fxlrd.saving.storage import PLAN, read_plan

_WITH_WEIGHTS = f"--weights is for {' and '.join(zoo.PACKAGES)} models"


def load_model(name: str, weights: str | None, seed: int) -> nn.Module:
    """Return the model ``torchvision:NAME``, ``timm:NAME``, ``hf:DIR``, ``package.module:factory`` or of a directory.

    A directory whose architecture a factory makes is written ``package.module:factory@DIR``, so that no file decides
    which code runs. Without ``weights`` (the name of published weights, such as DEFAULT, or a file) parameters are
    random, seeded by ``seed``. The model is in eval mode. Raises FxlrdError for a name that leads to no module.
    """
    if (folder := huggingface_folder(name)) is not None:
        if weights is not None:
            raise FxlrdError(f"{_WITH_WEIGHTS}; a folder holds its own")
        return folder_model(folder)
    if os.path.isdir(name):
        return _saved(name, weights)
    if (saved := made_by(name)) is not None:
        return _saved(saved[1], weights, saved[0])
    package, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise FxlrdError(f"model {name!r}: write {MODEL}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if package in zoo.PACKAGES:
            return zoo.zoo_model(package, attribute, weights).eval()
        build = _factory(package, attribute, weights)
        try:
            model = build()
        except (Exception, SystemExit) as error:
            raise FxlrdError(f"model {name!r} cannot be built: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise FxlrdError(f"model {name!r} returns a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def made_by(name: str) -> tuple[str, str] | None:
    """Return the factory and the folder of ``package.module:factory@DIR``; None for another name."""
    source, _, folder = name.rpartition("@")
    folder = os.path.expanduser(folder)
    return (source, folder) if source and os.path.isdir(folder) else None


def folder_of(name: str) -> Path | None:
    """Return the folder that MODEL is read from, if it is."""
    if (folder := huggingface_folder(name)) is not None:
        return Path(folder).expanduser()
    if os.path.isdir(name):
        return Path(name)
    saved = made_by(name)
    return None if saved is None else Path(saved[1])


def huggingface_folder(name: str) -> str | None:
    """Return the folder of a model of transformers, if that is what MODEL names."""
    if name.startswith(SCHEME):
        return name.removeprefix(SCHEME)
    return name if is_compressed(Path(name)) else None


def source_of(name: str, weights: str | None = None) -> str | None:
    """Return the name of MODEL's architecture: the name itself, or what a saved directory was made from.

    Returns None if no name leads to the architecture.
    """
    if os.path.isdir(name):
        return read_plan(Path(name)).architecture.source
    if (saved := made_by(name)) is not None:
        return saved[0]
    package, _, attribute = name.partition(":")
    if package not in zoo.PACKAGES:
        return name
    return zoo.zoo_source(package, attribute, weights)


def architecture_of(name: str, weights: str | None, model: nn.Module) -> str | None:
    """Return the name that makes the architecture of ``model``, which MODEL and ``weights`` made; None if none does.

    Published weights bring a structure of their own, such as FrozenBatchNorm2d in detectors, another size of images, or
    inputs that are scaled.
    """
    source = source_of(name, weights)
    if source is None or weights is None or zoo.is_file(weights) or not source.startswith("torchvision:"):
        return source
    package, _, attribute = source.partition(":")
    if zoo.parsed(package, attribute)[0] in zoo.SCALING:
        return None
    options = [{}, {"aux_loss": 1}, {"image_size": getattr(model, "image_size", 0)}]
    for each in options:
        named = zoo.with_options(package, attribute, **each) if each else attribute
        with contextlib.suppress(FxlrdError):
            if _alike(model, zoo.without_weights(package, named)):
                return f"{package}:{named}"
    return None


def _alike(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have modules of the same classes, with tensors of the same shapes, under the same names."""
    a, b = ({name: type(module) for name, module in each.named_modules()} for each in (model, other))
    c, d = ({name: tensor.shape for name, tensor in each.state_dict().items()} for each in (model, other))
    return a == b and c == d


def _saved(name: str, weights: str | None, factory: str | None = None) -> nn.Module:
    """Load a saved directory; ``factory`` is what the user trusts to make its architecture."""
    if weights is not None:
        raise FxlrdError(f"{_WITH_WEIGHTS}; a saved directory holds its own")
    if factory is None and (Path(name) / "config.json").is_file() and not (Path(name) / PLAN).exists():
        raise FxlrdError(f"model {name!r} is a folder of Hugging Face: write {SCHEME}{name}")
    source = factory or source_of(name)
    if source is None:
        raise FxlrdError(f"model {name!r} does not name its architecture: open it with fxlrd.load(path, model)")
    if os.path.isdir(source):
        raise FxlrdError(f"model {name!r} names the directory {source!r} as its architecture: the plan is damaged")
    if factory is None and source.partition(":")[0] not in zoo.PACKAGES:
        raise FxlrdError(f"model {name!r}: code makes its architecture; if you trust it, write {source}@{name}")
    return load(name, _architecture(source)).eval()


def _architecture(source: str) -> nn.Module:
    """Return a model to load weights into."""
    package, _, attribute = source.partition(":")
    return zoo.without_weights(package, attribute) if package in zoo.PACKAGES else load_model(source, None, seed=0)


def _factory(package: str, attribute: str, weights: str | None) -> Callable[[], Any]:
    if weights is not None:
        raise FxlrdError(f"{_WITH_WEIGHTS}; a factory loads its own")
    target = _imported("model", package, attribute)
    return target if callable(target) and not isinstance(target, nn.Module) else lambda: target


def _imported(what: str, package: str, attribute: str) -> Any:
    """Import what the user names, from the working directory too. Raises FxlrdError where that fails."""
    if package.endswith(".py"):
        module = Path(package).stem
        raise FxlrdError(f"{what} {package}:{attribute}: in the file's folder, name its module: {module}:{attribute}")
    folder = os.getcwd()
    if folder not in sys.path:  # as python -m does
        sys.path.insert(0, folder)
    try:
        target: Any = importlib.import_module(package)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (Exception, SystemExit) as error:  # importing a script may even end the process
        raise FxlrdError(f"{what} {package}:{attribute} cannot be imported: {one_line(error)}") from error
    return target


def evaluation_of(text: str) -> Callable[[nn.Module], float]:
    """Return the function ``package.module:function``, which measures a model."""
    package, _, attribute = text.partition(":")
    if not package or not attribute:
        raise FxlrdError(f"--evaluate {text}: write package.module:function")
    function: Callable[[nn.Module], float] = _imported("--evaluate", package, attribute)
    if not callable(function):
        raise FxlrdError(f"--evaluate {text}: that is a {type(function).__name__}, not a function of a model")
    return function
