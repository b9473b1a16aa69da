"""Inputs held out of a fit, to judge it by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxlrd.calibration.batches import EVERY
from fxlrd.errors import VerificationError
from fxlrd.graph.captured import positional, runnable
from fxlrd.graph.compare import difference
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating, run
from fxlrd.graph.surgery import fork

_KEPT = "fxlrd.held"
_REFERENCE = "fxlrd.reference"


@dataclass(frozen=True)
class Held:
    """Inputs that no fit has seen, with the outputs that the original model gives for them."""

    inputs: tuple[Inputs, ...]
    outputs: tuple[list[Tensor], ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return self

    def error(self, gm: fx.GraphModule) -> float:
        """Return ‖outputs − original outputs‖ / ‖original outputs‖ of a graph over all held-out inputs.

        Outputs of whole numbers, such as classes, have no part in it. Infinite where outputs are not finite any more.
        """
        found = (t for inputs in self.inputs for t in outputs(gm, inputs))
        wanted = (t for each in self.outputs for t in each)
        a, b = ([t for t in each if t.is_floating_point() or t.is_complex()] for each in (found, wanted))
        try:
            return difference(a, b, "held-out calibration inputs").relative
        except VerificationError:  # NaN or Inf where the original's are finite
            return math.inf


def outputs(gm: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    """Return the output tensors in eval mode, without gradients: of the model, also where the graph is of regions."""
    model = runnable(gm)
    if model is not gm:
        return tensors(run(model, inputs))
    with evaluating(gm), torch.no_grad():
        return tensors(gm(*positional(gm, inputs)))


def hold(gm: fx.GraphModule, inputs: list[Inputs] | None) -> None:
    """Keep on the graph module inputs that a fit must not see, what it gives for them now, and what it is now.

    None: no inputs were to be held out. An empty list: they were too few for that.
    """
    gm.meta[_REFERENCE] = fork(gm)
    gm.meta.pop(_KEPT, None)
    if inputs is not None:
        gm.meta[_KEPT] = Held(tuple(inputs), tuple(outputs(gm, each) for each in inputs))


def reference(gm: fx.GraphModule) -> fx.GraphModule | None:
    """Return the graph as it was when it was calibrated, if it was."""
    found = gm.meta.get(_REFERENCE)
    return found if isinstance(found, fx.GraphModule) else None


def held(gm: fx.GraphModule) -> Held | None:
    """Return what was held out of the fit, if anything was."""
    found = gm.meta.get(_KEPT)
    return found if isinstance(found, Held) and found.inputs else None


TOO_FEW = f"too few calibration inputs to hold some out, to judge it by: give {EVERY} batches, or {EVERY} inputs in one"


def too_few(gm: fx.GraphModule) -> bool:
    """Whether inputs were to be held out, but were too few for it."""
    found = gm.meta.get(_KEPT)
    return isinstance(found, Held) and not found.inputs


def let_go(gm: fx.GraphModule) -> None:
    """Forget the inputs held out and the graph that was calibrated."""
    gm.meta.pop(_KEPT, None)
    gm.meta.pop(_REFERENCE, None)
