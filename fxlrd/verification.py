"""Comparing a graph's outputs after each pass with those before it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, fx

from fxlrd.errors import VerificationError
from fxlrd.graph.captured import propagate
from fxlrd.graph.compare import difference, rounding_of_kernels
from fxlrd.graph.inputs import Inputs
from fxlrd.passes.contract import Pass, PassResult
from fxlrd.passes.driver import label


@dataclass(frozen=True)
class Errors:
    """How far the outputs have moved on the example inputs; None where nothing was compared.

    ``max_abs`` and ``relative`` are against the outputs before the first pass, ``step`` (relative) against those before
    the last one.
    """

    max_abs: float | None = None
    relative: float | None = None
    step: float | None = None


class Verification:
    """The outputs on the example inputs before the first pass and after the last one.

    Without ``inputs`` no graph is run; without ``verify`` graphs are run for their shapes and FLOPs only.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Inputs | None, verify: bool) -> None:
        self.inputs = inputs
        self.verify = verify and inputs is not None
        self.reference = self.outputs = propagate(gm, inputs) if inputs is not None else []
        self.errors = Errors(0.0, 0.0, 0.0) if self.verify else Errors()

    def after(self, step: Pass, result: PassResult) -> Errors:
        """Run the graph of a pass's result, and return how far its outputs have moved.

        Raises VerificationError if an exact pass moved the outputs beyond rounding, or any pass changed their number,
        shapes or dtypes.
        """
        if result.modified and self.inputs is not None:
            outputs = propagate(result.graph_module, self.inputs)
            if self.verify:
                self.errors = self._compared(step, result, outputs)
            self.outputs = outputs
        elif self.verify:
            self.errors = replace(self.errors, step=0.0)
        return self.errors

    def _compared(self, step: Pass, result: PassResult, outputs: list[Tensor]) -> Errors:
        moved = difference(outputs, self.outputs, label(step))
        total = difference(outputs, self.reference, label(step))
        allowed = rounding_of_kernels([*outputs, *result.graph_module.parameters()])
        if result.exact and moved.relative > allowed:
            raise VerificationError(
                f"{label(step)}: said to be exact, but the outputs moved by {moved.relative:.2g} relative "
                f"(allowed: {allowed:.2g}); first site: {result.sites[0].name}. Please report this"
            )
        return Errors(total.max_abs, total.relative, moved.relative)
