"""Calibration data: what a user may give, as batches of model inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.inputs import Inputs, tensors

HOLDOUT_PERIOD = 5
"""Of so many batches, one is held out of a fit, to judge it by."""
NO_INPUTS = "calibration: there are no inputs; a generator can be read only once: give a list or a loader"


def as_batches(data: Any) -> Iterable[Any]:
    """Return calibration data as an iterable of batches; a tensor or a dict is one batch.

    Raises FxlrdError for what is no calibration data.
    """
    if isinstance(data, (Tensor, Mapping, Inputs)):
        return [data]
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise FxlrdError(
            f"calibration: a {type(data).__name__} is no calibration data; "
            "give a tensor, a list of batches or a DataLoader"
        )
    return data


def as_inputs(gm: fx.GraphModule, batches: Iterable[Any]) -> Iterator[Inputs]:
    """Yield each batch as inputs of the graph: tensors, dicts, or tuples, whose surplus (labels) is dropped.

    Raises FxlrdError for a batch that holds NaN or Inf, or no tensors.
    """
    count = captured_or_bare(gm).arguments(gm)
    for i, batch in enumerate(batches):
        try:
            inputs = Inputs.of(tuple(batch)[: max(count, 1)] if isinstance(batch, (tuple, list)) else batch)
        except FxlrdError as error:
            raise FxlrdError(f"calibration: batch {i}: {str(error).removeprefix('example inputs: ')}") from error
        for t in tensors((inputs.args, inputs.kwargs)):
            if t.is_floating_point() and not t.is_meta and not bool(t.isfinite().all()):
                raise FxlrdError(f"calibration: batch {i} holds NaN or Inf")
        yield inputs


def failure(i: int, inputs: Inputs, error: Exception) -> FxlrdError:
    """Return the error for a batch that the model fails on."""
    cause = str(error) if isinstance(error, FxlrdError) else one_line(error)
    return FxlrdError(f"calibration: the model fails on batch {i} ({inputs.describe()}): {cause}")


def to_fit(batches: Iterable[Inputs], held_out: list[Inputs] | None = None) -> Iterator[Inputs]:
    """Yield the batches to fit to; every `HOLDOUT_PERIOD`-th is appended to ``held_out`` instead.

    Of fewer batches than that, the last rows of each are held out. What is held out depends on the order alone, so that
    all passes that read the same data hold out the same.
    """
    held_out = [] if held_out is None else held_out
    first: list[Inputs] = []
    for i, inputs in enumerate(batches):
        if i < HOLDOUT_PERIOD - 1:
            first.append(inputs)
            continue
        yield from first
        first = []
        if i % HOLDOUT_PERIOD == HOLDOUT_PERIOD - 1:
            held_out.append(inputs)
        else:
            yield inputs
    for inputs in first:
        fitted, last = _cut_rows(inputs)
        yield fitted
        if last is not None:
            held_out.append(last)


def _cut_rows(inputs: Inputs) -> tuple[Inputs, Inputs | None]:
    """Return the first rows of a batch and the last fifth; all of it and None where it cannot be cut."""
    leaves = tree_flatten((inputs.args, inputs.kwargs))[0]
    sizes = {t.shape[0] if t.dim() else 0 for t in leaves if isinstance(t, Tensor)}
    count = sizes.pop() if len(sizes) == 1 else 0
    if count < HOLDOUT_PERIOD:
        return inputs, None
    end = count - count // HOLDOUT_PERIOD

    def rows(part: slice) -> Inputs:
        args, kwargs = tree_map(lambda v: v[part] if isinstance(v, Tensor) else v, (inputs.args, inputs.kwargs))
        return Inputs(args, kwargs)

    return rows(slice(end)), rows(slice(end, None))


def examples(inputs: Inputs) -> int:
    """Return the number of examples in a batch: the largest first dimension of its tensors."""
    return max((len(t) for t in tensors((inputs.args, inputs.kwargs)) if t.dim()), default=1)


def first_examples(batches: Iterable[Inputs], count: int) -> list[Inputs]:
    """Return the first batches, until they hold ``count`` examples. Raises FxlrdError where there is none."""
    first: list[Inputs] = []
    for inputs in batches:
        first.append(inputs)
        if sum(examples(each) for each in first) >= count:
            break
    if not first:
        raise FxlrdError(NO_INPUTS)
    return first
