"""compress(): a trained model in, a smaller, verified, measured one out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxlrd.budget import Budget
from fxlrd.capturing.model import capture_any
from fxlrd.differences.compare import diff
from fxlrd.graph.captured import captured_or_bare, runnable
from fxlrd.graph.copies import structural_copy
from fxlrd.graph.facts import job
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.originals import letting_go
from fxlrd.installation import Installed, install, users_outputs
from fxlrd.passes import PASSES, Decompose
from fxlrd.passes.contract import Pass
from fxlrd.pipeline import Pipeline, PipelineResult
from fxlrd.progress import alone, one_bar
from fxlrd.report.report import Report
from fxlrd.report.table import summary
from fxlrd.request import all_inputs, check_agreed, check_context, check_model, pipeline_for
from fxlrd.saving.architecture import original_shapes
from fxlrd.sharing import FirstsTimer, Job, sharing
from fxlrd.timing.clock import Timer, Timing, compare
from fxlrd.timing.inductor import Compile
from fxlrd.timing.models import device_of, time_models


@dataclass(frozen=True, repr=False)
class Result:
    """The compressed ``model`` and the ``report`` on its compression."""

    model: nn.Module
    report: Report

    def __repr__(self) -> str:
        return f"Result({summary(self.report.to_dict())})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the report's headline and layers."""
        return self.report._repr_html_()


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    ratio: float | None = None,
    preset: str | None = None,
    pipeline: Pipeline | Sequence[Pass] | str | None = None,
    budget: Budget | None = None,
    skip: str | Sequence[str] = (),
    calibration: Any = None,
    compile: Compile = False,
    measure: bool = True,
    verify: bool = True,
    inplace: bool = False,
    progress: bool = False,
    timer: Timer = compare,
) -> Result:
    """Compress a model by low-rank decomposition, and verify the outputs after every pass.

    >>> import fxlrd, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> x = torch.randn(8, 64)
    >>> result = fxlrd.compress(model, x, ratio=2, measure=False)
    >>> [(row["name"], row["decision"], row["ranks"]) for row in result.report.layers]
    [('0', 'svd', [16]), ('2', 'svd', [4])]
    >>> result.model(x).shape
    torch.Size([8, 10])

    With inputs like the real ones, every layer's form is chosen under one budget and fitted to them:

    >>> calibration = [torch.randn(32, 64) for _ in range(4)]
    >>> budget = fxlrd.Budget(params=0.6)
    >>> result = fxlrd.compress(model, x, budget=budget, calibration=calibration, measure=False)
    >>> result.report.after["params"] < 0.61 * result.report.before["params"]
    True

    Args:
        model: any module, on any device, in any dtype. It is captured in eval mode; a model that cannot be traced as
            a whole keeps its own forward, and layers are replaced inside it.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, as the model
            will get them: their shapes, dtype, memory format and batch size are those that are timed.
        ratio: compression ratio of each layer (parameters before / after), for the passes that take one.
        preset: lrd (the default), ranks, merge, branch, freeze or auto, see `fxlrd.pipeline.PRESETS`.
        pipeline: passes to run instead of a preset: a `Pipeline`, a list of passes, or their text form.
        budget: what the result may cost, as a fraction of the original: ``Budget(latency=0.5)``, or params, flops or
            layers. It runs the preset auto, which chooses the form of each layer under it and needs ``calibration``.
        skip: names or globs of layers to leave alone.
        calibration: inputs like the real ones for the passes that fit to data (merge, auto): a tensor, or an
            iterable of batches, such as a DataLoader. No labels are needed; of (x, y) pairs x is used. If several
            passes read them (auto), all are held in memory; otherwise one batch at a time.
        compile: time layers and model under Inductor with frozen weights, instead of eagerly; "int8": also quantised
            for CPUs by torchao, so that forms are chosen that are fast in int8. The result has the model's own dtype.
        measure: time the whole model before and after, side by side.
        verify: compare the outputs after each pass with those before.
        inplace: put the new layers into ``model`` itself and return it. Otherwise the result shares nothing with
            ``model``, which stays as it is. With ``measure=False`` and decompose alone, each original weight leaves the
            memory as its layer is decomposed, for a temporary file, from which all come back if something fails.
        progress: show a progress bar, with the time left, on a terminal (standard error) or in a notebook.
        timer: what times layers and models: a stand-in for `fxlrd.timing.clock.compare`, for tests.

    Returns:
        The compressed model, each module in the mode (train or eval) that it had in the original, and the report.

    Raises:
        FxlrdError: for a request that cannot be met; the message is one line, with the remedy.
    """
    check_context()
    check_model(model, inplace)
    inputs = Inputs.of(example_inputs)
    with sharing(model) as shared:
        if shared is not None:
            calibration = None if calibration is None else all_inputs(shared, calibration)
            timer = FirstsTimer(shared, timer)
        passes = pipeline_for(
            ratio=ratio,
            preset=preset,
            pipeline=pipeline,
            budget=budget,
            skip=skip,
            calibration=calibration,
            compile=compile,
            timer=timer,
        )
        if shared is not None:
            check_agreed(shared, model, inputs, passes)
        with one_bar(["capture", *passes.labels, "timing the models"], shown=progress) as show:
            original = alone(show, "capture", lambda: _captured(model, inputs, inplace, shared))
            reference = users_outputs(original) if verify else None
            with (
                letting_go(original, model)
                if inplace and not measure and _needs_no_originals(passes)
                else nullcontext()
            ):
                run = passes(original, verify=verify, progress=show)
                timings = {}
                if measure:
                    graphs = {"after": run.graph_module}
                    timings = alone(show, "timing the models", lambda: timed(model, original, graphs, compile, timer))
                own = all(type(step) in PASSES.values() for step in passes.passes)  # others may hold what they made
                installed = install(original, run.graph_module, model, inplace=inplace, reference=reference, own=own)
                report = report_on(model, original, run, installed, passes, compile, timings)
    return Result(installed.model, report)


def _needs_no_originals(passes: Pipeline) -> bool:
    """Whether each layer's weight is read once only, by the pass that replaces it."""
    return [type(step) for step in passes.passes] == [Decompose]


def _captured(model: nn.Module, inputs: Inputs, inplace: bool, shared: Job | None) -> fx.GraphModule:
    original = capture_any(model, inputs, original_shapes(model), complete=inplace)
    if shared is not None:
        job.record(original, shared)
    return original


def report_on(
    model: nn.Module,
    original: fx.GraphModule,
    run: PipelineResult,
    installed: Installed,
    passes: Pipeline,
    under_inductor: Compile,
    timings: Mapping[str, Timing],
) -> Report:
    """Return the report on what ``passes`` made of ``model``, whose graph is ``original``; `Report.of` has the rest."""
    return Report.of(
        original,
        run,
        installed,
        model=type(model).__name__,
        device=device_of(model, captured_or_bare(original).inputs),
        pipeline=passes,
        under_inductor=under_inductor,
        timings=timings,
        diff=diff(original, run.graph_module, report=run.ledger).to_dict(),
    )


def timed(
    model: nn.Module,
    original: fx.GraphModule,
    graphs: Mapping[str, fx.GraphModule],
    under_inductor: Compile,
    timer: Timer,
) -> dict[str, Timing]:
    """Time the model ``before``, and as each of ``graphs``, side by side."""
    capture = captured_or_bare(original)
    before = runnable(original) if under_inductor else structural_copy(capture.model or model)
    models = {"before": before, **{name: runnable(gm) for name, gm in graphs.items()}}
    seconds = 2.0 * len(models)
    return time_models(models, capture.inputs, under_inductor=under_inductor, seconds=seconds, timer=timer)
