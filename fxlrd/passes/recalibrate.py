"""recalibrate: BatchNorm statistics of the compressed network, from calibration inputs.

Running means and variances belong to the activations of the original network. Each BatchNorm's are estimated anew: the
mean over batches of what it sees, all BatchNorms normalising by the batch's own statistics meanwhile, as they did in
training. Approximate; run twice on the same batches it changes nothing the second time. Only copies are changed.

This helps where the inputs are many and like the real ones, and hurts otherwise. Where `calibrate` held inputs out, the
new statistics are kept only if they bring the outputs on those closer to the original model's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxlrd.calibration.batches import NOTHING, as_batches, as_inputs, failed, split
from fxlrd.calibration.holdout import TOO_FEW, held, too_few
from fxlrd.errors import FxlrdError
from fxlrd.graph.captured import positional
from fxlrd.graph.facts import provenance
from fxlrd.graph.guards import hooked
from fxlrd.graph.run import evaluating
from fxlrd.graph.surgery import annotate, called, calls, fork
from fxlrd.passes.contract import PassResult, Site, Skip
from fxlrd.progress import Progress, quiet

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ONE_VALUE = "a batch of one input has no variance: give larger batches"


@dataclass(frozen=True)
class Recalibrate:
    """Re-estimate the statistics of every BatchNorm on ``calibration``: batches as for `Calibrate`.

    ``guard`` keeps them only where that lowers the error on the inputs that `Calibrate` was asked to hold out. Raises
    FxlrdError for data that is empty, does not fit the model or is not finite.
    """

    calibration: Any = field(default=None, compare=False, repr=False)
    guard: bool = True

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` with BatchNorms of its own."""
        if self.calibration is None:
            raise FxlrdError(
                "recalibrate: no calibration inputs; give calibration= (on the command line --calibration)"
            )
        before, gm = gm, fork(gm)
        annotate(gm)
        norms, skipped = {}, []
        for name, module in called(gm).items():
            if type(module) not in NORMS or module.running_mean is None:
                continue
            if hooked(module):
                skipped.append(Skip(_origin(gm, name), "it has hooks, which a copy would run twice"))
            else:
                norms[name] = copy.deepcopy(module)
                gm.set_submodule(name, norms[name])
        if norms and self.guard and too_few(gm):
            skipped += [Skip(_origin(gm, name), TOO_FEW) for name in norms]
            gm, norms = fork(before), {}
        if norms:
            reason = _estimate(gm, list(norms.values()), progress(as_batches(self.calibration), "recalibrate"))
            if reason is not None:
                skipped += [Skip(_origin(gm, name), reason) for name in norms]
                gm, norms = fork(before), {}
        note = ""
        aside = held(gm) if self.guard and norms else None
        if aside is not None:
            was, now = aside.error(before), aside.error(gm)
            note = f"output error on held-out inputs {was:.3g} → {now:.3g}"
            if not now < was:
                note += ": not kept"
                skipped += [
                    Skip(_origin(gm, name), "its statistics fit held-out inputs better as they were") for name in norms
                ]
                gm, norms = fork(before), {}
        gm.recompile()
        sites = tuple(Site(_origin(gm, name), False, "statistics re-estimated") for name in norms)
        return PassResult(gm, sites, tuple(skipped), note)


def _estimate(gm: fx.GraphModule, norms: list[nn.Module], batches: Any) -> str | None:
    """Set the statistics of ``norms`` to the mean over the batches, or return why not.

    Momentum and counters come back.
    """
    kept = [(norm.momentum, copy.deepcopy(norm.num_batches_tracked)) for norm in norms]
    count = 0
    with evaluating(gm), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()  # type: ignore[operator]
            norm.momentum = None  # type: ignore[assignment]
            norm.training = True
        for i, inputs in enumerate(split(as_inputs(gm, batches), [])):
            try:
                gm(*positional(gm, inputs))
            except Exception as error:
                if "more than 1 value per channel" in str(error):
                    return ONE_VALUE
                raise failed(i, inputs, error) from error
            count += 1
    if not count:
        raise FxlrdError(NOTHING)
    for norm, (momentum, tracked) in zip(norms, kept, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked = tracked
        if not bool(norm.running_var.isfinite().all()):  # type: ignore[operator]
            raise FxlrdError("recalibrate: the calibration inputs give NaN or Inf; is their scale right?")
    return None


def _origin(gm: fx.GraphModule, name: str) -> str:
    known = provenance(calls(gm, name)[0])
    return known.name if known is not None else name
