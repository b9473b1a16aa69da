"""The patches of its input that a kernel is applied to."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxlrd.layers.kinds import Conv, spatial_dims


def stride_for(count: int, most: int) -> int:
    """Return the stride that samples about ``most`` of ``count`` positions."""
    return max(1, count // most) | 1  # odd, so that no column of an even image is never sampled


def patches(conv: Conv, x: Tensor, most: int | None = None) -> Tensor:
    """Return the patch of ``x`` at each position of the kernel, as rows (positions, C·K), channel-major, in float64.

    ``conv`` is not transposed. Of more than ``most`` positions, about that many are sampled, evenly strided.
    """
    dims = spatial_dims(conv)
    pads: list[int] = []
    spans = [dilation * (size - 1) for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
    for span, pad in reversed(list(zip(spans, _padding(conv), strict=True))):
        total = span if pad is None else 2 * pad
        pads += [total // 2, total - total // 2]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad((x if x.dim() == dims + 2 else x[None]).detach(), pads, mode=mode)
    windows = x
    for i, (span, stride, dilation) in enumerate(zip(spans, conv.stride, conv.dilation, strict=True)):
        windows = windows.unfold(2 + i, span + 1, stride)[..., ::dilation]
    windows = windows.movedim(1, 1 + dims)  # N, positions…, C, k…: still a view
    count = math.prod(windows.shape[: 1 + dims])
    every = 1 if most is None else stride_for(count, most)
    if every == 1 and isinstance(conv, nn.Conv2d):
        return _by_entry(F.unfold(x, conv.kernel_size, conv.dilation, stride=conv.stride))
    sampled = torch.arange(0, count, every, device=x.device)
    return windows[torch.unravel_index(sampled, windows.shape[: 1 + dims])].flatten(1).double()


def _by_entry(columns: Tensor) -> Tensor:
    """Return columns (N, C·K, positions) as rows in float64: a view of what is stored by C·K, which takes no gather."""
    count, width, positions = columns.shape
    stored = columns.new_empty((width, count, positions), dtype=torch.float64)
    return stored.copy_(columns.movedim(1, 0)).flatten(1).mT


def _padding(conv: Conv) -> tuple[int | None, ...]:
    """Return the padding on either side of each dimension; None where it keeps the size."""
    if isinstance(conv.padding, str):
        return ((None if conv.padding == "same" else 0),) * spatial_dims(conv)
    return conv.padding
