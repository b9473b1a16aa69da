"""calibrate: one streaming sweep that leaves second moments on the nodes.

For the tensor x that a layer reads, and the one it makes, over every position of every calibration input:

    second = E[x·xᵀ]  (C×C),   mean = E[x]  (C)

With ``patches``, also those of the patches that the kernel of a small conv reads; with ``effects``, how much each
layer's output matters to the model's (fxlrd/calibration/importance.py). Exact: the graph is not changed, so nothing
counts as modified. Later passes read what is recorded on the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import fx

from fxlrd.calibration.batches import Count, Variety, as_batches, as_inputs, rows_are_examples, to_fit
from fxlrd.calibration.holdout import Disabled, TooFew, held_out_of, record_calibrated
from fxlrd.calibration.moments import forget_statistics, sweep
from fxlrd.calibration.scarcity import scarcity
from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph.inputs import Inputs
from fxlrd.passes.contract import PassResult
from fxlrd.passes.driver import start
from fxlrd.progress import Progress, quiet

METRICS = {"": None, "squared": False, "softmax": True}
"""Whether outputs are logits, by ``metric``."""

ALIKE = Reason("inputs-alike", "all calibration inputs are alike", "give inputs that differ as the real ones do")


@dataclass(frozen=True)
class Calibrate:
    """Measure the second moments of every layer's input and output.

    ``calibration`` is a tensor (one batch), or an iterable of batches: tensors, (x, y) pairs of which x is taken,
    tuples of positional arguments, or dicts. It is read once. ``outputs=False`` leaves out what layers make.
    ``patches`` is the largest number of inputs to a kernel (channels × positions) for which moments of patches are
    measured. ``effects`` is the number of inputs on which the layers' effects on the model's output are measured, by
    backward passes: 16 of them will do where outputs have thousands of positions of sequences. ``metric`` is the unit
    of these effects: "squared", the relative squared error of outputs, or "softmax", the change of the probabilities
    that softmax makes of them; without it, that for what the model names logits, or gives as a classifier does
    (fxlrd/calibration/metric.py). ``holdout`` holds every fifth batch out of the fit, with the model's outputs for it,
    so that later passes can check what they do. To inputs that are all alike nothing is fitted, with a warning.
    Positions that an argument ``attention_mask`` says are padding do not count.
    Raises FxlrdError for data that is empty, does not fit the model or is not finite.
    """

    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    leaves: ClassVar[tuple[str, ...]] = ("reference",)

    calibration: Any = field(default=None, compare=False, repr=False)
    outputs: bool = True
    patches: int = 0
    effects: int = 0
    metric: str = ""
    holdout: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise FxlrdError(f"calibrate: metric={self.metric}: give squared or softmax, or none for what names tell")

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` with moments on its nodes."""
        run = start(self, gm, progress)
        variety, rest, count = Variety(), list[Inputs](), Count()
        batches = count.watch(variety.watch(as_inputs(run.gm, progress(as_batches(self.calibration), run.label))))
        sweep(
            run.gm,
            to_fit(batches, rest, partial(rows_are_examples, run.gm)) if self.holdout else batches,
            self.outputs,
            self.patches,
            self.effects,
            METRICS[self.metric],
        )
        if variety.none:
            forget_statistics(run.gm)
            run.warnings.append(f"{run.label}: {ALIKE}; nothing is fitted to them, and predicted errors mean little")
        elif (warning := scarcity(run.gm, count.examples)) is not None:
            run.warnings.append(f"{run.label}: {warning}")
        held_out = held_out_of(run.gm, rest) if self.holdout else Disabled()
        record_calibrated(run.gm, TooFew(ALIKE) if variety.none and self.holdout else held_out)
        return run.result()
