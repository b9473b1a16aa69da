"""How the forward of a model that cannot be traced goes from unit to unit, and what it needs of earlier ones.

Units are the largest modules that hold few of a model's layers each (fxlrd/graph/resuming.py), such as the blocks of a
transformer. A forward in which the first of them return what they gave before runs only the code between those. What a
unit gave has a last use: where it is spoilt, what later units are called with differs, up to that.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fxlrd.graph.compare import difference, rounding
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.random import OwnGenerators
from fxlrd.graph.regions import copies
from fxlrd.graph.run import unmoved

MOST = 256
"""Calls of units of which the last uses are looked for; of more, all that units give is remembered."""


class Stop(BaseException):
    """Ends a forward of which the rest is not needed."""


@dataclass(frozen=True)
class UnitCall:
    """A call of a unit: its number in the run, the unit, its arguments."""

    number: int
    unit: str
    arguments: tuple[Any, ...]


Around = Callable[[UnitCall, Callable[[], Any]], Any]
"""What gives the output of a unit's call, with a function that runs the unit."""


def run_units(model: nn.Module, inputs: Inputs, units: Collection[str], around: Around) -> None:
    """Run a model, which is in eval mode, with ``around`` in the place of its units, until that raises `Stop`.

    A unit that another one calls is a part of that. Buffers are as before afterwards; random numbers are always the
    same. What is the same for many runs is left to the caller: modes, and torch's settings (fxlrd/graph/settings.py).
    """
    numbers, inside = itertools.count(), False

    def wrapped(unit: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return forward(*args, **kwargs)
            inside = True
            try:
                return around(UnitCall(next(numbers), unit, (args, kwargs)), lambda: forward(*args, **kwargs))
            finally:
                inside = False

        return call

    modules = {id(module): (unit, module) for unit in units for module in [model.get_submodule(unit)]}
    own = [(module, vars(module).get("forward")) for _, module in modules.values()]
    try:
        for unit, module in modules.values():
            module.forward = wrapped(unit, module.forward)
        with unmoved(model), OwnGenerators(), torch.no_grad(), BaseTorchFunctionMode():
            fresh = inputs.fresh()
            model(*fresh.args, **fresh.kwargs)
    except Stop:
        pass
    finally:
        for module, forward in own:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


@dataclass(frozen=True)
class Course:
    """How the forward of a model goes from unit to unit.

    Attributes:
        units: the names of the units.
        sequence: the units that are called, in order, on some inputs.
        last_uses: for each of these calls, the last one whose arguments depend on its output by the code between units.
    """

    units: tuple[str, ...]
    sequence: tuple[str, ...]
    last_uses: tuple[int, ...]

    def remembered(self, outputs: Sequence[Any]) -> list[Any]:
        """Return what the first calls gave, without what later calls do not need."""
        count = len(outputs)
        return [output if self.last_uses[k] >= count else _spoilt(output) for k, output in enumerate(outputs)]


def course_of(model: nn.Module, inputs: Inputs, units: Sequence[str], last: Collection[str]) -> Course | None:
    """Return the course of a model up to its last call of the units ``last``.

    Returns None where units do more than give their outputs, so that a forward does not go on without them.
    """
    calls: list[UnitCall] = []
    outputs: list[Any] = []

    def recording(call: UnitCall, forward: Callable[[], Any]) -> Any:
        calls.append(UnitCall(call.number, call.unit, copies(call.arguments)))
        output = forward()
        outputs.append(copies(output))
        return output

    run_units(model, inputs, units, recording)
    count = 1 + max((call.number for call in calls if call.unit in last), default=-1)
    calls, outputs = calls[:count], outputs[:count]
    last_uses = [count] * count
    for k in range(count if count <= MOST else 0):
        if _is_numbers(outputs[k]):
            others = ([*outputs[:k], change(outputs[k]), *outputs[k + 1 :]] for change in (_spoilt, _turned))
            last_uses[k] = max(_last_difference(calls, _replayed(model, inputs, units, each)) for each in others)
    course = Course(tuple(units), tuple(call.unit for call in calls), tuple(last_uses))
    return course if _goes_on(model, inputs, course, outputs) else None


def _replayed(model: nn.Module, inputs: Inputs, units: Sequence[str], outputs: Sequence[Any]) -> list[UnitCall]:
    """Return the calls of units where they give ``outputs``; none where the model fails on these."""
    calls: list[UnitCall] = []

    def giving(call: UnitCall, forward: Callable[[], Any]) -> Any:
        calls.append(UnitCall(call.number, call.unit, copies(call.arguments)))
        if len(calls) == len(outputs):
            raise Stop
        return copies(outputs[call.number])

    try:
        run_units(model, inputs, units, giving)
    except Exception:  # whatever stops the model's own code on what it cannot get: the output is needed
        return []
    return calls


def _last_difference(calls: Sequence[UnitCall], others: Sequence[UnitCall]) -> int:
    """Return the number of the last call that is another one; -1 where none is, and of all where others are made."""
    if [call.unit for call in calls] != [call.unit for call in others]:
        return len(calls)
    pairs = zip(calls, others, strict=True)
    return max((a.number for a, b in pairs if not _alike(a.arguments, b.arguments)), default=-1)


def _goes_on(model: nn.Module, inputs: Inputs, course: Course, outputs: Sequence[Any]) -> bool:
    """Whether each unit, or some of many, gives ``outputs`` where those before return what is remembered of them."""
    count = len(outputs)
    for k in range(0, count, math.ceil(count / MOST) or 1):
        made: list[Any] = []
        remembered = course.remembered(outputs[:k])

        def resuming(call: UnitCall, forward: Callable[[], Any], k: int = k) -> Any:
            if call.number < k:
                return copies(remembered[call.number])  # noqa: B023
            made.append(forward())  # noqa: B023
            raise Stop

        try:
            run_units(model, inputs, course.units, resuming)
            moved = difference(tensors(made), tensors([outputs[k]]), "resumed")
        except Exception:
            return False
        if moved.relative > rounding(tensors(outputs[k])):
            return False
    return True


def _spoilt(output: Any) -> Any:
    """Return NaN in the place of numbers, without memory for them."""
    return tree_map(lambda v: v.new_full((), math.nan).expand(v.shape) if _is_float(v) else v, output)


def _turned(output: Any) -> Any:
    """Return other numbers of the same sizes: code that compares them may take NaN for what was there."""
    return tree_map(lambda v: -v if _is_float(v) else v, output)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_numbers(output: Any) -> bool:
    """Whether there is something to spoil in an output, and nothing beside it but constants."""
    leaves = tree_leaves(output)
    return any(map(_is_float, leaves)) and all(v is None or _is_float(v) or isinstance(v, _CONSTANTS) for v in leaves)


_CONSTANTS = (bool, int, float, str)


def _alike(a: Any, b: Any) -> bool:
    pairs = list(zip(tensors(a), tensors(b), strict=False))
    return len(tensors(a)) == len(tensors(b)) and all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)
