"""How the tensors of two modules differ, in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def compare_weights(before: Any, after: Any) -> list[tuple[str, str]]:
    """Return a kind of change (changed, values, trainable) and words for each tensor that differs.

    ``before`` and ``after`` are two modules of one configuration, or two tensors.
    """
    sides = [_tensors(before), _tensors(after)]
    if sides[0].keys() != sides[1].keys():
        names = sorted(sides[0].keys() ^ sides[1].keys())
        return [("changed", f"only one side has {', '.join(names)}")]
    values, trains = [], []
    for name, x in sides[0].items():
        y = sides[1][name]
        if (text := _difference(x, y)) is not None:
            values.append(("values", f"{name} {text}".strip()))
        if x.requires_grad != y.requires_grad:
            trains.append(("trainable", f"{name} {'trains' if y.requires_grad else 'is frozen'}".strip()))
    return [*values, *trains]


def _tensors(owner: Any) -> dict[str, Tensor]:
    if isinstance(owner, Tensor):
        return {"": owner}
    if not isinstance(owner, nn.Module):
        return {}
    return {**dict(owner.named_parameters()), **dict(owner.named_buffers())}


def _difference(x: Tensor, y: Tensor) -> str | None:
    """Return in words how two tensors differ, None where they do not."""
    if x is y:
        return None
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{str(x.dtype)[6:]}{list(x.shape)} → {str(y.dtype)[6:]}{list(y.shape)}"
    if x.is_meta or y.is_meta:
        return None
    x, y = x.detach(), y.detach().to(x.device)
    if x.layout != y.layout:
        return f"{str(x.layout)[6:]} → {str(y.layout)[6:]}"
    if x.layout != torch.strided:
        x, y = x.to_dense(), y.to_dense()
    if torch.equal(x, y):
        return None
    if not (x.is_floating_point() or x.is_complex()):
        return "is another"
    wide = torch.complex128 if x.is_complex() else torch.float64
    x, y = x.to(wide), y.to(wide)
    same = (x == y) | (x.isnan() & y.isnan())
    if bool(same.all()):
        return None
    if not x.count_nonzero():
        return "was zero"
    gap = torch.where(same, torch.zeros_like(x), y - x).norm().item() / x.norm().item()
    return f"moved by {gap:.2g}"
