"""The rate that a device reaches on a large matrix multiply."""

from __future__ import annotations

from functools import partial

import torch

from fxlrd.timing.multiply import multiply
from fxlrd.timing.stopwatch import Stopwatch

_SIZES = (256, 512, 1024, 2048)
_SLOW = 0.2
"""Seconds of a multiply above which no larger one is tried: the machine has no kernels for the dtype."""


def peak_rate(dtype: torch.dtype, device: torch.device, stopwatch: Stopwatch) -> float:
    """Return the rate of the fastest of a few matrix multiplies, in FLOP/s."""
    rates: list[float] = []
    for count in range(1, len(_SIZES) + 1):
        variants = {str(size): partial(multiply, size, dtype, device) for size in _SIZES[:count]}
        timings = stopwatch.times(f"matrix multiply {str(dtype)[6:]}", device, variants)
        seconds = timings[str(_SIZES[count - 1])].seconds
        rates.append(2 * _SIZES[count - 1] ** 3 / seconds)
        if seconds > _SLOW:
            break
    return max(rates)
