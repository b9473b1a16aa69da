"""A model as a graph: whole or, where it cannot be traced as a whole, in regions."""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from fxlrd.capturing.regions import capture_regions
from fxlrd.capturing.whole import capture
from fxlrd.errors import CaptureError
from fxlrd.graph.captured import captured
from fxlrd.graph.facts import KEY
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import layers


def _capture(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Return the model as a graph or, where it cannot be traced as a whole, its regions."""
    try:
        return capture(model, inputs)
    except CaptureError as error:
        why = str(error).split(";")[0]
        try:
            gm = capture_regions(model, inputs)
        except CaptureError as none:
            raise CaptureError(f"{why}; {none}") from error
        known = captured(gm)
        assert known is not None
        assert known.around is not None
        names = {slot.name for slot in known.around.slots}
        single = len(names & set(layers(gm)))
        text = f"taken as {len(names)} regions ({single} of them single layers), as the whole is not traceable: {why}"
        gm.meta[KEY] = replace(known, warnings=(text, *known.warnings))
        return gm
