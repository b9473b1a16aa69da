"""The tensors of a model by name, and their strides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def registered(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer under each of its names, also those that a state_dict leaves out."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that are plain attributes of modules, no parameters or buffers, by name."""
    for name, module in model.named_modules():
        yield from ((joined(name, key), value) for key, value in vars(module).items() if isinstance(value, Tensor))


def joined(module: str, name: str) -> str:
    """Return the name in the model of what a module has under ``name``."""
    return f"{module}.{name}" if module else name


def parents(name: str) -> list[str]:
    """Return the names of the modules that hold what has this name, the outermost first, without the model's."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return torch.empty(tuple(shape), device="meta").stride()


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the strides give every element one place of its own and leave no gap: channels_last, transposed."""
    if 0 in shape:
        return False
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
