"""How long the core of a Tucker-2 form takes as a grouped conv of N branches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import fx

from fxlrd.errors import Reason
from fxlrd.graph.inputs import Inputs
from fxlrd.layers.kinds import Conv, channel_axis
from fxlrd.layers.weights import from_blocks, resized
from fxlrd.timing.clock import Timing
from fxlrd.timing.layers import Place, placed, together
from fxlrd.timing.stopwatch import Stopwatch
from fxlrd.timing.workload import Workload, example


def time_branches(
    nodes: Sequence[fx.Node], core: Conv, branches: Sequence[int], stopwatch: Stopwatch
) -> dict[str, Timing] | Reason:
    """Time the core, whose calls are ``nodes``, at each number of branches, or return why it cannot be timed.

    Ratios are to the first of ``branches``. Ranks that are no multiples of a number of branches are rounded down.
    Weights are arbitrary.
    """
    places = placed(nodes, core)
    if isinstance(places, Reason):
        return places
    return together([(place.count, _time_at(place, core, branches, stopwatch)) for place in places])


def _time_at(place: Place, core: Conv, branches: Sequence[int], stopwatch: Stopwatch) -> dict[str, Timing]:
    """Return the times of one call."""

    def workload(count: int) -> Workload:
        shape, weight = list(place.shape), core.weight
        makes, reads = core.out_channels // count, core.in_channels // count
        shape[channel_axis(core, len(shape))] = reads * count
        x = example(tuple(shape), place.dtype, place.layout, place.device)
        blocks = torch.full((count, makes, reads, *weight.shape[2:]), 1e-2, dtype=weight.dtype, device=weight.device)
        module = resized(core, from_blocks(core, blocks), None, groups=count)
        return Workload([(module, Inputs((x,)))], stopwatch.under_inductor, inside=True)

    variants = {str(count): partial(workload, count) for count in branches}
    return stopwatch.times(f"branches: {place.signature}", place.device, variants)
