"""Calibration data: what a user may give, as batches of model inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.inputs import Inputs, tensors

EVERY = 5
"""One batch in so many is held out of a fit, to judge it by."""


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
    takes = captured_or_bare(gm).arguments(gm)
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
