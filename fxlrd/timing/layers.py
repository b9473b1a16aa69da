"""How long a layer takes in its low-rank form, rank by rank, against the original layer; with the timing cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxlrd.errors import Reason
from fxlrd.graph.facts import tensor_meta
from fxlrd.graph.run import evaluating
from fxlrd.graph.surgery import source
from fxlrd.layers.build import skeleton
from fxlrd.layers.forms import Ranks, ranks_text
from fxlrd.timing.cache import Cache, Setting, example, layout, signature
from fxlrd.timing.clock import Timing, compare
from fxlrd.timing.inductor import compiled

ORIGINAL = "original"
_GROUP = 8


@dataclass(frozen=True)
class Place:
    """A layer and the input that it sees."""

    original: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    device: torch.device

    @property
    def signature(self) -> str:
        """What the layer's time depends on, as text."""
        return signature(self.original, self.shape, self.dtype, self.layout)


def placed(node: fx.Node, original: nn.Module) -> Place | Reason:
    """Return the place of ``original``, whose call (or first factor's) is ``node``, or why it cannot be timed."""
    given = source(node)
    meta = tensor_meta(given) if given is not None else None
    if not isinstance(meta, TensorMetadata):
        return Reason("no-shapes", "its input's shape is not known", "give example inputs")
    return Place(original, tuple(meta.shape), meta.dtype, layout(meta), next(original.parameters()).device)


def time_ranks(
    where: Place, ranks: Sequence[Ranks], under_inductor: bool, seconds: float, cached: bool, known: dict[str, Timing]
) -> dict[str, Timing]:
    """Return the time of the original (first, to which the ratios are) and of the form at each of ``ranks``.

    What ``known`` or, if ``cached``, the timing cache holds is not timed; both are brought up to date.
    """
    setting = Setting.here(where.device, under_inductor)
    cache = Cache() if cached else None
    if cache is not None and not known:
        known.update(cache.load(setting, where.signature))
    if ORIGINAL not in known:  # what the others' ratios are to
        known.clear()
    missing = [r for r in ranks if ranks_text(r) not in known]
    groups = [missing[start : start + _GROUP] for start in range(0, len(missing), _GROUP)]
    if ORIGINAL not in known and not groups:
        groups = [[]]  # no form to time, but the original
    for group in groups:
        found = _time(where, group, under_inductor, seconds)
        known.update({k: t for k, t in found.items() if k != ORIGINAL or k not in known})
        if cache is not None:
            cache.store(setting, where.signature, known)
    return {key: known[key] for key in [ORIGINAL, *map(ranks_text, ranks)]}


def _time(where: Place, group: Sequence[Ranks], under_inductor: bool, seconds: float) -> dict[str, Timing]:
    x = example(where.shape, where.dtype, where.layout, where.device)
    variants = {ORIGINAL: where.original} | {ranks_text(r): skeleton(where.original, r) for r in group}
    # The original is the user's own module: its mode comes back.
    with torch.no_grad(), evaluating(nn.ModuleList(variants.values())):
        calls = {key: _call(m, x, under_inductor) for key, m in variants.items()}
        return compare(calls, where.device, seconds=seconds)


def _call(module: nn.Module, x: Tensor, under_inductor: bool) -> Callable[[], object]:
    called = compiled(nn.Sequential(module)) if under_inductor else module
    return lambda: called(x)
