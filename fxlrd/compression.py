"""compress(): a trained model in, a smaller, verified, measured one out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxlrd.budget import Budget
from fxlrd.calibration.holdout import let_go
from fxlrd.capturing.model import capture_any
from fxlrd.capturing.watch import counted
from fxlrd.differences.compare import diff
from fxlrd.errors import FxlrdError, VerificationError, one_line
from fxlrd.graph import cost
from fxlrd.graph.captured import captured, runnable
from fxlrd.graph.compare import difference, rounding
from fxlrd.graph.cost import Cost
from fxlrd.graph.facts import forget
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.regions import independent_copy, structural_copy, undo
from fxlrd.graph.run import evaluating, seeded, unmoved
from fxlrd.passes.contract import Pass
from fxlrd.pipeline import Pipeline, Record
from fxlrd.progress import Progress, bar, quiet
from fxlrd.report.report import Report, figures
from fxlrd.report.rows import layer_rows
from fxlrd.report.table import summary
from fxlrd.request import check_context, check_model, pipeline_for
from fxlrd.saving.architecture import lay_out, lay_out_graph, remember, shapes_before
from fxlrd.timing.cache import Setting
from fxlrd.timing.clock import Timing, compare
from fxlrd.timing.inductor import compiled


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
    compile: bool = False,
    measure: bool = True,
    verify: bool = True,
    inplace: bool = False,
    progress: bool = False,
) -> Result:
    """Compress a model by low-rank decomposition and verify every step.

    Args:
        model: any traceable module, on any device, in any dtype. It is captured in eval mode.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, as the model
            will get them: shapes, dtype, memory format and batch are those that are timed.
        ratio: compression ratio of each layer (parameters before / after), for the passes that take one.
        preset: lrd (the default), ranks, merge, branch, freeze or auto, see `fxlrd.pipeline.PRESETS`.
        pipeline: passes to run instead of a preset, as a `Pipeline`, a list of passes or in text form.
        budget: what the result may cost, as a share of the original: ``Budget(latency=0.5)``, or params or flops.
            Preset auto, which it stands for, chooses the form of each layer under it; it needs ``calibration``.
        skip: names or globs of layers to leave alone.
        calibration: inputs like the real ones for the passes that fit to data (merge, auto): a tensor, or an
            iterable of batches, such as a DataLoader; of (x, y) pairs x is taken. No labels are needed. Where several
            passes read them (auto), all are held in memory; otherwise they are read one batch at a time.
        compile: time layers and model under Inductor with frozen weights, instead of eagerly.
        measure: time the whole model before and after, side by side.
        verify: compare the outputs after each pass with those before.
        inplace: put the new layers into ``model`` itself and return it. Otherwise the result shares nothing with
            ``model``, which stays as it is.
        progress: show progress bars while standard error is a terminal.

    Returns:
        The compressed model, in the mode (train or eval) that each of the original's modules was in, and the
        report.

    Raises:
        FxlrdError: for a request that cannot be met; the message is one line, with the remedy.
    """
    check_context()
    check_model(model, inplace)
    steps = pipeline_for(
        ratio=ratio,
        preset=preset,
        pipeline=pipeline,
        budget=budget,
        skip=skip,
        calibration=calibration,
        compile=compile,
    )
    inputs = Inputs.of(example_inputs)
    show: Progress[Any] = bar if progress else quiet
    original = capture_any(model, inputs, shapes_before(model))
    done = steps(original, verify=verify, progress=show)
    gm = done.graph_module
    capture = captured(original)
    assert capture is not None
    warnings = list(capture.warnings)
    # Run before anything is put into the model.
    reference = seeded(model, inputs) if capture.user_forward else None
    timings = _measure(model, original, gm, inputs, compile) if measure else {}
    if timings and done.modified and not timings["after"].faster():
        warnings.append(
            f"not faster than the original here: {1 / timings['after'].ratio:.2f}× its speed; "
            "try a larger ratio, the ranks preset, or another batch size"
        )
    # What no node stands for stays in the model: layers that are never called in eval mode, and all around regions.
    stays = inplace or capture.user_forward
    outside = Cost(cost.params(model) - cost.params(original) if stays else 0, capture.outside.flops)
    last = None
    if not stays:
        compressed: nn.Module = _independent(gm, model)
        remember(compressed, lay_out_graph(model, original, gm))
    else:
        compressed, last = _install(gm, original, model, inplace)
    after = figures(gm, timings.get("after"), outside)
    if last is not None:  # a graph has one call of a region for each shape of its inputs; the model may have more
        after["flops"] = last[1]
    report = Report(
        model=type(model).__name__,
        device=Setting.here(_device(model, inputs), compile).device,
        settings=_settings(steps, inputs, compile, timings),
        before=figures(original, timings.get("before"), outside),
        after=after,
        layers=layer_rows(original, gm, done.ledger, dropped=not stays),
        passes=[_pass_row(record) for record in done.ledger],
        warnings=warnings,
        ledger=done.ledger,
        diff=diff(original, gm, report=done.ledger).to_dict(),
    )
    if last is not None and verify:
        report.settings["output_error"] = _moved(last[0], reference)
    return Result(compressed, report)


def _last_run(model: nn.Module, inputs: Inputs) -> tuple[Any, int]:
    try:
        return counted(model, inputs)
    except FxlrdError as error:
        cause = one_line(error.__cause__ or error)
        raise VerificationError(f"the compressed model fails on the example inputs: {cause}") from error


def _moved(outputs: Any, reference: Any) -> float | None:
    """Return how far the whole model's outputs lie from the original's, relative; None where they do not compare."""
    if not any(t.numel() for t in tensors(reference)):  # such as a detector that finds nothing
        return None
    try:
        return difference(tensors(outputs), tensors(reference), "output").relative
    except VerificationError:  # a detector may find another number of boxes
        return None


def _device(model: nn.Module, inputs: Inputs) -> torch.device:
    found = next(model.parameters(), None)
    given = found if found is not None else next(iter(tensors((inputs.args, inputs.kwargs))))
    return given.device


def _measure(
    model: nn.Module, original: fx.GraphModule, gm: fx.GraphModule, inputs: Inputs, under_inductor: bool
) -> dict[str, Timing]:
    """Time the user's model and the result side by side."""
    inputs = inputs.fresh()
    new = runnable(gm)
    with torch.no_grad(), unmoved(model), evaluating(model), evaluating(new):
        before, after = (compiled(runnable(original)), compiled(new)) if under_inductor else (model, new)
        return compare(
            {
                "before": lambda: before(*inputs.args, **inputs.kwargs),
                "after": lambda: after(*inputs.args, **inputs.kwargs),
            },
            _device(model, inputs),
            seconds=4.0,
        )


def _settings(steps: Pipeline, inputs: Inputs, under_inductor: bool, timings: dict[str, Timing]) -> dict[str, Any]:
    given = tensors((inputs.args, inputs.kwargs))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = any(
        t.dim() in formats and t.is_contiguous(memory_format=formats[t.dim()]) and not t.is_contiguous() for t in given
    )
    settings: dict[str, Any] = {
        "pipeline": str(steps),
        "inputs": inputs.describe(),
        "layout": "channels_last" if last else "contiguous",
        "compile": under_inductor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    settings["mode"] = (
        f"{settings['layout']}, {'Inductor' if under_inductor else 'eager'}, {settings['threads']} threads, "
        f"torch {settings['torch']}"
    )
    if timings:
        ratio, spread = timings["after"].ratio, timings["after"].spread
        settings["speedup"] = 1 / ratio
        settings["speedup_spread"] = spread / ratio**2
    return settings


def _pass_row(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        "text": record.text,
        "exact": record.exact,
        "sites": [{"name": site.name, "note": site.note} for site in record.sites],
        "skipped": [{"name": skip.name, "reason": str(skip.reason)} for skip in record.skipped],
        "max_abs_error": record.max_abs_error,
        "relative_error": record.relative_error,
        "step_error": record.step_error,
        "seconds": record.seconds,
        "params": record.params,
        "flops": record.flops,
        "depth": record.depth,
        "note": record.note,
    }


def _independent(gm: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """Return a copy that shares no tensor with ``model`` and does not keep it alive."""
    let_go(gm)
    result = copy.deepcopy(gm)
    forget(result)  # neither the example inputs nor an executed plan belong in a saved model
    _restore_modes(result, model)
    return result


def _restore_modes(result: nn.Module, model: nn.Module) -> None:
    """Give each module the mode of its namesake in ``model``, or of the nearest module around that."""
    modes = {name: m.training for name, m in model.named_modules(remove_duplicate=False)}
    for name, module in result.named_modules(remove_duplicate=False):
        around = name
        while around not in modes:
            around = around.rpartition(".")[0]
        module.training = modes[around]


def _install(
    gm: fx.GraphModule, original: fx.GraphModule, model: nn.Module, inplace: bool
) -> tuple[nn.Module, tuple[Any, int] | None]:
    """Return ``model``, or a copy of it, with the rewritten layers in it under their names.

    Where the graph is of regions, also its outputs and FLOPs then. Undone if it computes anything else than the graph.
    """
    capture = captured(original)
    assert capture is not None
    target = model if inplace else structural_copy(model)
    last = None
    before = capture.install(gm, target)
    try:
        moved = capture.difference_inside(target, gm)
        if capture.user_forward:
            last = _last_run(target, capture.inputs)
        if moved.relative > rounding(list(model.parameters())):
            raise VerificationError(f"the outputs differ by {moved.relative:.2g}")
    except BaseException as error:
        undo(target, before)
        if not isinstance(error, FxlrdError):
            raise
        remedy = "name what reads them in skip=" if capture.user_forward else "use inplace=False"
        raise VerificationError(f"the model does not use its layers as its graph does ({error}); {remedy}") from error
    result = target if inplace else independent_copy(target)
    remember(result, lay_out(target, model, before))
    return result, last
