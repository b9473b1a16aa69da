"""Calibration data: what a user may give, as batches of model inputs, and what is held out of a fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map

from fxlrd.around import runnable
from fxlrd.errors import FxlrdError, VerificationError, one_line
from fxlrd.graph import Inputs, captured, difference, evaluating, fork, positional, run, tensors

EVERY = 5
"""One batch in so many is held out of a fit, to judge it by."""

_KEPT = "fxlrd.held"
_REFERENCE = "fxlrd.reference"


def as_batches(data: Any) -> Iterable[Any]:
    """Return calibration data as an iterable of batches; a tensor or a dict is one batch."""
    if isinstance(data, (Tensor, Mapping, Inputs)):
        return [data]
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise FxlrdError(
            f"calibration: a {type(data).__name__} is no calibration data; "
            "give a tensor, a list of batches or a DataLoader"
        )
    return data


def as_inputs(gm: fx.GraphModule, batches: Iterable[Any]) -> Iterator[Inputs]:
    """Yield each batch as inputs of the graph: tensors, dicts, or tuples, whose surplus (labels) is dropped."""
    known = captured(gm)
    if known is not None and known.around is not None:
        takes = len(known.inputs.args)
    else:
        takes = len([n for n in gm.graph.nodes if n.op == "placeholder" and not n.args])
    for i, batch in enumerate(batches):
        try:
            inputs = Inputs.of(tuple(batch)[: max(takes, 1)] if isinstance(batch, (tuple, list)) else batch)
        except FxlrdError as error:
            raise FxlrdError(f"calibration: batch {i}: {str(error).removeprefix('example inputs: ')}") from error
        for t in tensors((inputs.args, inputs.kwargs)):
            if t.is_floating_point() and not t.is_meta and not bool(t.isfinite().all()):
                raise FxlrdError(f"calibration: batch {i} holds NaN or Inf")
        yield inputs


def failed(i: int, inputs: Inputs, error: Exception) -> FxlrdError:
    """Return the error for a batch that the model fails on."""
    said = str(error) if isinstance(error, FxlrdError) else one_line(error)
    return FxlrdError(f"calibration: the model fails on batch {i} ({inputs.describe()}): {said}")


NOTHING = "calibration: there are no inputs; a generator can be read only once, a list or loader again"


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


def split(batches: Iterable[Inputs], aside: list[Inputs]) -> Iterator[Inputs]:
    """Yield the batches to fit to; every `EVERY`-th goes to ``aside`` instead.

    Of fewer batches than that, the last rows of each are held out. What is held out depends on the order alone,
    so that passes which read the same data agree on it.
    """
    first: list[Inputs] = []
    for i, inputs in enumerate(batches):
        if i < EVERY - 1:
            first.append(inputs)
            continue
        yield from first
        first = []
        if i % EVERY == EVERY - 1:
            aside.append(inputs)
        else:
            yield inputs
    for inputs in first:
        fit, rest = _cut(inputs)
        yield fit
        if rest is not None:
            aside.append(rest)


def _cut(inputs: Inputs) -> tuple[Inputs, Inputs | None]:
    """Return the first rows of a batch and the last fifth, or the whole and None where there is no batch to cut."""
    leaves = tree_flatten((inputs.args, inputs.kwargs))[0]
    sizes = {t.shape[0] if t.dim() else 0 for t in leaves if isinstance(t, Tensor)}
    count = sizes.pop() if len(sizes) == 1 else 0
    if count < EVERY:
        return inputs, None
    at = count - count // EVERY

    def rows(where: slice) -> Inputs:
        args, kwargs = tree_map(lambda v: v[where] if isinstance(v, Tensor) else v, (inputs.args, inputs.kwargs))
        return Inputs(args, kwargs)

    return rows(slice(at)), rows(slice(at, None))
