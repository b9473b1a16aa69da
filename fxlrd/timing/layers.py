"""How long a layer takes in its low-rank form at some ranks, against the original layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import fx, nn

from fxlrd.errors import Reason
from fxlrd.graph.facts import tensor_meta
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import source
from fxlrd.layers.build import skeleton
from fxlrd.layers.forms import Ranks, ranks_text
from fxlrd.timing.cache import signature
from fxlrd.timing.clock import Timing
from fxlrd.timing.stopwatch import Stopwatch
from fxlrd.timing.workload import Workload, example, layout

ORIGINAL = "original"


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
    reads = source(node)
    meta = tensor_meta(reads) if reads is not None else None
    if meta is None:
        return Reason("no-shapes", "its input's shape is not known", "give example inputs")
    return Place(original, tuple(meta.shape), meta.dtype, layout(meta), next(original.parameters()).device)


def time_ranks(place: Place, ranks: Sequence[Ranks], stopwatch: Stopwatch) -> dict[str, Timing]:
    """Return the time of the original (first, to which the ratios are) and of its form at each of ``ranks``."""

    @cache
    def inputs() -> Inputs:
        return Inputs((example(place.shape, place.dtype, place.layout, place.device),))

    def workload(ranks: Ranks | None) -> Workload:
        module = place.original if ranks is None else skeleton(place.original, ranks)
        return Workload([(module, inputs())], stopwatch.under_inductor, inside=True)

    variants = {ORIGINAL: partial(workload, None)} | {ranks_text(each): partial(workload, each) for each in ranks}
    return stopwatch.times(place.signature, place.device, variants)
