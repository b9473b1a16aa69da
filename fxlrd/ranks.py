"""Ranks from a compression ratio.

Notation of the paper: C input channels, S output channels, k×k kernel, α compression ratio (parameters of
the original layer over parameters of its factors), β = r2 / r1.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

from fxlrd.errors import FxlrdError


def check_ratio(ratio: float) -> None:
    """Raise FxlrdError unless ``ratio`` is a finite number above 1."""
    if not isinstance(ratio, numbers.Real) or not math.isfinite(ratio) or ratio <= 1:
        raise FxlrdError(f"ratio={ratio!r}: a compression ratio is a finite number above 1, such as 2")


def svd_rank(c_in: int, c_out: int, ratio: float) -> int:
    """Return R = ⌊C·S / (α·(C+S))⌋, the rank at which a factor pair has 1/α of the parameters.

    >>> svd_rank(512, 1000, ratio=2)
    169

    Returns 0 if the ratio is out of the layer's reach. Raises FxlrdError for a ratio that is not a finite number
    above 1.
    """
    check_ratio(ratio)
    return math.floor(c_in * c_out / (ratio * (c_in + c_out)))


def tucker2_rank(c_in: int, c_out: int, kernel_size: int | Sequence[int], ratio: float, beta: float = 1.0) -> int:
    """Return r1 of the paper's eq. (7), floored; r2 is β·r1.

    >>> tucker2_rank(512, 512, 3, ratio=2)
    309

    Positive root of β·k²·r1² + (C + β·S)·r1 = C·S·k²/α, whose left side counts the parameters of the three
    factors. ``kernel_size`` is k of a square kernel, or the size along each dimension, whose product replaces k². The
    rank is not clipped to C or S: that of a thin layer may exceed its channel count. Raises FxlrdError for a ratio
    that is not a finite number above 1 or a β that is not above 0.
    """
    check_ratio(ratio)
    if not isinstance(beta, (int, float)) or not 0 < beta < math.inf:
        raise FxlrdError(f"beta={beta}: the ratio r2/r1 is a finite number above 0")
    area = _area(kernel_size)
    b = (c_in + beta * c_out) / (beta * area)
    rank = math.floor((-b + math.sqrt(b * b + 4 * c_in * c_out / (beta * ratio))) / 2)
    # The root is rounded: where it is a whole number, its floor may be one off.
    above = rank + 1
    return above if ratio * above * (beta * area * above + c_in + beta * c_out) <= c_in * c_out * area else rank


def tucker1_rank(c_kept: int, c_cut: int, kernel_size: int | Sequence[int], ratio: float) -> int:
    """Return the rank of the one-sided form, where only the mode with ``c_cut`` channels is cut.

    Solves c_cut·r + k²·r·c_kept = c_cut·c_kept·k²/α, floored. Tucker-2 reduces to this form where eq. (7) exceeds
    the other mode's channels.
    """
    check_ratio(ratio)
    area = _area(kernel_size)
    return math.floor(c_cut * c_kept * area / (ratio * (c_cut + area * c_kept)))


def _area(kernel_size: int | Sequence[int]) -> int:
    return kernel_size**2 if isinstance(kernel_size, int) else math.prod(kernel_size)
