"""Layers of which calibration has seen too little to fit them well."""

from __future__ import annotations

import math

from torch import fx

from fxlrd.graph.layer import statistics_of
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.kinds import channels_per_group

_NAMED = 3
"""Layers that are named, at most."""


def scarcity(gm: fx.GraphModule, inputs: int) -> str | None:
    """Return a warning that names the layers whose inputs were measured at fewer positions than they have channels.

    ``inputs`` is the number of calibration inputs; the warning says how many would give each layer as many positions.
    """
    few: list[tuple[float, str, int, int]] = []
    for name, module in layers(gm).items():
        measured = statistics_of(calls(gm, name))
        channels, moments = channels_per_group(module)[0], measured and measured.input_moments
        if moments and 0 < moments.count < channels:
            few.append((channels / moments.count, name, moments.count, channels))
    if not few:
        return None
    few.sort(reverse=True)
    named = ", ".join(f"{name} ({count} of {channels})" for _, name, count, channels in few[:_NAMED])
    more = f" and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
    verb = "has" if len(few) == 1 else "have"
    return (
        f"{named}{more} {verb} been measured at fewer positions than there are channels: what is fitted to them is "
        f"uncertain; {math.ceil(inputs * few[0][0])} inputs would do"
    )
