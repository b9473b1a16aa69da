"""Running a model that cannot be traced on several inputs, one unit at a time for all of them.

A run goes on by another forward, in which the units that it has passed return what they gave, as far as that is still
needed (fxlrd/calibration/course.py). Within a unit that is run again and again, layers that do not change any more are
computed once for each input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fxlrd.calibration.answers import Answers
from fxlrd.calibration.batches import failure
from fxlrd.calibration.course import Around, Course, Stop, UnitCall, run_units
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.regions import Call, copies, recorded_calls


class UnitStepper:
    """A run of a model on several inputs that stops at any unit. Modules may be replaced between steps.

    For each input it remembers what units gave that is still needed: for most models the output of one unit.

    Args:
        model: a model of its own.
        batches: the inputs.
        course: how the model goes from unit to unit.
        sequences: for each input, the units that are called.

    Attributes:
        settled: for each unit, layers in it that are called once in a run and will not be replaced any more.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Inputs], course: Course, sequences: Sequence[Sequence[str]]
    ) -> None:
        self.model, self.batches, self.course, self.sequences = model, batches, course, sequences
        self.outputs: list[list[Any]] = [[] for _ in batches]
        self.passed: list[list[str]] = [[] for _ in batches]
        self.settled: dict[str, list[str]] = {}
        self.answers = Answers(model)

    def before(self, unit: str) -> None:
        """Run each input up to its next call of ``unit``, if it calls that."""
        for i, sequence in enumerate(self.sequences):
            following = sequence[len(self.outputs[i]) :]
            if unit in following[1:] and following[0] != unit:
                self._advance(i, unit)

    def _advance(self, i: int, unit: str) -> None:
        outputs = list(self.outputs[i])

        def going_on(call: UnitCall, forward: Callable[[], Any]) -> Any:
            if call.unit == unit:
                raise Stop
            with self.answers.given(i, self.settled.get(call.unit, ())) as end:
                end()
                output = forward()
            self.answers.forget(i)
            self.passed[i].append(call.unit)
            outputs.append(copies(output))
            return output

        self._resume(i, going_on)
        passed = tuple(self.passed[i])
        follows = passed == self.course.sequence[: len(passed)]
        self.outputs[i] = self.course.remembered(outputs) if follows else outputs

    def calls(self, unit: str, names: Collection[str]) -> Iterator[Mapping[str, Call]]:
        """Yield for each input the calls of the modules ``names`` in its next call of ``unit``; the run stays."""
        for i, sequence in enumerate(self.sequences):
            yield self._seen(i, unit, names) if unit in sequence[len(self.outputs[i]) :] else {}

    def _seen(self, i: int, unit: str, names: Collection[str]) -> Mapping[str, Call]:
        missing, settled = set(names), self.settled.get(unit, ())
        end: Callable[[], object] = bool

        def until_all(call: UnitCall, forward: Callable[[], Any]) -> Any:
            nonlocal end
            if call.unit != unit:
                return forward()
            with self.answers.given(i, settled) as end:
                output = forward()
            if unit not in names:
                raise Stop
            return output

        def noting(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                missing.discard(name)
                if name not in settled:
                    end()
                if not missing:
                    raise Stop

            return hook

        def run() -> None:
            handles = [self.model.get_submodule(name).register_forward_hook(noting(name)) for name in names]
            try:
                self._resume(i, until_all)
            finally:
                for handle in handles:
                    handle.remove()

        return {name: calls[0] for name, calls in recorded_calls(self.model, names, run).items()}

    def _resume(self, i: int, around: Around) -> None:
        """Run the model from where the input's run stands, with ``around`` in the place of units."""
        remembered, passed = self.outputs[i], list(self.passed[i])

        def resuming(call: UnitCall, forward: Callable[[], Any]) -> Any:
            if call.number >= len(remembered):
                return around(call, forward)
            if call.unit != passed[call.number]:  # what was dropped decides which units are called
                raise Stop
            return copies(remembered[call.number])

        try:
            run_units(self.model, self.batches[i], self.course.units, resuming)
        except Exception as error:
            raise failure(i, self.batches[i], error) from error
