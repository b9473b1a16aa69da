"""What the commands of the command line do. Each takes the parsed arguments; that of diff returns an exit status."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.app.models import DTYPES, calibration_for, evaluation_of, example_for, load_model, source_of
from fxlrd.app.output import check_writable, colored, show, write_json, write_page
from fxlrd.budget import Budget
from fxlrd.capturing.model import capture_any
from fxlrd.capturing.whole import capture
from fxlrd.compression import compress
from fxlrd.differences.compare import Steps, diff
from fxlrd.differences.model import Diff
from fxlrd.errors import CaptureError, FxlrdError, one_line
from fxlrd.graph.inputs import Inputs
from fxlrd.passes import Decompose, Snap
from fxlrd.pipeline import Pipeline
from fxlrd.progress import bar, one_bar
from fxlrd.report.report import Report
from fxlrd.request import pipeline_for
from fxlrd.saving.save import save
from fxlrd.tradeoffs import BUDGETS, frontier

_RATIO = 2.0


def run_demo(arguments: argparse.Namespace) -> None:
    """Compare the presets on the embedded network."""
    from fxlrd.app import demo

    _set_threads(arguments.threads)
    check_writable("--html", arguments.html)
    comparison = demo.run()
    write_page(comparison, arguments.html)
    show(comparison.to_table())


def run_compress(arguments: argparse.Namespace) -> None:
    """Compress a model, write what was asked for, and print the report."""
    budget = None if arguments.budget is None else _budget(arguments.budget)
    if arguments.save is not None and arguments.save.exists() and not arguments.save.is_dir():
        raise FxlrdError(f"--save {arguments.save}: that is a file; name a directory")
    options = {"preset": arguments.preset, "pipeline": arguments.passes, "budget": budget, "ratio": arguments.ratio}
    report = _compressed(arguments, folder=arguments.save, **options)
    show(report.to_table())


def run_frontier(arguments: argparse.Namespace) -> None:
    """Compress a model within several budgets, write what was asked for, and print the table."""
    if arguments.ratio is not None:
        raise FxlrdError("--ratio: budgets set every layer's ranks by themselves")
    if arguments.save is not None and arguments.save.exists() and not arguments.save.is_dir():
        raise FxlrdError(f"--save {arguments.save}: that is a file; name a directory")
    budgets = _budgets(arguments.budgets) if arguments.budgets is not None else BUDGETS
    evaluate = None if arguments.evaluate is None else evaluation_of(arguments.evaluate)
    model, x, calibration = _prepared(arguments)
    result = frontier(
        model,
        x,
        calibration=calibration,
        budgets=budgets,
        evaluate=evaluate,
        pipeline=arguments.passes,
        skip=arguments.skip,
        compile=arguments.compile,
        progress=True,
    )
    result = replace(result, model=arguments.model)
    for point in result.points if arguments.save is not None else ():
        source = source_of(arguments.model, arguments.weights)
        save(point.result(), arguments.save / str(point.budget), source=source)
    write_json(result.to_dict(), arguments.json)
    write_page(result, arguments.html)
    show(result.to_table())


def run_ranks(arguments: argparse.Namespace) -> None:
    """Print each layer's rank by ratio and as snapped, with the times behind them."""
    ratio = _RATIO if arguments.ratio is None else arguments.ratio
    pipeline = Pipeline([Decompose(ratio=ratio), Snap(search=arguments.search)])
    report = _compressed(arguments, pipeline=pipeline, measure=False)
    show(report.ranks_table())


def run_diff(arguments: argparse.Namespace) -> int:
    """Print what differs between two models, or before and after passes. Return 1 if anything does, else 0."""
    targets = [arguments.other, arguments.passes, arguments.preset]
    if sum(target is not None for target in targets) != 1:
        raise FxlrdError("diff: give another model, or --passes, or --preset")
    if arguments.steps and arguments.other is not None:
        raise FxlrdError("--steps: that is for --passes and --preset; two models have no steps between them")
    _set_threads(arguments.threads)
    check_writable("--json", arguments.json)
    check_writable("--html", arguments.html)
    steps: list[tuple[str, Diff]] = []
    if arguments.other is not None:
        total = _diff_of_models(arguments)
    else:
        total, steps = _diff_of_passes(arguments)
    _write_diff(arguments, total, steps if arguments.steps else [])
    return int(bool(total))


def run_profile(arguments: argparse.Namespace) -> None:
    """Print where a model's time goes."""
    from fxlrd.report.profile import profile

    _set_threads(arguments.threads)
    check_writable("--json", arguments.json)
    model, x = _example(arguments, arguments.model)
    ratio = _RATIO if arguments.ratio is None else arguments.ratio
    result = profile(model, x, ratio=ratio, skip=arguments.skip, compile=arguments.compile, progress=bar)
    result = replace(result, model=arguments.model)
    write_json(result.to_dict(), arguments.json)
    show(result.to_table())


def _compressed(arguments: argparse.Namespace, folder: Path | None = None, **options: Any) -> Report:
    """Compress the model, save it to ``folder``, write the report's files and return the report."""
    model, x, calibration = _prepared(arguments)
    result = compress(
        model,
        x,
        skip=arguments.skip,
        calibration=calibration,
        compile=arguments.compile,
        progress=True,
        **options,
    )
    report: Report = replace(result.report, model=arguments.model)
    if folder is not None:
        save(result, folder, source=source_of(arguments.model, arguments.weights))
    write_json(report.to_dict(), arguments.json)
    write_page(report, arguments.html)
    return report


def _prepared(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor, list[Tensor] | None]:
    """Return a model, an input for it and its calibration inputs, once the options have been checked."""
    _set_threads(arguments.threads)
    check_writable("--json", arguments.json)
    check_writable("--html", arguments.html)
    model, x = _example(arguments, arguments.model)
    data = getattr(arguments, "calibration", None)
    return model, x, None if data is None else calibration_for(data, arguments.batch, x)


def _diff_of_models(arguments: argparse.Namespace) -> Diff:
    model, x = _example(arguments, arguments.model)
    other, _ = _example(arguments, arguments.other)
    values = not arguments.no_values
    try:
        return diff(capture(model, x), capture(other, x), values=values)
    except CaptureError:  # one is not traceable: compare the modules, by name
        return diff(model, other, values=values)


def _diff_of_passes(arguments: argparse.Namespace) -> tuple[Diff, list[tuple[str, Diff]]]:
    """Return what all passes change together, and what each of them does, by its text."""
    model, x = _example(arguments, arguments.model)
    data = None if arguments.calibration is None else calibration_for(arguments.calibration, arguments.batch, x)
    pipeline = pipeline_for(
        ratio=arguments.ratio,
        preset=arguments.preset,
        pipeline=arguments.passes,
        skip=arguments.skip,
        calibration=data,
        compile=arguments.compile,
    )
    graphs = Steps()
    with one_bar(pipeline.labels) as show:
        run = pipeline(capture_any(model, Inputs.of(x)), callback=graphs, progress=show)
    values = not arguments.no_values
    steps = [(record.text, graphs.diff(i, i + 1, report=run, values=values)) for i, record in enumerate(run.ledger)]
    return graphs.diff(report=run, values=values), steps


def _write_diff(arguments: argparse.Namespace, total: Diff, steps: list[tuple[str, Diff]]) -> None:
    color = colored()
    text = "".join(f"{name}\n\n{d.to_text(color=color) or 'no difference'}\n\n\n" for name, d in steps)
    text += f"all\n\n{total.to_text(color=color)}" if steps else total.to_text(color=color)
    data = total.to_dict() | ({"steps": [{"pass": name, **d.to_dict()} for name, d in steps]} if steps else {})
    write_json(data, arguments.json)
    write_page(total, arguments.html)
    if text:
        show(text)


def _example(arguments: argparse.Namespace, name: str) -> tuple[nn.Module, Tensor]:
    """Return a model and an input for it as the options say."""
    dtype = DTYPES[arguments.dtype]
    model = load_model(name, arguments.weights, arguments.seed).to(dtype)
    x = example_for(arguments.input, arguments.batch, dtype, arguments.channels_last)
    if arguments.channels_last:
        model = model.to(memory_format=torch.channels_last)
    try:
        return model.to(arguments.device), x.to(arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise FxlrdError(f"--device {arguments.device}: {one_line(error)}") from error


def _budgets(text: str) -> list[Budget]:
    """Read several shares of one measure, such as latency=0.8,0.6."""
    measure, _, shares = text.partition("=")
    return [_budget(f"{measure}={share}") for share in shares.split(",")]


def _budget(text: str) -> Budget:
    try:
        return Budget.parse(text)
    except FxlrdError as error:
        raise FxlrdError(f"--{error}" if str(error).startswith("budget") else str(error)) from error


def _set_threads(count: int | None) -> None:
    if count is None:
        return
    if count < 1:
        raise FxlrdError(f"--threads {count}: at least one is needed")
    torch.set_num_threads(count)
