"""What save and load share: the tensors of a model by name, and a layer made from its options."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.errors import FxlrdError, one_line
from fxlrd.layers.kinds import make
from fxlrd.saving.schema import KINDS


def _slots(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer under every name that it has, those that a state_dict leaves out too."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _plain(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that are mere attributes of the module."""
    yield from ((name, value) for name, value in vars(module).items() if isinstance(value, Tensor))


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _around(name: str) -> list[str]:
    """Return the names of the modules around what has this name, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _strides(shape: list[int]) -> list[int]:
    """Return the strides of a contiguous tensor."""
    return list(torch.empty(shape, device="meta").stride())


def _dense(shape: list[int], strides: list[int]) -> bool:
    """Whether these strides give every element a place of its own and leave none free: channels_last, transposed."""
    if 0 in shape:
        return False
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _made(name: str, spec: dict[str, Any]) -> nn.Module:
    """Return the empty module, or factors, that a spec describes."""
    if "parts" in spec:
        return nn.Sequential(OrderedDict((role, _made(f"{name}.{role}", part)) for role, part in spec["parts"]))
    options = {n: tuple(v) if isinstance(v, list) else v for n, v in spec["options"].items()}
    try:
        return make(KINDS[spec["kind"]], options)
    except Exception as error:
        raise FxlrdError(f"load: {name} cannot be made: {one_line(error)}: the plan is damaged") from error
