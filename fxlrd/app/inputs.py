"""Inputs for a model: random ones, and those of a file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxlrd.errors import FxlrdError, one_line

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def calibration_for(text: str, batch: int, like: Tensor) -> list[Tensor]:
    """Return calibration batches: ``random``, or those of a file of inputs (.npy, or .pt with one tensor).

    ``random`` is seeded noise of the shape of ``like``, or the tokens of each of its rows in another order: enough to
    judge speed, not accuracy. Batches have the size, dtype and device of ``like``. Raises FxlrdError for an unreadable
    file, and for inputs of another shape.
    """
    if text == "random":
        generator = torch.Generator().manual_seed(1)
        if not like.is_floating_point():  # tokens
            orders = [torch.randperm(like.shape[-1], generator=generator) for _ in range(4)]
            return [like[..., order.to(like.device)] for order in orders]
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
        remedy = "give a .npy or .pt file of inputs, a folder of examples, or random"
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
