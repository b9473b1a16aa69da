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


def form(module: nn.Module) -> str:
    """Return the kind of low-rank form that suits the layer: svd or tucker2."""
    return "svd" if isinstance(module, nn.Linear) or kernel_area(module) == 1 else "tucker2"


def depthwise_reason(module: nn.Module) -> Reason | None:
    """Return why a depthwise conv has no low-rank form; None for every other layer."""
    c_in, c_out, groups = channels_per_group(module)
    if groups == 1 or min(c_in, c_out) > 1:
        return None
    return Reason("depthwise", f"groups={groups}: one channel a group (depthwise) leaves no rank to cut")


_NARROW = 16
"""Channels per group below which a ratio is bound to leave some layers no rank."""


def ranks_by_ratio(module: nn.Module, ratio: float, beta: float = 1.0) -> Ranks | Reason:
    """Return the ranks at which the layer's factors have 1/ratio of its parameters, or why there are none.

    ``beta`` is r2/r1 of a Tucker-2 form. Where only one mode of it would be cut, that mode's rank is of a Tucker-1
    form. The reason is "too-narrow" for a layer of few channels per group, and "ratio-too-large" for a wider one,
    with the largest ratio that leaves it rank 1.
    """
    if (reason := depthwise_reason(module)) is not None:
        return reason
    ranks = _svd_ranks(module, ratio) if form(module) == "svd" else _tucker_ranks(module, ratio, beta)
    c_in, c_out, groups = channels_per_group(module)
    size = f"{groups} groups of {c_in}→{c_out}" if groups > 1 else f"{c_in}→{c_out}"
    if min(r for r in ranks if r is not None) < 1:
        if min(c_in, c_out) < _NARROW:
            return Reason("too-narrow", f"{size} is too narrow: ratio={ratio:g} leaves no rank")
        text = f"ratio={ratio:g} leaves less than rank 1 for {size}, kernel {kernel_text(module)}"
        remedy = f"use a ratio of at most {_largest_ratio(module, beta):.3g}, or skip the layer"
        return Reason("ratio-too-large", text, remedy)
    if parameters(module, ranks) >= as_layer(module).weight.numel():
        return Reason("no-saving", f"{size}: no rank at ratio={ratio:g} saves parameters")
    return ranks


def _svd_ranks(module: nn.Module, ratio: float) -> Ranks:
    c_in, c_out, _ = channels_per_group(module)
    return (svd_rank(c_in, c_out, ratio),)


def _tucker_ranks(module: nn.Module, ratio: float, beta: float) -> Ranks:
    c_in, c_out, _ = channels_per_group(module)
    kernel = as_layer(module).weight.shape[2:]
    r1 = tucker2_rank(c_in, c_out, kernel, ratio, beta)
    r2 = math.floor(beta * r1)
    if r1 >= c_in and r2 < c_out:
        return (None, tucker1_rank(c_in, c_out, kernel, ratio))
    if r2 >= c_out and r1 < c_in:
        return (tucker1_rank(c_out, c_in, kernel, ratio), None)
    return (r1, r2)


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
    modes = tuple(ranks) if isinstance(ranks, (tuple, list)) else (ranks,) * len(full)
    if len(modes) != len(full):
        raise FxlrdError(f"ranks={ranks}: a {form(module)} form takes {len(full)}, got {len(modes)}")
    cut = [r for r in modes if r is not None]
    if not cut or any(not isinstance(r, int) or isinstance(r, bool) or r < 1 for r in cut):
        raise FxlrdError(f"ranks={ranks}: a rank is a whole number of at least 1")
    return tuple(None if r is None or top is None else min(r, top) for r, top in zip(modes, full, strict=True))


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
