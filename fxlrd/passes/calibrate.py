"""calibrate: one streaming sweep that leaves second moments on the nodes.

For the tensor x that a layer reads, and the one it makes, over every position of every calibration input:

    second = E[x·xᵀ]  (C×C),   mean = E[x]  (C)

With ``patches``, also those of what the kernel of a small conv sees; with ``effects``, how much each layer's output
matters to the model's (fxlrd/calibration/importance.py). Exact: the graph is not changed, so nothing counts as
modified. Later passes read what is on the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxlrd.calibration.batches import as_batches, as_inputs, split
from fxlrd.calibration.holdout import hold
from fxlrd.calibration.moments import sweep
from fxlrd.errors import FxlrdError
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import annotate, fork
from fxlrd.passes.contract import PassResult
from fxlrd.progress import Progress, quiet


@dataclass(frozen=True)
class Calibrate:
    """Measure the second moments of every layer's input and output.

    ``calibration`` is a tensor (one batch), or an iterable of batches: tensors, (x, y) pairs of which x is
    taken, tuples of positional arguments, or dicts. It is read once. ``outputs=False`` leaves the layers' outputs
    out. ``patches`` is the largest number of inputs to a kernel (channels × positions) for which moments are taken
    of whole patches. ``effects`` is the number of inputs on which the layers' effects on the model's output are
    measured, by two backward passes. ``holdout`` keeps every fifth batch from the fit, with the model's outputs
    for it, so that later passes can check what they do. Raises FxlrdError for data that is empty, does not fit
    the model or is not finite.
    """

    calibration: Any = field(default=None, compare=False, repr=False)
    outputs: bool = True
    patches: int = 0
    effects: int = 0
    holdout: bool = False

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` with moments on its nodes."""
        if self.calibration is None:
            raise FxlrdError(
                "calibrate: no calibration inputs; give calibration= (on the command line --calibration), "
                "such as a list of batches"
            )
        gm = fork(gm)
        annotate(gm)
        batches = as_inputs(gm, progress(as_batches(self.calibration), "calibrate"))
        aside: list[Inputs] = []
        sweep(gm, split(batches, aside) if self.holdout else batches, self.outputs, self.patches, self.effects)
        hold(gm, aside if self.holdout else None)
        return PassResult(gm)
