"""The low-rank forms of a layer: ranks, parameters, full rank."""

from __future__ import annotations

import math

from torch import nn

from fxlrd.errors import FxlrdError, Reason
from fxlrd.layers.kinds import as_layer, channels_per_group, kernel_area, kernel_text
from fxlrd.ranks import svd_rank, tucker1_rank, tucker2_rank

Ranks = tuple[int | None, ...]
"""(R,) of an SVD pair, (r1, r2) of a Tucker-2 form (None: that mode is not cut); per group in grouped convs."""


def ranks_text(ranks: Ranks) -> str:
    """Return ranks as text, such as 204 or 309x309; a mode that is not cut is a dash."""
    return "x".join("-" if r is None else str(r) for r in ranks)


_NARROW = 16
"""Below this many channels per group a ratio that leaves no rank is a reason, not an error."""


def form(module: nn.Module) -> str:
    """Return the kind of low-rank form that suits the layer: svd or tucker2."""
    return "svd" if isinstance(module, nn.Linear) or kernel_area(module) == 1 else "tucker2"


def no_rank(groups: int) -> Reason:
    """Return the reason of a depthwise conv."""
    return Reason("depthwise", f"groups={groups}: one channel a group (depthwise) leaves no rank to cut")


def ranks_for_ratio(module: nn.Module, ratio: float, beta: float = 1.0, strict: bool = True) -> Ranks | Reason:
    """Return the ranks at which the layer's factors have 1/ratio of its parameters, or why there are none.

    Raises FxlrdError where the layer is wide enough to be cut but ``ratio`` leaves it less than rank 1, unless it
    is not to be ``strict``.
    """
    c_in, c_out, groups = channels_per_group(module)
    if groups > 1 and min(c_in, c_out) == 1:
        return no_rank(groups)
    where = f"{groups} groups of {c_in}→{c_out}" if groups > 1 else f"{c_in}→{c_out}"
    ranks: Ranks
    if form(module) == "svd":
        ranks = (svd_rank(c_in, c_out, ratio),)
    else:
        kernel = as_layer(module).weight.shape[2:]
        r1 = tucker2_rank(c_in, c_out, kernel, ratio, beta)
        ranks = (r1, math.floor(beta * r1))
        if ranks[0] >= c_in and ranks[1] < c_out:
            ranks = (None, tucker1_rank(c_in, c_out, kernel, ratio))
        elif ranks[1] >= c_out and ranks[0] < c_in:
            ranks = (tucker1_rank(c_out, c_in, kernel, ratio), None)
    if min(r for r in ranks if r is not None) < 1:
        if min(c_in, c_out) < _NARROW or not strict:
            return Reason("too-narrow", f"{where} is too narrow: ratio={ratio:g} leaves no rank")
        raise FxlrdError(
            f"ratio={ratio:g} leaves less than rank 1 for {where}, kernel {kernel_text(module)}: use a ratio of at "
            f"most {_largest_ratio(module, beta):.3g}, or skip the layer"
        )
    if parameters(module, ranks) >= as_layer(module).weight.numel():
        return Reason("no-saving", f"{where}: no rank at ratio={ratio:g} saves parameters")
    return ranks


def _largest_ratio(module: nn.Module, beta: float) -> float:
    c_in, c_out, groups = channels_per_group(module)
    if form(module) == "svd":
        least: float = c_in + c_out
    else:
        r1 = max(1, math.ceil(1 / beta))
        least = r1 * (beta * kernel_area(module) * r1 + c_in + beta * c_out)
    largest = as_layer(module).weight.numel() / groups / least
    digits = 10.0 ** (2 - math.floor(math.log10(largest)))
    return math.floor(largest * digits) / digits  # rounded down, so that it is within reach as printed


def explicit_ranks(module: nn.Module, ranks: int | Ranks) -> Ranks:
    """Return the ranks a user asked for as this layer's form takes them, clipped to full rank.

    An int serves both modes of a Tucker-2 form. Raises FxlrdError for a rank under 1 or a wrong number of them.
    """
    full = full_ranks(module)
    given = tuple(ranks) if isinstance(ranks, (tuple, list)) else (ranks,) * len(full)
    if len(given) != len(full):
        raise FxlrdError(f"ranks={ranks}: a {form(module)} form takes {len(full)}, got {len(given)}")
    whole = [r for r in given if r is not None]
    if not whole or any(not isinstance(r, int) or isinstance(r, bool) or r < 1 for r in whole):
        raise FxlrdError(f"ranks={ranks}: a rank is a whole number of at least 1")
    return tuple(None if r is None or top is None else min(r, top) for r, top in zip(given, full, strict=True))


def parameters(module: nn.Module, ranks: Ranks) -> int:
    """Return the number of weight parameters of the layer's form at ``ranks``, bias not counted."""
    c_in, c_out, groups = channels_per_group(module)
    if form(module) == "svd":
        (r,) = ranks
        assert r is not None
        return groups * r * (c_in + c_out)
    r1, r2 = ranks
    core = (r1 or c_in) * (r2 or c_out) * kernel_area(module)
    return groups * (core + (c_in * r1 if r1 else 0) + (c_out * r2 if r2 else 0))


def full_ranks(module: nn.Module) -> Ranks:
    """Return the ranks at which the layer's form loses nothing."""
    c_in, c_out, _ = channels_per_group(module)
    return (min(c_in, c_out),) if form(module) == "svd" else (c_in, c_out)
