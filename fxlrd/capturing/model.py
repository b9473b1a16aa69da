"""A model as a graph: whole or, where it cannot be traced as a whole, in regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx, nn

from fxlrd.capturing.proof import Original
from fxlrd.capturing.regions import capture_regions_of
from fxlrd.capturing.whole import capture_whole, original_of
from fxlrd.errors import CaptureError, FxlrdError
from fxlrd.graph import cost
from fxlrd.graph.captured import Regions, Whole, captured, warn
from fxlrd.graph.cost import Cost
from fxlrd.graph.fast_paths import TRANSFORMERS
from fxlrd.graph.guards import hooked
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import called, layers


def capture_any(
    model: nn.Module,
    inputs: Inputs,
    weight_shapes: Mapping[str, tuple[int, ...]] | None = None,
    complete: bool = False,
) -> fx.GraphModule:
    """Return the model as a graph or, where it cannot be captured as a whole, its regions.

    ``weight_shapes`` are those of a model that was already compressed, before that, by module name. ``complete`` says
    that the result will be the model itself, with what no node of the graph stands for: its cost then counts.
    """
    original = original_of(model, inputs)
    if complete and original.changed_weight is not None:
        raise FxlrdError(
            f"inplace: calling the {type(model).__name__} changes its weight {original.changed_weight}, also in eval "
            "mode; use inplace=False"
        )
    try:
        gm = capture_whole(original, for_users_forward=complete)
    except CaptureError as error:
        gm = _regions(original, str(error).split(";")[0])
    else:
        gm = _opened(original, gm)
    record = captured(gm)
    assert record is not None
    if complete and isinstance(record, Whole):
        # Layers that are never called, or whose output is not used.
        params = cost.params(gm) + record.added_params(gm)
        outside = Cost(cost.params(model) - params, max(0, original.flops - cost.flops(gm)))
        record = replace(record, outside=outside)
    captured.record(gm, replace(record, weight_shapes=dict(weight_shapes or {})))
    return gm


def _opened(original: Original, gm: fx.GraphModule) -> fx.GraphModule:
    """Return the regions of a model whose graph calls a transformer of torch's as one module, with layers inside."""
    closed = next((name for name, m in called(gm).items() if isinstance(m, TRANSFORMERS) and not hooked(m)), None)
    if closed is None:
        return gm
    kind = type(gm.get_submodule(closed)).__name__
    try:
        return _regions(original, f"the layers inside {closed} ({kind}) would be no part of the graph")
    except CaptureError:
        return gm


def _regions(original: Original, why: str) -> fx.GraphModule:
    """Return the regions of a model that, for the reason ``why``, is not captured as a whole."""
    try:
        gm = capture_regions_of(original)
    except CaptureError as error:
        raise CaptureError(f"{why}; {error}") from error
    regions = captured(gm)
    assert isinstance(regions, Regions)
    names = {slot.name for slot in regions.slots}
    single = len(names & set(layers(gm)))
    warn(
        gm,
        f"taken as {len(names)} regions ({single} of them single layers), as it cannot be captured as a whole: {why}",
    )
    return gm
