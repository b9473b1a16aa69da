"""frontier(): what a model loses and gains under each of several budgets, from one capture and one calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from fxlrd.branching import Run, carry_out, labels
from fxlrd.budget import Budget
from fxlrd.capturing.model import capture_any
from fxlrd.compression import Result, report_on, timed
from fxlrd.errors import FxlrdError, one_line
from fxlrd.files import write_out
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.copies import independent_copy, structural_copy
from fxlrd.graph.inputs import Inputs
from fxlrd.installation import install, users_outputs
from fxlrd.passes.contract import Pass
from fxlrd.pipeline import Pipeline
from fxlrd.progress import Progress, alone, one_bar
from fxlrd.report import points
from fxlrd.report.numbers import finite
from fxlrd.report.report import Report, setting
from fxlrd.request import check_context, check_model, in_memory, pipeline_for
from fxlrd.saving.architecture import original_shapes
from fxlrd.timing.clock import Timer, Timing, compare
from fxlrd.timing.inductor import Compile

BUDGETS = (0.85, 0.7, 0.55, 0.4)
"""The shares of the original's latency that are tried where no budgets are given."""
_TIMING = "timing the models"
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Point:
    """A model within one budget, and what was measured of it; `result` is the model itself.

    Attributes:
        budget: what it was to cost.
        report: the report on it, as `fxlrd.compress` gives it.
        error: the relative error of its outputs, on the inputs that `Frontier.error_on` names; None if not verified.
        accuracy: what the user's function gave for it.
    """

    budget: Budget
    report: Report = field(repr=False)
    error: float | None
    accuracy: float | None = None
    _make: Callable[[], nn.Module] = field(default=nn.Module, compare=False, repr=False)

    @property
    def speed(self) -> float | None:
        """How many times as fast as the original it is, if it was timed."""
        return self.report.settings.get("speedup")

    def result(self) -> Result:
        """Return the model, which shares nothing with the original, and the report on it.

        Nothing is captured, calibrated or chosen again. Raises FxlrdError if the original's weights have changed since.
        """
        return Result(self._make(), self.report)

    def to_dict(self) -> dict[str, Any]:
        """Return its figures as plain data."""
        settings, after = self.report.settings, self.report.after
        return {
            "budget": str(self.budget),
            **after,
            "speedup": settings.get("speedup"),
            "speedup_spread": settings.get("speedup_spread"),
            "error": self.error,
            "accuracy": self.accuracy,
        }


@dataclass(frozen=True, repr=False)
class Frontier:
    """Models within several budgets, side by side.

    Attributes:
        model: the name of the original's class.
        device: the processor that it ran on.
        settings: ``inputs``, ``layout``, ``compile``, ``threads``, ``torch``, ``mode`` as in a report; ``pipeline``,
            the passes in text form, with the first budget.
        original: the original's ``params``, ``flops``, ``depth``, ``latency_ms`` and ``accuracy``.
        points: the models, by budget from the largest to the smallest.
        missed: why there is no model within a budget, by the budget's text.
        error_on: the inputs that errors are measured on, in words.
    """

    model: str
    device: str
    settings: dict[str, Any]
    original: dict[str, Any]
    points: tuple[Point, ...]
    missed: dict[str, str]
    error_on: str

    def fastest(self, *, error: float | None = None, accuracy: float | None = None) -> Point:
        """Return the fastest point of at most this error and at least this accuracy.

        Where models were not timed, it is that of the fewest FLOPs. Raises FxlrdError if no point is within.
        """
        if accuracy is not None and self.original["accuracy"] is None:
            raise FxlrdError("frontier: no accuracy was measured; give evaluate=, a function of a model")
        within = [p for p in self.points if _within(p, error, accuracy)]
        if not within:
            limits = {"error": error, "accuracy": accuracy}
            asked = " and ".join(f"{name}={value:g}" for name, value in limits.items() if value is not None)
            raise FxlrdError(f"frontier: no point is within {asked}; give larger budgets")
        return max(within, key=lambda p: p.speed if p.speed is not None else -p.report.after["flops"])

    def __repr__(self) -> str:
        return f"Frontier({points.summary(self._data())})"

    def __str__(self) -> str:
        return self.to_table()

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the table."""
        return points.table(self._data(), style="html")

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data, fit for JSON: a number that is not finite is None."""
        data: dict[str, Any] = finite(self._data())
        return data

    def _data(self) -> dict[str, Any]:
        names = ("model", "device", "settings", "original", "missed", "error_on")
        return {name: getattr(self, name) for name in names} | {"points": [p.to_dict() for p in self.points]}

    def to_table(self) -> str:
        """Return the figures as text, the original first."""
        return points.text(self._data())

    def to_html(self, path: str | Path) -> None:
        """Write the figures as one page, with charts, that needs nothing else: no server, no network."""
        from fxlrd.report.html import frontier_page

        write_out(Path(path), frontier_page(self._data()))


def frontier(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Any = None,
    budgets: Budget | float | str | Iterable[Budget | float | str] = BUDGETS,
    evaluate: Evaluate | None = None,
    pipeline: Pipeline | Sequence[Pass] | str | None = None,
    skip: str | Sequence[str] = (),
    compile: Compile = False,
    measure: bool = True,
    verify: bool = True,
    progress: bool = False,
    timer: Timer = compare,
) -> Frontier:
    """Compress a model within each of several budgets, and measure error, accuracy and latency side by side.

    >>> import fxlrd, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> x = [torch.randn(32, 64) for _ in range(5)]
    >>> budgets = ["params=0.8", "params=0.5"]
    >>> tried = fxlrd.frontier(model, x[0], calibration=x, budgets=budgets, measure=False)
    >>> [str(point.budget) for point in tried.points]
    ['params=0.8', 'params=0.5']
    >>> result = tried.points[1].result()
    >>> result.report.after["params"] < 0.51 * result.report.before["params"]
    True

    The model is captured and calibrated once. What the budgets have in common is done once too: predicted errors, their
    measurement, and the timing of layers. So a point may differ a little from what `fxlrd.compress` gives within its
    budget alone. What depends on the budget, the choice of the forms and their fits, is done for each.

    Args:
        model: any module, as for `fxlrd.compress`.
        example_inputs: what it is called with, as for `fxlrd.compress`.
        calibration: inputs like the real ones, which the default passes need.
        budgets: `fxlrd.Budget`s, their text form (latency=0.5), or numbers: shares of the original's latency.
        evaluate: a function that takes a model, such as one that returns its accuracy on test data: more is better. It
            gets models of its own, the original's first, each in the modes (train or eval) of the original.
        pipeline: passes to run instead of the preset auto. One of them, and one only, is `allocate`.
        skip: names or globs of layers to leave alone.
        compile: time layers and models under Inductor, instead of eagerly, or in int8, as in `fxlrd.compress`.
        measure: time all models side by side.
        verify: compare the outputs after each pass with those before.
        progress: show a progress bar, with the time left, on a terminal (standard error) or in a notebook.
        timer: what times layers and models: a stand-in for `fxlrd.timing.clock.compare`, for tests.

    Returns:
        The points within the budgets that can be met, the others with the reason. Any point becomes a model by
        ``point.result()``, as long as the original's weights are what they were.

    Raises:
        FxlrdError: for a request that cannot be met; the message is one line, with the remedy.
    """
    check_context()
    check_model(model, inplace=False)
    wanted = _budgets(budgets)
    passes = pipeline_for(
        pipeline=pipeline,
        budget=wanted[0],
        skip=skip,
        calibration=None if calibration is None else in_memory(calibration),
        compile=compile,
        timer=timer,
    )
    with one_bar(["capture", *labels(passes, wanted), _TIMING, "evaluate"], shown=progress) as show:
        inputs = Inputs.of(example_inputs)
        original = alone(show, "capture", lambda: capture_any(model, inputs, original_shapes(model)))
        accuracy = None
        if evaluate is not None:  # at once: a function that fails does so before the work
            own = independent_copy(structural_copy(captured_or_bare(original).model or model))
            accuracy = _evaluated(evaluate, own, "the original")
        runs, missed = carry_out(passes, original, wanted, verify=verify, progress=show)
        graphs = {str(budget): run.result.graph_module for budget, run in runs.items()}
        timings = {}
        if measure:
            timings = alone(show, _TIMING, lambda: timed(model, original, graphs, compile, timer))
        made = tuple(_points(model, original, runs, timings, compile, verify, evaluate, show))
    first, report = next(iter(runs.values())), made[0].report
    return Frontier(
        report.model,
        report.device,
        {"pipeline": str(first.passes), **setting(captured_or_bare(original).inputs, compile)},
        {**report.before, "accuracy": accuracy},
        made,
        {str(budget): reason for budget, reason in missed.items()},
        first.error_on,
    )


def _points(
    model: nn.Module,
    original: fx.GraphModule,
    runs: Mapping[Budget, Run],
    timings: Mapping[str, Timing],
    compile: Compile,
    verify: bool,
    evaluate: Evaluate | None,
    show: Progress[Any],
) -> Iterator[Point]:
    """Report on the model within each budget, and evaluate it."""
    versions = _versions(model)

    def make(gm: fx.GraphModule) -> nn.Module:
        if _versions(model) != versions:
            raise FxlrdError("frontier: the original's weights have changed since; call it again")
        return install(original, gm, model, inplace=False).model

    for budget, run in show(list(runs.items()), "evaluate"):
        gm = run.result.graph_module
        reference = users_outputs(original) if verify else None
        installed = install(original, gm, model, inplace=False, reference=reference)
        own = {"before": timings["before"], "after": timings[str(budget)]} if timings else {}
        report = report_on(model, original, run.result, installed, run.passes, compile, own)
        accuracy = None if evaluate is None else _evaluated(evaluate, installed.model, str(budget))
        yield Point(budget, report, run.error, accuracy, partial(make, gm))


def _budgets(budgets: Any) -> list[Budget]:
    """Return the budgets of each measure together, from the largest to the smallest."""
    given = [budgets] if isinstance(budgets, (Budget, str, int, float)) else list(budgets)
    if not given:
        raise FxlrdError("frontier: budgets is empty; give some, such as (0.8, 0.6, 0.4) of the latency")
    made = list(dict.fromkeys(_budget(each) for each in given))
    measures = list(dict.fromkeys(budget.measure for budget in made))
    return sorted(made, key=lambda budget: (measures.index(budget.measure), -budget.share))


def _budget(budget: Any) -> Budget:
    if isinstance(budget, Budget):
        return budget
    return Budget.parse(budget) if isinstance(budget, str) else Budget(latency=budget)


def _evaluated(evaluate: Evaluate, model: nn.Module, name: str) -> float:
    """Return what the user's function gives for a model, which is its own."""
    try:
        value = evaluate(model)
        return float(value.detach() if isinstance(value, Tensor) else value)
    except Exception as error:
        raise FxlrdError(f"frontier: evaluate fails on {name}: {one_line(error)}") from error


def _within(point: Point, error: float | None, accuracy: float | None) -> bool:
    if error is not None and (point.error is None or point.error > error):
        return False
    return accuracy is None or (point.accuracy is not None and point.accuracy >= accuracy)


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return what changes whenever a weight does."""
    return [(id(p), 0 if p.is_inference() else p._version) for p in model.parameters()]
