"""A model by its name on the command line, and inputs for it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.errors import FxlrdError, one_line, unknown
from fxlrd.saving.load import load
from fxlrd.saving.storage import read_plan

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NAMES = "torchvision:resnet50, package.module:factory or a saved directory"


def load_model(name: str, weights: str | None, seed: int) -> nn.Module:
    """Return the model ``torchvision:NAME``, ``package.module:factory`` or of a saved directory in eval mode.

    A directory whose architecture a factory makes is written ``package.module:factory@DIR``, so that no file decides
    which code runs. Without ``weights`` (the name of torchvision weights, such as DEFAULT) parameters are random,
    seeded by ``seed``. Raises FxlrdError for a name that leads to no module.
    """
    if os.path.isdir(name):
        return _saved(name, weights)
    source, _, folder = name.rpartition("@")
    if source and os.path.isdir(folder):
        return _saved(folder, weights, source)
    package, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise FxlrdError(f"model {name!r}: write {NAMES}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = _torchvision(attribute, weights) if package == "torchvision" else _factory(package, attribute, weights)
        try:
            model = build()
        except (Exception, SystemExit) as error:
            raise FxlrdError(f"model {name!r} cannot be built: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise FxlrdError(f"model {name!r} returns a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def source_of(name: str, weights: str | None = None) -> str | None:
    """Return the name of MODEL's architecture: the name itself, or what a saved directory was made from.

    Returns None if no name leads to the architecture.
    """
    if os.path.isdir(name):
        return read_plan(Path(name)).architecture.source
    source, _, folder = name.rpartition("@")
    if source and os.path.isdir(folder):
        return source
    # GoogLeNet and Inception v3 scale their inputs if, and only if, they are built with weights.
    return None if weights is not None and name in ("torchvision:googlenet", "torchvision:inception_v3") else name


def _saved(name: str, weights: str | None, factory: str | None = None) -> nn.Module:
    """Load a saved directory; ``factory`` is what the user trusts to make its architecture."""
    if weights is not None:
        raise FxlrdError("--weights is for torchvision models; a saved directory holds its own")
    source = factory or source_of(name)
    if source is None:
        raise FxlrdError(f"model {name!r} does not name its architecture: open it with fxlrd.load(path, model)")
    if os.path.isdir(source):
        raise FxlrdError(f"model {name!r} names the directory {source!r} as its architecture: the plan is damaged")
    if factory is None and not source.startswith("torchvision:"):
        raise FxlrdError(f"model {name!r}: code makes its architecture; if you trust it, write {source}@{name}")
    return load(name, _architecture(source)).eval()


def _architecture(source: str) -> nn.Module:
    """Return a model to load weights into. A torchvision model is built without weights where it can be."""
    if source.startswith("torchvision:"):
        with contextlib.suppress(FxlrdError), torch.device("meta"):
            return load_model(source, None, seed=0)
    return load_model(source, None, seed=0)  # RegNet computes its widths with tensors


def _torchvision(name: str, weights: str | None) -> Callable[[], Any]:
    from torchvision import models

    if name not in models.list_models():
        raise unknown("torchvision model", name, models.list_models())
    valid = [*(w.name for w in models.get_model_weights(name)), "DEFAULT"]
    if weights is not None and weights not in valid:
        raise unknown(f"weights of {name}", weights, valid)
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    # By default, detectors and segmentation models download weights of their backbone.
    backbone = {"weights_backbone": None} if "weights_backbone" in parameters and weights is None else {}
    return lambda: models.get_model(name, weights=weights, **backbone)


def _factory(package: str, attribute: str, weights: str | None) -> Callable[[], Any]:
    if weights is not None:
        raise FxlrdError("--weights is for torchvision models; a factory loads its own")
    target = _imported("model", package, attribute)
    return target if callable(target) and not isinstance(target, nn.Module) else lambda: target


def _imported(what: str, package: str, attribute: str) -> Any:
    """Import what the user names, from the working directory too. Raises FxlrdError where that fails."""
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


def calibration_for(text: str, batch: int, like: Tensor) -> list[Tensor]:
    """Return calibration batches: ``random``, or those of a file of inputs (.npy, or .pt with one tensor).

    ``random`` is seeded noise of the shape of ``like``: enough to judge speed, not accuracy. Batches have the size,
    dtype and device of ``like``. Raises FxlrdError for an unreadable file, and for inputs of another shape.
    """
    if text == "random":
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(like.shape, generator=generator).to(like) for _ in range(4)]
    inputs = _read_inputs(text)
    if not isinstance(inputs, Tensor) or inputs.shape[1:] != like.shape[1:]:
        content = (
            f"inputs of shape {list(inputs.shape)}" if isinstance(inputs, Tensor) else f"a {type(inputs).__name__}"
        )
        sizes = ", ".join(map(str, like.shape[1:]))
        raise FxlrdError(f"--calibration {text}: holds {content}, the model takes [N, {sizes}]")
    channels_last = like.dim() == 4 and not like.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [part.to(like.device, like.dtype).contiguous(memory_format=memory_format) for part in inputs.split(batch)]


def _read_inputs(path: str) -> Any:
    try:
        if path.endswith(".npy"):
            import numpy as np

            return torch.from_numpy(np.load(path, allow_pickle=False))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        remedy = "give a .npy or .pt file of inputs, or random"
        raise FxlrdError(f"--calibration {path}: {one_line(error)}; {remedy}") from error


def example_for(shape: str, batch: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Return a seeded random batch of ``shape`` (text such as 3x224x224, without the batch)."""
    try:
        sizes = [int(part) for part in shape.split("x")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise FxlrdError(f"--input {shape}: write the shape of one example, such as 3x224x224")
    if batch < 1:
        raise FxlrdError(f"--batch {batch}: a batch has at least one example")
    try:
        x = torch.randn(batch, *sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    except (RuntimeError, MemoryError) as error:
        raise FxlrdError(f"--input {shape} --batch {batch}: too large: {one_line(error)}") from error
    if channels_last:
        if x.dim() != 4:
            raise FxlrdError(f"--channels-last: an input of shape {shape} is not an image")
        x = x.contiguous(memory_format=torch.channels_last)
    return x
