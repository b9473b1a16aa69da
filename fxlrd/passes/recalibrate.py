"""recalibrate: BatchNorm statistics of the compressed network, from calibration inputs.

Running means and variances belong to the activations of the original network. Each BatchNorm's are estimated anew: the
mean over batches of the statistics of its input, while all BatchNorms normalise by the batch's own statistics, as in
training. Approximate; a second run on the same batches changes nothing. Only copies are changed.

This helps where the inputs are many and like the real ones, and hurts otherwise. Where `calibrate` held inputs out, the
new statistics are kept only if they bring the outputs on those closer to the original model's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.batches import NO_INPUTS, as_batches, as_inputs, failure, rows_are_examples, to_fit
from fxlrd.calibration.holdout import Disabled, TooFew, held_out, keep_if_better, reference
from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph.captured import feed
from fxlrd.graph.guards import hooked
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.layer import NOT_REACHED, origin
from fxlrd.graph.reached import ReachingInterpreter
from fxlrd.graph.run import evaluating
from fxlrd.graph.surgery import called, calls
from fxlrd.layers.kinds import BATCH_NORMS
from fxlrd.passes.contract import PassResult, Site, Skip
from fxlrd.passes.driver import start
from fxlrd.progress import Progress, quiet

HOOKED = Reason("hooks", "it has hooks, which a copy would run twice")
ONE_VALUE = Reason("one-value", "a batch of one input has no variance", "give larger batches")
WORSE = Reason("not-better", "its statistics fit held-out inputs better as they were")


@dataclass(frozen=True)
class Recalibrate:
    """Re-estimate the statistics of every BatchNorm on ``calibration``: batches as for `Calibrate`.

    ``guard`` keeps them only where that lowers the error on the inputs that `Calibrate` was asked to hold out. Raises
    FxlrdError for data that is empty, does not fit the model or is not finite.
    """

    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    calibration: Any = field(default=None, compare=False, repr=False)
    guard: bool = True

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` with BatchNorms of its own."""
        run = start(self, gm, progress)
        norms: dict[str, nn.Module] = {}
        for name, module in called(run.gm).items():
            if type(module) not in BATCH_NORMS or module.running_mean is None:
                continue
            if hooked(module):
                run.add(Skip(origin(calls(run.gm, name)[0]), HOOKED))
                continue
            norms[name] = copy.deepcopy(module)
            run.gm.set_submodule(name, norms[name])
            run.add(Site(origin(calls(run.gm, name)[0]), False, "statistics re-estimated"))
        if not norms:
            return run.result()
        inputs_held_out = held_out(gm) if self.guard else Disabled()
        if isinstance(inputs_held_out, TooFew):
            return run.undone(inputs_held_out.reason)
        try:
            batches = as_inputs(run.gm, progress(as_batches(self.calibration), run.label))
            divisible = partial(rows_are_examples, reference(gm) or gm)
            reached = _estimate(run.gm, list(norms.values()), to_fit(batches, divisible=divisible))
        except _OneValueError:
            return run.undone(ONE_VALUE)
        for name in [name for name, norm in norms.items() if norm not in reached]:
            run.gm.set_submodule(name, gm.get_submodule(name))
            place = origin(calls(run.gm, name)[0])
            run.sites = [site for site in run.sites if site.name != place]
            run.add(Skip(place, NOT_REACHED))
        verdict = keep_if_better(inputs_held_out, gm, run.gm)
        return run.result(verdict.note) if verdict.keep else run.undone(WORSE, verdict.note)


class _OneValueError(Exception):
    """A BatchNorm was to estimate a variance from one value."""


def _estimate(gm: fx.GraphModule, norms: list[nn.Module], batches: Iterable[Inputs]) -> set[nn.Module]:
    """Set the statistics of ``norms`` to the mean over the batches. Return those that any of these reached."""
    count = 0
    reached: set[nn.Module] = set()
    with evaluating(gm), torch.no_grad(), ExitStack() as stack:
        for norm in norms:
            stack.enter_context(_averaging(norm, reached))
        for i, inputs in enumerate(batches):
            try:
                ReachingInterpreter(gm).run(*feed(gm, inputs))
            except _OneValueError:
                raise
            except Exception as error:
                raise failure(i, inputs, error) from error
            count += 1
    if not count:
        raise FxlrdError(NO_INPUTS)
    if not all(bool(norm.running_var.isfinite().all()) for norm in norms):  # type: ignore[operator]
        raise FxlrdError("recalibrate: the calibration inputs give NaN or Inf; is their scale right?")
    return reached


@contextmanager
def _averaging(norm: nn.Module, reached: set[nn.Module]) -> Iterator[None]:
    """Let the statistics of a BatchNorm become the mean over the batches; its momentum and counter come back.

    If any batch reaches it, it is in ``reached`` afterwards.
    """
    momentum, batches_tracked = norm.momentum, copy.deepcopy(norm.num_batches_tracked)
    norm.reset_running_stats()  # type: ignore[operator]
    norm.momentum = None  # type: ignore[assignment]
    norm.training = True

    def before(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        _check_variance(norm, args)
        reached.add(norm)

    handle = norm.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
        norm.momentum = momentum
        norm.num_batches_tracked = batches_tracked


def _check_variance(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    (x,) = args
    if x.numel() == x.shape[1]:
        raise _OneValueError
