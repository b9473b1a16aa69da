"""What a kernel sees of its input."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fxlrd.layers.kinds import Conv, spatial_dims


def spread(count: int, most: int) -> int:
    """Return the step at which about ``most`` of ``count`` positions are taken."""
    return max(1, count // most) | 1  # odd: no column of an even image is always missed


def patches(conv: Conv, x: Tensor, most: int | None = None) -> Tensor:
    """Return what the kernel sees of ``x`` at each position, as rows (…, C·K), channel-major, in float64.

    ``conv`` is none that is transposed. Of positions beyond ``most``, about so many are taken, evenly spread.
    """
    dims = spatial_dims(conv)
    around: list[int] = []
    spans = [dilation * (size - 1) for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
    for span, pad in reversed(list(zip(spans, _padding(conv), strict=True))):
        total = span if pad is None else 2 * pad
        around += [total // 2, total - total // 2]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad((x if x.dim() == dims + 2 else x[None]).detach(), around, mode=mode)
    for i, (span, stride, dilation) in enumerate(zip(spans, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + i, span + 1, stride)[..., ::dilation]
    windows = x.movedim(1, 1 + dims)  # N, positions…, C, k…: a view yet
    count = math.prod(windows.shape[: 1 + dims])
    at = torch.arange(0, count, 1 if most is None else spread(count, most), device=x.device)
    return windows[torch.unravel_index(at, windows.shape[: 1 + dims])].flatten(1).double()


def _padding(conv: Conv) -> tuple[int | None, ...]:
    """Return the padding on either side of each dimension; None where it is to keep the size."""
    if isinstance(conv.padding, str):
        return ((None if conv.padding == "same" else 0),) * spatial_dims(conv)
    return conv.padding
