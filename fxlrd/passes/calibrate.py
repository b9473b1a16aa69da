"""calibrate: one streaming sweep that leaves second moments on the nodes.

For the tensor x that a layer reads, and the one it makes, over every position of every calibration input:

    second = E[x·xᵀ]  (C×C),   mean = E[x]  (C)

With ``patches``, also those of the patches that the kernel of a small conv reads; with ``effects``, how much each
layer's output matters to the model's (fxlrd/calibration/importance.py). Exact: the graph is not changed, so nothing
counts as modified. Later passes read what is recorded on the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from fxlrd.calibration.batches import as_batches, as_inputs, to_fit
from fxlrd.calibration.holdout import Disabled, held_out_of, record_calibrated
from fxlrd.calibration.moments import sweep
from fxlrd.graph.inputs import Inputs
from fxlrd.passes.contract import PassResult
from fxlrd.passes.driver import start
from fxlrd.progress import Progress, quiet


@dataclass(frozen=True)
class Calibrate:
    """Measure the second moments of every layer's input and output.

    ``calibration`` is a tensor (one batch), or an iterable of batches: tensors, (x, y) pairs of which x is taken,
    tuples of positional arguments, or dicts. It is read once. ``outputs=False`` leaves out what layers make.
    ``patches`` is the largest number of inputs to a kernel (channels × positions) for which moments of patches are
    measured. ``effects`` is the number of inputs on which the layers' effects on the model's output are measured, by
    two backward passes. ``holdout`` holds every fifth batch out of the fit, with the model's outputs for it, so that
    later passes can check what they do. Raises FxlrdError for data that is empty, does not fit the model or is not
    finite.
    """

    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    leaves: ClassVar[tuple[str, ...]] = ("reference",)

    calibration: Any = field(default=None, compare=False, repr=False)
    outputs: bool = True
    patches: int = 0
    effects: int = 0
    holdout: bool = False

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` with moments on its nodes."""
        run = start(self, gm, progress)
        batches = as_inputs(run.gm, progress(as_batches(self.calibration), run.label))
        rest: list[Inputs] = []
        sweep(run.gm, to_fit(batches, rest) if self.holdout else batches, self.outputs, self.patches, self.effects)
        record_calibrated(run.gm, held_out_of(run.gm, rest) if self.holdout else Disabled())
        return run.result()
