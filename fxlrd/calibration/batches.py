"""Calibration data: what a user may give, as batches of model inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map

from fxlrd.errors import FxlrdError, VerificationError, one_line
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.compare import difference, rounding_of_kernels
from fxlrd.graph.facts import Fact
from fxlrd.graph.inputs import Inputs, map_tensors, tensors

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
    """Yield each batch as inputs of the model, given to it as the example inputs were, and on their device.

    Raises FxlrdError for a batch that holds NaN or +Inf, no tensors, or nothing that the example inputs have.
    """
    model = captured_or_bare(gm)
    names, example = model.parameters(gm), model.inputs
    if not example.args and not example.kwargs:  # a graph that its user has traced
        example = Inputs((None,) * len([n for n in gm.graph.find_nodes(op="placeholder") if not n.args]))
    for i, batch in enumerate(read(batches)):
        try:
            inputs = given_as(example, batch, names)
        except FxlrdError as error:
            raise FxlrdError(f"calibration: batch {i}: {str(error).removeprefix('example inputs: ')}") from error
        for t in tensors((inputs.args, inputs.kwargs)):
            if t.is_floating_point() and not t.is_meta and _is_invalid(t):
                raise FxlrdError(f"calibration: batch {i} holds NaN or Inf")
        yield _beside(example, inputs)


def _beside(example: Inputs, inputs: Inputs) -> Inputs:
    """Return inputs on the device of the example's, where that is one: loaders give what is on the CPU."""
    devices = {t.device for t in tensors((example.args, example.kwargs))}
    given = {t.device for t in tensors((inputs.args, inputs.kwargs))}
    if len(devices) != 1 or given <= devices or torch.device("meta") in given:
        return inputs
    (device,) = devices
    return Inputs(*map_tensors(lambda t: t.to(device), (inputs.args, inputs.kwargs)))


def read(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches. Raises FxlrdError for whatever the user's iterable raises, with that as its cause."""
    i = 0
    try:
        for batch in batches:
            yield batch
            i += 1
    except FxlrdError:
        raise
    except Exception as error:
        raise FxlrdError(f"calibration: the data give no batch {i}: {one_line(error)}") from error


def given_as(example: Inputs, batch: Any, names: Sequence[str]) -> Inputs:
    """Return a batch as the arguments of a call that is made as the ``example`` was.

    What the example has not, such as labels, is dropped. A dict fills the arguments of its keys, or is the one argument
    where the example's one argument is a dict. A tuple fills the example's arguments in order, those by name last.

    Args:
        example: the example inputs.
        batch: a tensor, a tuple or list, a dict, or a tuple whose first element is a dict.
        names: the names of the model's parameters, in order.

    Raises:
        FxlrdError: for a batch that has no tensors, or a dict with none of the names.
    """
    if isinstance(batch, Mapping):
        if len(example.args) == 1 and isinstance(example.args[0], Mapping):
            return Inputs((batch,))
        wanted = [*names[: len(example.args)], *example.kwargs]
        arguments = {name: batch[name] for name in wanted if name in batch}
        if not arguments:
            raise FxlrdError(
                f"a dict of {', '.join(map(str, batch)) or 'nothing'}, but the model was given {', '.join(wanted)}: "
                "rename its keys, or give tuples in the order of the example inputs"
            )
        return Inputs((), arguments)
    if isinstance(batch, Inputs):
        return batch
    values = tuple(batch) if isinstance(batch, (tuple, list)) else Inputs.of(batch).args
    if values and isinstance(values[0], Mapping) and example.kwargs and not example.args:
        return given_as(example, values[0], names)
    count = len(example.args)
    by_name = values[count:] if len(values) >= count + len(example.kwargs) else ()
    return Inputs(values[:count], dict(zip(example.kwargs, by_name if count else values, strict=False)))


def _is_invalid(t: Tensor) -> bool:
    """Whether a tensor holds NaN or +Inf. Masks are written with -Inf."""
    values = t.to_dense() if t.layout != torch.strided else t
    return bool((values.isnan() | (values == math.inf)).any())


def failure(i: int, inputs: Inputs, error: Exception) -> FxlrdError:
    """Return the error for a batch that the model fails on."""
    cause = str(error) if isinstance(error, FxlrdError) else one_line(error)
    return FxlrdError(f"calibration: the model fails on batch {i} ({inputs.describe()}): {cause}")


Divisible = Callable[[Inputs, Inputs], bool]
"""Whether the second inputs, the first rows of the first ones, are examples of their own; see `rows_are_examples`."""


def rows_are_examples(gm: fx.GraphModule, inputs: Inputs, first_rows: Inputs) -> bool:
    """Whether the first axis of the inputs is a batch: the first rows alone give the first rows of the outputs.

    It is not where the rows are the nodes of a graph, or the entries of one vector. What is found for inputs of one
    form holds for others of it: the graph has it as a fact, and so have copies of it.
    """
    found, form = _rows_found(gm), _form(inputs)
    if found is None:
        _rows_found.record(gm, found := {})
    if form not in found:
        found[form] = _gives_rows(gm, inputs, first_rows)
    return found[form]


_rows_found: Fact[dict[str, bool]] = Fact("rows_are_examples", dict)
"""Whether rows of inputs are examples, by the form of the inputs."""


def _form(inputs: Inputs) -> str:
    """Return what inputs are, whatever the lengths of their axes."""
    leaves, structure = tree_flatten((inputs.args, inputs.kwargs))
    return f"{structure} {[(leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]}"


def _gives_rows(gm: fx.GraphModule, inputs: Inputs, first_rows: Inputs) -> bool:
    captured = captured_or_bare(gm)
    try:
        all_outputs, first_outputs = captured.outputs(gm, inputs), captured.outputs(gm, first_rows)
    except Exception:  # whatever stops the model on some of the rows: they are no examples
        return False
    return _are_rows(all_outputs, first_outputs, examples(inputs), examples(first_rows))


def _are_rows(all_outputs: list[Tensor], first_outputs: list[Tensor], count: int, end: int) -> bool:
    """Whether the outputs for the first ``end`` of ``count`` examples are the first rows of the outputs for all."""
    pairs = list(zip(all_outputs, first_outputs, strict=False))
    if not pairs or len(all_outputs) != len(first_outputs):
        return False
    if any(not a.dim() or not b.dim() or len(a) * end != len(b) * count for a, b in pairs):
        return False
    try:
        moved = difference(first_outputs, [a[: len(b)] for a, b in pairs], "first rows")
    except VerificationError:
        return False
    return moved.relative <= rounding_of_kernels(all_outputs)


def to_fit(
    batches: Iterable[Inputs], held_out: list[Inputs] | None = None, divisible: Divisible = lambda inputs, rows: True
) -> Iterator[Inputs]:
    """Yield the batches to fit to; every `HOLDOUT_PERIOD`-th is appended to ``held_out`` instead.

    Of fewer batches than that, the last rows of each are held out, where it is ``divisible``. What is held out depends
    on the data and their order alone, so that all passes that read the same data hold out the same.
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
        if last is not None and not divisible(inputs, fitted):
            fitted, last = inputs, None
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


def first_rows(inputs: Inputs, count: int) -> Inputs:
    """Return the first rows of a batch; the batch itself where it has no more, or cannot be cut."""
    leaves = tree_flatten((inputs.args, inputs.kwargs))[0]
    sizes = {t.shape[0] if t.dim() else 0 for t in leaves if isinstance(t, Tensor)}
    if len(sizes) != 1 or count >= min(sizes):
        return inputs
    args, kwargs = tree_map(lambda v: v[:count] if isinstance(v, Tensor) else v, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


class Variety:
    """Whether inputs differ at all: fits to many copies of one input follow it, and predict no error for any other."""

    def __init__(self) -> None:
        self.first_rows: list[Tensor] | None = None
        self.rows = 0
        self.alike = True

    def watch(self, batches: Iterable[Inputs]) -> Iterator[Inputs]:
        """Yield the batches, and compare their rows with the very first one meanwhile."""
        for inputs in batches:
            if self.alike:
                self._compare([t for t in tensors((inputs.args, inputs.kwargs)) if t.dim() and not t.is_meta])
            yield inputs

    def _compare(self, batch: list[Tensor]) -> None:
        if self.first_rows is None:
            self.first_rows = [t[:1].clone() for t in batch]
        self.rows += max((len(t) for t in batch), default=1)
        self.alike = len(batch) == len(self.first_rows) and all(
            t.shape[1:] == row.shape[1:] and bool((t == row).all())
            for t, row in zip(batch, self.first_rows, strict=True)
        )

    @property
    def none(self) -> bool:
        """Whether there were several inputs, and all of them alike."""
        return self.alike and self.rows > 1


class Count:
    """Counts the examples of batches as they pass."""

    def __init__(self) -> None:
        self.examples = 0

    def watch(self, batches: Iterable[Inputs]) -> Iterator[Inputs]:
        """Yield the batches."""
        for inputs in batches:
            self.examples += examples(inputs)
            yield inputs


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
