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
from fxlrd.saving.schema import read_plan

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NAMES = "torchvision:resnet50, package.module:factory or a saved directory"


def load_model(name: str, weights: str | None, seed: int) -> nn.Module:
    """Return the model ``torchvision:NAME``, ``package.module:factory`` or of a saved directory in eval mode.

    A directory whose architecture a factory makes is ``package.module:factory@DIR``: no file says what code to run.

    Without ``weights`` (a torchvision weights name such as DEFAULT) its parameters are random, seeded by
    ``seed``. Raises FxlrdError for a name that leads to no module.
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
    """Return what names the architecture of MODEL: the name itself or, of a saved directory, what that was made from.

    None where no name leads to the architecture.
    """
    if os.path.isdir(name):
        source = read_plan(Path(name))["architecture"]["source"]
        assert source is None or isinstance(source, str)
        return source
    source, _, folder = name.rpartition("@")
    if source and os.path.isdir(folder):
        return source
    # GoogLeNet and Inception v3 scale their inputs where they come with weights, and only then.
    return None if weights is not None and name in ("torchvision:googlenet", "torchvision:inception_v3") else name


def _saved(name: str, weights: str | None, given: str | None = None) -> nn.Module:
    if weights is not None:
        raise FxlrdError("--weights is for torchvision models; a saved directory holds its own")
    source = given or source_of(name)
    if source is None:
        raise FxlrdError(f"model {name!r} does not tell its architecture: open it with fxlrd.load(path, model)")
    if os.path.isdir(source):
        raise FxlrdError(f"model {name!r} names the directory {source!r} as its architecture: the plan is damaged")
    if given is None and not source.startswith("torchvision:"):
        raise FxlrdError(f"model {name!r}: code makes its architecture; if you trust it, write {source}@{name}")
    return load(name, _architecture(source)).eval()


def _architecture(source: str) -> nn.Module:
    """Return a model without weights where that is known to work; a factory may load some."""
    if source.startswith("torchvision:"):
        with contextlib.suppress(FxlrdError), torch.device("meta"):
            return load_model(source, None, seed=0)
    return load_model(source, None, seed=0)  # RegNet computes its widths with tensors


def _torchvision(name: str, weights: str | None) -> Callable[[], Any]:
    from torchvision import models

    if name not in models.list_models():
        raise unknown("torchvision model", name, models.list_models())
    known = [w.name for w in models.get_model_weights(name)]
    if weights is not None and weights not in (*known, "DEFAULT"):
        raise unknown(f"weights of {name}", weights, [*known, "DEFAULT"])
    takes = inspect.signature(models.get_model_builder(name)).parameters
    # Detectors and segmenters would fetch a backbone's weights unless told not to.
    backbone = {"weights_backbone": None} if "weights_backbone" in takes and weights is None else {}
    return lambda: models.get_model(name, weights=weights, **backbone)


def _factory(package: str, attribute: str, weights: str | None) -> Callable[[], Any]:
    if weights is not None:
        raise FxlrdError("--weights is for torchvision models; a factory loads its own")
    folder = os.getcwd()
    if folder not in sys.path:  # as python -m does
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(package)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # a script may even end itself when it is imported
        raise FxlrdError(f"model {package}:{attribute} cannot be imported: {one_line(error)}") from error
    return found if callable(found) and not isinstance(found, nn.Module) else lambda: found


def calibration_for(text: str, batch: int, like: Tensor) -> list[Tensor]:
    """Return calibration batches: ``random``, or those of a file of inputs (.npy, or .pt with one tensor).

    ``random`` is seeded noise shaped as ``like``: enough to judge speed, not accuracy. Batches have the size,
    dtype and device of ``like``. Raises FxlrdError for a file that is none or holds inputs of another shape.
    """
    if text == "random":
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(like.shape, generator=generator).to(like) for _ in range(4)]
    try:
        if text.endswith(".npy"):
            import numpy as np

            found = torch.from_numpy(np.load(text, allow_pickle=False))
        else:
            found = torch.load(text, map_location="cpu", weights_only=True)
    except Exception as error:
        remedy = "give a .npy or .pt file of inputs, or random"
        raise FxlrdError(f"--calibration {text}: {one_line(error)}; {remedy}") from error
    if not isinstance(found, Tensor) or found.shape[1:] != like.shape[1:]:
        have = f"inputs of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        wanted = ", ".join(map(str, like.shape[1:]))
        raise FxlrdError(f"--calibration {text}: holds {have}, the model takes [N, {wanted}]")
    layout = torch.channels_last if like.dim() == 4 and not like.is_contiguous() else torch.contiguous_format
    return [part.to(like.device, like.dtype).contiguous(memory_format=layout) for part in found.split(batch)]


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
            raise FxlrdError(f"--channels-last: an input of shape {shape} is no image")
        x = x.contiguous(memory_format=torch.channels_last)
    return x
