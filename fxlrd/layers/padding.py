"""Padding that a module does itself before it convolves, as operations that hold for every size of the input.

Both kinds run on tensors and, to put them into a graph, on proxies of torch.fx.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class FixedPadding:
    """Padding by the same numbers whatever the input's size, as of a causal conv.

    Attributes:
        pads: the numbers before and after, for the last axis first, as `torch.nn.functional.pad` takes them.
        mode: constant, reflect, replicate or circular.
        value: what constant padding pads with.
    """

    pads: tuple[int, ...]
    mode: str = "constant"
    value: float = 0.0

    def apply(self, x: Any) -> Any:
        """Return the padded input."""
        if self.mode == "constant":
            return F.pad(x, self.pads, self.mode, self.value)
        return F.pad(x, self.pads, self.mode)


@dataclass(frozen=True)
class SamePadding:
    """TensorFlow's "same" padding: the output has ⌈size / stride⌉ positions, the odd zero comes last.

    Attributes:
        extents: d·(k − 1) + 1 for kernel size k and dilation d, along each axis.
        strides: those of the kernel.
    """

    extents: tuple[int, ...]
    strides: tuple[int, ...]

    def apply(self, x: Any) -> Any:
        """Return the padded input: by max((⌈n/s⌉ − 1)·s + extent − n, 0) along an axis of n."""
        pads: list[Any] = []
        for axis in range(-1, -len(self.extents) - 1, -1):
            size, stride = x.size(axis), self.strides[axis]
            total = torch.sym_max((size - 1) // stride * stride + self.extents[axis] - size, 0)
            before = total // 2
            pads += [before, total - before]
        return F.pad(x, pads)


Padding = FixedPadding | SamePadding
