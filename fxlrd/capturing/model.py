"""A model as a graph: whole or, where it cannot be traced as a whole, in regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx, nn

from fxlrd.capturing.regions import capture_regions
from fxlrd.capturing.whole import capture
from fxlrd.errors import CaptureError
from fxlrd.graph import cost
from fxlrd.graph.captured import Regions, Whole, captured, warn
from fxlrd.graph.cost import Cost
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.run import counted
from fxlrd.graph.surgery import layers


def capture_any(
    model: nn.Module,
    inputs: Inputs,
    weight_shapes: Mapping[str, tuple[int, ...]] | None = None,
    complete: bool = False,
) -> fx.GraphModule:
    """Return the model as a graph or, where it cannot be traced as a whole, its regions.

    ``weight_shapes`` are those of a model that was already compressed, before that, by module name. ``complete`` says
    that the result will be the model itself, with what no node of the graph stands for: its cost then counts.
    """
    gm = _captured(model, inputs)
    record = captured(gm)
    assert record is not None
    if complete and isinstance(record, Whole):
        record = replace(record, outside=_outside(model, gm, inputs))
    captured.record(gm, replace(record, weight_shapes=dict(weight_shapes or {})))
    return gm


def _outside(model: nn.Module, gm: fx.GraphModule, inputs: Inputs) -> Cost:
    """Return the cost of what the model has and the graph has not: layers never called, or whose output is not used."""
    _, flops = counted(model, inputs)
    return Cost(cost.params(model) - cost.params(gm), max(0, flops - cost.flops(gm)))


def _captured(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    try:
        return capture(model, inputs)
    except CaptureError as error:
        why = str(error).split(";")[0]
        try:
            gm = capture_regions(model, inputs)
        except CaptureError as none:
            raise CaptureError(f"{why}; {none}") from error
        regions = captured(gm)
        assert isinstance(regions, Regions)
        names = {slot.name for slot in regions.slots}
        single = len(names & set(layers(gm)))
        warn(
            gm, f"taken as {len(names)} regions ({single} of them single layers), as the whole is not traceable: {why}"
        )
        return gm
