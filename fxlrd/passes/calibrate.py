"""calibrate: one streaming sweep that leaves second moments on the nodes.

For the tensor x that a layer reads, and the one it makes, over every position of every calibration input:

    second = E[x·xᵀ]  (C×C),   mean = E[x]  (C)

Exact: the graph is not changed, so nothing counts as modified. Later passes read what is on the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxlrd.errors import FxlrdError
from fxlrd.graph import annotate, fork
from fxlrd.moments import as_batches, sweep
from fxlrd.passes.result import PassResult
from fxlrd.progress import Progress, quiet


@dataclass(frozen=True)
class Calibrate:
    """Measure the second moments of every layer's input and output.

    ``calibration`` is a tensor (one batch), or an iterable of batches: tensors, (x, y) pairs of which x is
    taken, tuples of positional arguments, or dicts. It is read once. ``outputs=False`` leaves the layers' outputs
    out. Raises FxlrdError for data that is empty, does not fit the model or is not finite.
    """

    calibration: Any = field(default=None, compare=False, repr=False)
    outputs: bool = True

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` with moments on its nodes."""
        if self.calibration is None:
            raise FxlrdError(
                "calibrate: no calibration inputs; give calibration= (on the command line --calibration), "
                "such as a list of batches"
            )
        gm = fork(gm)
        annotate(gm)
        sweep(gm, progress(as_batches(self.calibration), "calibrate"), self.outputs)
        return PassResult(gm)
