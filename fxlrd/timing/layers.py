"""How long a layer takes in its low-rank form at some ranks, against the original layer.

A layer that is called on several inputs, such as a detector's head on each level of a pyramid, takes the time of all
these calls: a form may be fast on large inputs and slow on small ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import fx, nn

from fxlrd.errors import Reason
from fxlrd.graph.facts import tensor_meta, times
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import source
from fxlrd.layers.build import skeleton
from fxlrd.layers.forms import Ranks, ranks_text
from fxlrd.timing.cache import signature
from fxlrd.timing.clock import Timing
from fxlrd.timing.stopwatch import Stopwatch
from fxlrd.timing.workload import Workload, example, layout

ORIGINAL = "original"

SIZES = 8
"""Sizes of one layer's input that are timed, at most: of more, as of a growing cache, some stand for the others."""


@dataclass(frozen=True)
class Place:
    """A layer and an input that it sees, in ``count`` calls."""

    original: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    device: torch.device
    count: int = 1

    @property
    def signature(self) -> str:
        """What the time of one call depends on, as text."""
        return signature(self.original, self.shape, self.dtype, self.layout)

    def example(self) -> Inputs:
        """Return an input to time with."""
        return Inputs((example(self.shape, self.dtype, self.layout, self.device),))


def placed(nodes: Sequence[fx.Node], original: nn.Module) -> list[Place] | Reason:
    """Return the places of ``original``, whose calls (or first factor's) are ``nodes``, or why it cannot be timed."""
    places: list[Place] = []
    for node in nodes:
        reads = source(node)
        meta = tensor_meta(reads) if reads is not None else None
        if meta is None:
            return Reason("no-shapes", "its input's shape is not known", "give example inputs")
        device = next(original.parameters()).device
        places.append(Place(original, tuple(meta.shape), meta.dtype, layout(meta), device, times(node)))
    return _fewer(places)


def _fewer(places: Sequence[Place]) -> list[Place]:
    """Return places with the calls of all: equal ones are one, and of many sizes each stands for its neighbours."""
    counts: dict[Place, int] = {}
    for place in places:
        alone = replace(place, count=1)
        counts[alone] = counts.get(alone, 0) + place.count
    if len(counts) <= SIZES:
        return [replace(place, count=count) for place, count in counts.items()]
    ordered = sorted(counts, key=lambda place: math.prod(place.shape))
    runs = [ordered[len(ordered) * i // SIZES : len(ordered) * (i + 1) // SIZES] for i in range(SIZES)]
    return [replace(run[len(run) // 2], count=sum(counts[place] for place in run)) for run in runs]


def time_ranks(places: Sequence[Place], ranks: Sequence[Ranks], stopwatch: Stopwatch) -> dict[str, Timing]:
    """Return the time of the original (first, to which the ratios are) and of its form at each of ``ranks``.

    It is that of the calls at all ``places``.
    """
    return together([(place.count, _time_at(place, ranks, stopwatch)) for place in places])


def _time_at(place: Place, ranks: Sequence[Ranks], stopwatch: Stopwatch) -> dict[str, Timing]:
    """Return the times of one call."""
    inputs = cache(place.example)

    def workload(ranks: Ranks | None) -> Workload:
        module = place.original if ranks is None else skeleton(place.original, ranks)
        return Workload([(module, inputs())], stopwatch.under_inductor, inside=True)

    variants = {ORIGINAL: partial(workload, None)} | {ranks_text(each): partial(workload, each) for each in ranks}
    return stopwatch.times(place.signature, place.device, variants)


def together(timed: Sequence[tuple[int, Mapping[str, Timing]]]) -> dict[str, Timing]:
    """Return the times of the same variants in several settings together, each so many times."""
    first = next(iter(timed[0][1]))
    shares = [count * timings[first].seconds for count, timings in timed]
    total, result = sum(shares), {}
    for name in timed[0][1]:
        parts = [(share / total, timings[name]) for share, (_, timings) in zip(shares, timed, strict=True)]
        seconds = sum(count * timings[name].seconds for count, timings in timed)
        ratio = sum(share * timing.ratio for share, timing in parts)
        spread = sum((share * timing.spread) ** 2 for share, timing in parts) ** 0.5
        result[name] = Timing(seconds, ratio, spread)
    return result
