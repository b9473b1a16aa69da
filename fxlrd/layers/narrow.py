"""Modules of any class that hold one value, or one row, for each channel: cut to some of the channels.

Frozen norms, norms with an activation inside, activations with parameters. What such a module computes is not known
from its class; whether it treats each channel alone is found out by running it (`fxlrd.graph.selection`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def narrowed(module: nn.Module, indices: Tensor, count: int) -> nn.Module | None:
    """Return a copy of the module for the channels ``indices`` of ``count``, or None if its tensors are not by channel.

    Tensors with a first axis of ``count`` lose the other channels; those of one value stay. Numbers equal to ``count``
    among the attributes, such as ``num_features``, become that of the indices.
    """
    new = copy.deepcopy(module)
    for m in new.modules():
        owned: list[dict[str, Any]] = [m._parameters, m._buffers]
        for tensors in owned:
            for name, tensor in tensors.items():
                if tensor is None or tensor.numel() == 1:
                    continue
                if not tensor.dim() or len(tensor) != count:
                    return None
                rows = tensor.detach()[indices].clone()
                tensors[name] = nn.Parameter(rows, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows
        for name, value in vars(m).items():
            if value in (count, (count,)) and type(value) in (int, tuple):
                setattr(m, name, len(indices) if type(value) is int else (len(indices),))
    return new


def channels_left(module: nn.Module, shapes: Mapping[str, tuple[int, ...] | None]) -> tuple[int, int] | None:
    """Return how many channels are left, and of how many, in a module `narrowed` from one with these shapes."""
    own = {**module._parameters, **module._buffers}
    now = {name: tuple(t.shape) for name, t in own.items() if t is not None}
    if now.keys() != shapes.keys():
        return None
    counts = set()
    for name, was in shapes.items():
        if was == now[name]:
            continue
        if not was or len(was) != len(now[name]) or was[1:] != now[name][1:]:
            return None
        counts.add((now[name][0], was[0]))
    return counts.pop() if len(counts) == 1 else None
