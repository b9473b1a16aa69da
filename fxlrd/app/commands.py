"""What the commands of the command line do. Each takes the parsed arguments; that of diff returns an exit status."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fxlrd.app.huggingface import check_target, save_folder
from fxlrd.app.models import architecture_of, evaluation_of, folder_of, huggingface_folder
from fxlrd.app.output import check_writable, colored, show, warn, write_json, write_page
from fxlrd.app.prepared import Prepared, prepared
from fxlrd.app.scores import Scores, ScoresInTurn, as_evaluation
from fxlrd.app.subject import Subject, subject_of
from fxlrd.app.training import train
from fxlrd.budget import Budget
from fxlrd.capturing.model import capture_any
from fxlrd.capturing.whole import capture
from fxlrd.compression import Result, compress
from fxlrd.differences.compare import Steps, diff
from fxlrd.differences.model import Diff
from fxlrd.errors import CaptureError, FxlrdError
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


def run_completion(arguments: argparse.Namespace) -> None:
    """Print what makes a shell complete the command line."""
    from fxlrd.app.completion import shell_code

    show(shell_code(arguments.shell))


def run_compress(arguments: argparse.Namespace) -> None:
    """Compress a model, train it if asked to, write what was asked for, and print the report."""
    budget = None if arguments.budget is None else _budget(arguments.budget)
    _check_folder(arguments)
    options = {"preset": arguments.preset, "pipeline": arguments.passes, "budget": budget, "ratio": arguments.ratio}
    passes = pipeline_for(**options)
    if arguments.calibration is not None and not passes.reads("calibration"):
        raise FxlrdError(
            f"calibration: no pass of {passes} reads it; give --budget latency=0.7, or --preset auto or merge"
        )
    ready = _prepared(arguments, passes.reads("calibration"))
    result = _compressed(arguments, ready, **options)
    scores = Scores(ready.measure, ready.subject.model)
    scores.add("compressed", result.model)
    if ready.training is not None:
        train(result.model, ready.subject.model, ready.training, ready.size, arguments)
        scores.add("fine-tuned", result.model)
    report: Report = scores.in_report(replace(result.report, model=arguments.model))
    if arguments.save is not None:
        _save(result, arguments.save, ready.subject, arguments)
    write_json(report.to_dict() | scores.to_dict(), arguments.json)
    write_page(report, arguments.html)
    show("\n\n".join([report.to_table(), *scores.to_table()]))


def run_frontier(arguments: argparse.Namespace) -> None:
    """Compress a model within several budgets, write what was asked for, and print the table."""
    if arguments.ratio is not None:
        raise FxlrdError("--ratio: budgets set every layer's ranks by themselves")
    if arguments.evaluate is not None and arguments.eval is not None:
        raise FxlrdError("--evaluate and --eval: give a function, or examples, to measure accuracy by")
    shares = arguments.budgets or "latency=" + ",".join(map(str, BUDGETS))
    budgets = _budgets(shares)
    _check_folder(arguments, list(map(str, budgets)))
    evaluate = None if arguments.evaluate is None else evaluation_of(arguments.evaluate)
    ready = _prepared(arguments)
    scores = None if evaluate is not None or ready.measure is None else ScoresInTurn(ready.measure)
    result = frontier(
        ready.subject.model,
        ready.x,
        calibration=ready.calibration,
        budgets=budgets,
        evaluate=evaluate or scores,
        pipeline=arguments.passes,
        skip=arguments.skip,
        compile=arguments.compile,
        progress=True,
    )
    result = replace(result, model=arguments.model)
    for point in result.points if arguments.save is not None else ():
        _save(point.result(), arguments.save / str(point.budget), ready.subject, arguments)
    named = {} if scores is None else scores.named(["original", *(str(point.budget) for point in result.points)])
    write_json(result.to_dict() | as_evaluation(ready.measure, named), arguments.json)
    write_page(result, arguments.html)
    show("\n\n".join([result.to_table(), *([ready.measure.table(named)] if named and ready.measure else [])]))


def run_ranks(arguments: argparse.Namespace) -> None:
    """Print each layer's rank by ratio and as snapped, with the times behind them."""
    ratio = _RATIO if arguments.ratio is None else arguments.ratio
    pipeline = Pipeline([Decompose(ratio=ratio), Snap(search=arguments.search)])
    result = _compressed(arguments, _prepared(arguments), pipeline=pipeline, measure=False)
    report: Report = replace(result.report, model=arguments.model)
    write_json(report.to_dict(), arguments.json)
    write_page(report, arguments.html)
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
    subject = subject_of(arguments.model, arguments)
    model, x = subject.model, subject.example()
    ratio = _RATIO if arguments.ratio is None else arguments.ratio
    result = profile(model, x, ratio=ratio, skip=arguments.skip, compile=arguments.compile, progress=bar)
    result = replace(result, model=arguments.model)
    write_json(result.to_dict(), arguments.json)
    show(result.to_table())


def _compressed(arguments: argparse.Namespace, ready: Prepared, **options: Any) -> Result:
    return compress(
        ready.subject.model,
        ready.x,
        skip=arguments.skip,
        calibration=ready.calibration,
        compile=arguments.compile,
        progress=True,
        **options,
    )


def _prepared(arguments: argparse.Namespace, calibrates: bool = False) -> Prepared:
    """Return what the options ask for, once those of the output have been checked."""
    _set_threads(arguments.threads)
    check_writable("--json", arguments.json)
    check_writable("--html", arguments.html)
    return prepared(arguments, calibrates)


def _check_folder(arguments: argparse.Namespace, inside: Sequence[str] = ()) -> None:
    """Raise FxlrdError for a folder to save to, or folders ``inside`` it, where something else is."""
    if arguments.save is None:
        return
    if arguments.save.exists() and not arguments.save.is_dir():
        raise FxlrdError(f"--save {arguments.save}: that is a file; name a directory")
    folder = huggingface_folder(arguments.model)
    for target in (arguments.save, *(arguments.save / name for name in inside)):
        if folder is not None:
            check_target(Path(folder).expanduser(), target)


def _save(result: Result, folder: Path, subject: Subject, arguments: argparse.Namespace) -> None:
    """Save a result: a model of transformers as a folder of that library, others as a checkpoint."""
    if subject.folder is not None:
        save_folder(result.model, subject.folder, folder)
    else:
        source = architecture_of(arguments.model, arguments.weights, subject.model)
        if source is None:
            warn(f"{folder}: no name makes this architecture: open it in Python, by fxlrd.load({str(folder)!r}, model)")
        save(result, folder, source=source)


def _diff_of_models(arguments: argparse.Namespace) -> Diff:
    options = [_with_weights_of_its_own(arguments, name) for name in (arguments.model, arguments.other)]
    subject = subject_of(arguments.model, options[0])
    model, x = subject.model, subject.example()
    other = subject_of(arguments.other, options[1]).model
    values = not arguments.no_values
    try:
        return diff(capture(model, x), capture(other, x), values=values)
    except CaptureError:  # one is not traceable: compare the modules, by name
        return diff(model, other, values=values)


def _with_weights_of_its_own(arguments: argparse.Namespace, name: str) -> argparse.Namespace:
    """Return the options for one of two models: --weights are those of the other one where this one is in a folder."""
    other = arguments.other if name == arguments.model else arguments.model
    if folder_of(name) is None or folder_of(other) is not None:
        return arguments
    return argparse.Namespace(**{**vars(arguments), "weights": None})


def _diff_of_passes(arguments: argparse.Namespace) -> tuple[Diff, list[tuple[str, Diff]]]:
    """Return what all passes change together, and what each of them does, by its text."""
    ready = prepared(arguments)
    pipeline = pipeline_for(
        ratio=arguments.ratio,
        preset=arguments.preset,
        pipeline=arguments.passes,
        skip=arguments.skip,
        calibration=ready.calibration,
        compile=arguments.compile,
    )
    graphs = Steps()
    with one_bar(pipeline.labels) as show:
        run = pipeline(capture_any(ready.subject.model, Inputs.of(ready.x)), callback=graphs, progress=show)
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
