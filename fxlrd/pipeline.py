"""Passes in order, each verified before the next, and a ledger of what they did."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from fxlrd import spec
from fxlrd.allocation.doubts import doubt_of_plan
from fxlrd.errors import FxlrdError, one_line, unknown
from fxlrd.freed import give_back_freed
from fxlrd.graph import cost
from fxlrd.graph.captured import captured, captured_or_bare
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import annotate, fork
from fxlrd.passes.contract import Pass, PassResult, Site, Skip
from fxlrd.passes.driver import check_needs, label
from fxlrd.progress import Progress, quiet, steps_of
from fxlrd.timing.clock import Timing
from fxlrd.verification import Errors, Verification

PRESETS = {
    "lrd": "decompose",
    "ranks": "decompose,snap",
    "freeze": "decompose,freeze",
    "merge": "calibrate{outputs=false,effects=256,holdout=true},merge{snap=true},refit,recalibrate",
    "branch": "decompose,branch",
    "auto": "calibrate{outputs=false,patches=1152,effects=256,holdout=true},allocate{latency=0.5,measured=32},"
    "merge,decompose,refit,recalibrate",
}
"""The presets in text form: the paper's rows, and the best that we know."""
Callback = Callable[[fx.GraphModule, Pass, fx.GraphModule], None]
Rewrite = Callable[[fx.GraphModule, Progress[Any]], PassResult]


@dataclass(frozen=True)
class Record:
    """One line of the ledger: what a pass did, and how far outputs moved on the example inputs.

    ``relative_error`` and ``max_abs_error`` are against the pipeline's input, ``step_error`` (relative) against
    the pass's own; None where nothing was verified. ``exact`` says that every site was. ``timings`` holds what
    the pass measured, by layer and ranks.
    """

    name: str
    text: str
    exact: bool
    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]
    max_abs_error: float | None
    relative_error: float | None
    step_error: float | None
    seconds: float
    params: int
    flops: int
    depth: int
    note: str = ""
    timings: Mapping[str, Mapping[str, Timing]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PipelineResult:
    """The rewritten graph module, whether any pass modified it, and the ledger."""

    graph_module: fx.GraphModule
    modified: bool
    ledger: tuple[Record, ...]


@dataclass(frozen=True)
class Pipeline:
    """An ordered tuple of passes. Calling it returns a rewritten copy of a graph module and a ledger.

    >>> import fxlrd, fxlrd.passes, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    >>> pipeline = fxlrd.Pipeline([fxlrd.passes.Decompose(ratio=2)])
    >>> run = pipeline(fxlrd.capture(model, torch.randn(2, 64)))
    >>> [(site.name, site.note) for site in run.ledger[0].sites]
    [('0', 'svd at rank 16'), ('1', 'svd at rank 4')]

    The text form prints and parses back:

    >>> str(fxlrd.Pipeline.parse("decompose{ratio=3,skip=fc|layer1.*},snap"))
    'decompose{ratio=3,skip=fc|layer1.*},snap'
    """

    passes: tuple[Pass, ...]

    def __init__(self, passes: Iterable[Pass] | Pipeline) -> None:
        if isinstance(passes, Pipeline):
            passes = passes.passes
        if isinstance(passes, str) or not isinstance(passes, Iterable):
            raise FxlrdError(f"a pipeline takes a list of passes, not {passes!r}; for text: Pipeline.parse")
        object.__setattr__(self, "passes", tuple(passes))
        for p in self.passes:
            if not callable(p) or isinstance(p, type):
                raise FxlrdError(f"a pipeline takes passes, such as Decompose(), not {p!r}; for text: Pipeline.parse")

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read the text form. Raises FxlrdError for an unknown pass or option, with close matches.

        >>> Pipeline.parse("decompose{ratio=3},snap").passes[0].ratio
        3.0
        """
        return cls(spec.parse(text))

    @classmethod
    def preset(cls, name: str) -> Pipeline:
        """Return a preset by name. Raises FxlrdError for an unknown one."""
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        return cls.parse(PRESETS[name])

    def with_options(self, **options: Any) -> Pipeline:
        """Return the pipeline with each option set on the passes that read it. One that none reads is an error.

        >>> str(Pipeline.preset("ranks").with_options(ratio=3.0))
        'decompose{ratio=3},snap'
        """
        for option in options:
            if not self.reads(option):
                raise FxlrdError(f"{option}: no pass of {self} has this option")
        return Pipeline(
            replace(p, **{k: v for k, v in options.items() if k in spec.options(p)})  # type: ignore[type-var]
            for p in self.passes
        )

    def reads(self, option: str) -> bool:
        """Whether any pass reads this option."""
        return any(option in spec.options(p) for p in self.passes)

    @property
    def labels(self) -> list[str]:
        """The labels of the passes' steps, in order, as progress shows them."""
        return [step for p in self.passes for step in steps_of(label(p))]

    def __str__(self) -> str:
        return ",".join(spec.text(p) for p in self.passes)

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Any = None,
        *,
        verify: bool = True,
        callback: Callback | None = None,
        progress: Progress = quiet,
    ) -> PipelineResult:
        """Run the passes on ``gm``.

        ``example_inputs`` default to those that ``gm`` was captured with; without any, nothing is verified.
        ``callback(before, pass, after)`` is called after each pass. Raises FxlrdError before anything runs if a pass
        needs what neither ``gm`` has nor an earlier pass leaves, and VerificationError if an exact pass changed the
        outputs beyond rounding or any pass changed their number, shapes or dtypes.
        """
        execution = Execution(self.passes, gm, example_inputs, verify=verify, callback=callback)
        for step in self.passes:
            execution.carry_out(step, step, progress)
        return execution.result()


class Execution:
    """Passes carried out one by one on a copy of a graph module, each verified, with the ledger of those so far.

    It checks that ``passes`` may run in this order; arguments are those of `Pipeline.__call__`.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        gm: fx.GraphModule,
        example_inputs: Any = None,
        *,
        verify: bool = True,
        callback: Callback | None = None,
    ) -> None:
        self.graph_module = fork(gm)
        check_needs(passes, self.graph_module)
        annotate(self.graph_module)
        self._verification = Verification(self.graph_module, _inputs(self.graph_module, example_inputs), verify)
        self._callback = callback
        self._ledger: tuple[Record, ...] = ()

    def carry_out(self, step: Pass, run: Rewrite, progress: Progress = quiet) -> None:
        """Let ``run``, which does what the pass ``step`` does, rewrite the graph module; verify and record it."""
        start = time.perf_counter()
        result = run(self.graph_module, progress)
        seconds = time.perf_counter() - start
        record = _record(step, result, self._verification.after(step, result), seconds)
        self._ledger = (*self._ledger, record)
        if self._callback is not None:
            _call(self._callback, self.graph_module, step, result.graph_module)
        self.graph_module = result.graph_module
        give_back_freed()  # what a pass needed meanwhile is no help to the next

    def branch(self) -> Execution:
        """Return another execution that goes on from here and leaves this one as it is."""
        other = copy.copy(self)
        other._verification = copy.copy(self._verification)
        return other

    def result(self) -> PipelineResult:
        """Return the graph module as it is now, and the ledger."""
        ledger = self._ledger
        if ledger and (doubt := doubt_of_plan(self.graph_module)) is not None:
            ledger = (*ledger[:-1], replace(ledger[-1], warnings=(*ledger[-1].warnings, doubt)))
        return PipelineResult(self.graph_module, any(record.sites for record in ledger), ledger)


def _call(callback: Callback, before: fx.GraphModule, step: Pass, after: fx.GraphModule) -> None:
    try:
        callback(before, step, after)
    except Exception as error:
        raise FxlrdError(f"{label(step)}: the callback after this pass fails: {one_line(error)}") from error


def _inputs(gm: fx.GraphModule, example_inputs: Any) -> Inputs | None:
    if example_inputs is not None:
        return Inputs.of(example_inputs)
    capture = captured(gm)
    return capture.inputs if capture is not None else None


def _record(step: Pass, result: PassResult, errors: Errors, seconds: float) -> Record:
    gm = result.graph_module
    return Record(
        label(step),
        spec.text(step),
        result.exact,
        result.sites,
        result.skipped,
        errors.max_abs,
        errors.relative,
        errors.step,
        seconds,
        cost.params(gm) + captured_or_bare(gm).added_params(gm),
        cost.flops(gm),
        cost.depth(gm),
        result.note,
        result.timings,
        result.warnings,
    )
