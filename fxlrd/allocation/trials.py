"""The error of the model's output with a few layers replaced: measured, on inputs that no fit has seen.

The error is that of fxlrd/calibration/metric.py, which fxlrd/calibration/importance.py predicts. Only what follows the
first changed layer runs: of a graph the nodes after it, of a user's model whose regions were captured the blocks from
its own on (fxlrd/graph/resuming.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.holdout import outputs
from fxlrd.calibration.metric import logits_among, squared_error
from fxlrd.calibration.padding import all_at_tokens, tokens_of
from fxlrd.calibration.stepper import Stepper
from fxlrd.errors import FxlrdError
from fxlrd.factor.failures import failure
from fxlrd.graph.captured import captured_or_bare, runnable
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.regions import set_modules, undo
from fxlrd.graph.resuming import Resumable
from fxlrd.graph.run import evaluating, isolated
from fxlrd.graph.surgery import calls
from fxlrd.progress import Progress

Modules = Mapping[str, nn.Module]
"""Modules to put in the place of layers, by the layers' names."""


@dataclass(frozen=True)
class Trial:
    """Changes of one layer or group, each to be tried alone.

    Attributes:
        name: that of the layer, or of the group's first producer.
        layers: the layers that change, by name.
        predicted: the predicted error of each change.
        changes: make the modules of each change.
    """

    name: str
    layers: tuple[str, ...]
    predicted: tuple[float, ...]
    changes: tuple[Callable[[], Modules], ...]


@dataclass(frozen=True)
class Original:
    """What changed outputs are compared with: the outputs for each batch, which are logits, where tokens are."""

    outputs: Sequence[Sequence[Tensor]]
    logits: Sequence[bool]
    tokens: Sequence[Tensor | None]

    def error(self, changed: Iterable[Sequence[Tensor]]) -> float:
        """Return the squared error of changed outputs: the mean over the batches."""
        triples = zip(changed, self.outputs, self.tokens, strict=True)
        errors = [squared_error(all_at_tokens(a, t), all_at_tokens(b, t), self.logits) for a, b, t in triples]
        return sum(errors) / len(errors)


def measure(
    gm: fx.GraphModule, batches: Sequence[Inputs], trials: Sequence[Trial], progress: Progress[Trial]
) -> list[list[float]]:
    """Return the errors of each trial's changes: the mean over the batches; infinite for one that cannot be made."""
    model, shown = runnable(gm), "allocate: measuring"
    logits, tokens = logits_among(gm) or (), [tokens_of(gm, batch) for batch in batches]
    if model is not gm:
        names = {name for trial in trials for name in trial.layers}
        resumable, described = Resumable(model, batches, names), captured_or_bare(gm).described
        original = Original(resumable.original, logits, tokens)
        return [
            [_made(change, lambda made: _within(resumable, made, described, original)) for change in trial.changes]
            for trial in progress(trials, shown)
        ]
    original = Original([outputs(gm, batch) for batch in batches], logits, tokens)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    first = {id(t): min((node for n in t.layers for node in calls(gm, n)), key=order.__getitem__) for t in trials}
    errors: dict[int, list[float]] = {}
    with evaluating(gm), isolated(gm), torch.no_grad():
        stepper = Stepper(gm, batches)
        for trial in progress(sorted(trials, key=lambda trial: order[first[id(trial)]]), shown):
            stepper.before(first[id(trial)])
            errors[id(trial)] = [
                _made(change, lambda made: original.error(map(tensors, stepper.rest(made)))) for change in trial.changes
            ]
    return [errors[id(trial)] for trial in trials]


def _made(change: Callable[[], Modules], error_of: Callable[[Modules], float]) -> float:
    """Return the error of a change; infinity, which no scale is fitted to, where its algebra fails."""
    try:
        return error_of(change())
    except Exception as error:
        if failure(error) is None:
            raise
        return math.inf


def _within(resumable: Resumable, modules: Modules, described: Collection[str], original: Original) -> float:
    """Return the error with ``modules`` in the model, which has its own ones again afterwards."""
    replaced = set_modules(resumable.model, modules, described)
    try:
        return original.error(resumable.results(modules))
    except FxlrdError:  # the model's own code fails on what it gets
        return math.inf
    finally:
        undo(resumable.model, replaced)
