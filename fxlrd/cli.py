"""The command line: fxlrd demo, compress, ranks, diff, profile."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fxlrd.errors import FxlrdError, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fxlrd.app.demo import Comparison
    from fxlrd.budget import Budget
    from fxlrd.differences.model import Diff
    from fxlrd.report.report import Report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 2 for a request that cannot be met.

    Of diff, as of diff(1): 0 the same, 1 different, 2 trouble.
    """
    try:
        arguments = _arguments(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            return arguments.run(arguments) or 0
    except FxlrdError as error:
        print(f"fxlrd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fxlrd: interrupted; nothing was written, timings so far are kept", file=sys.stderr)
        return 130
    except Exception:  # a defect, of which Python's own status 1 would read as "different"
        traceback.print_exc()
        return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; the second model of diff may stand after options, where argparse does not look for it."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(arguments, "other", "") is None:
        arguments.other, rest = rest[0], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FxlrdError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    from fxlrd import __version__
    from fxlrd.app.models import DTYPES, NAMES
    from fxlrd.pipeline import PRESETS

    parser = _Parser(prog="fxlrd", description="Trained PyTorch models, faster by low-rank decomposition.")
    parser.add_argument("--version", action="version", version=f"fxlrd {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    common = _Parser(add_help=False)
    common.add_argument("model", metavar="MODEL", help=NAMES)
    common.add_argument("--weights", help="torchvision weights, such as DEFAULT (default: random, seeded)")
    common.add_argument("--seed", type=int, default=0, help="seed of random weights")
    common.add_argument("--ratio", type=float, help="compression ratio of each layer (default: 2)")
    common.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave layers alone: name or glob")
    common.add_argument("--batch", type=int, default=1, metavar="N", help="batch size (default: 1)")
    common.add_argument("--input", default="3x224x224", metavar="SHAPE", help="shape of one example")
    common.add_argument("--dtype", choices=DTYPES, default="float32")
    common.add_argument("--device", default="cpu", help="where to run and time (default: cpu)")
    common.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    common.add_argument("--compile", action="store_true", help="time under Inductor with frozen weights")
    common.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    common.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    page = _Parser(add_help=False)
    page.add_argument("--html", type=Path, metavar="FILE", help="write the same as one HTML page")

    compress = commands.add_parser("compress", parents=[common, page], help="compress a model and report on it")
    compress.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: lrd)")
    compress.add_argument("--passes", metavar="SPEC", help="passes in text form: decompose{ratio=2},snap")
    compress.add_argument("--budget", metavar="M=SHARE", help="latency=0.5, params=0.5 or flops=0.5 of the original's")
    compress.add_argument("--calibration", metavar="DATA", help=".npy or .pt file of inputs, or random (merge, auto)")
    compress.add_argument("--save", type=Path, metavar="DIR", help="save the result, to be a MODEL or for fxlrd.load")
    compress.set_defaults(run=_compress)

    ranks = commands.add_parser("ranks", parents=[common, page], help="show each layer's rank by ratio and by timing")
    ranks.add_argument("--search", choices=["grid", "algorithm1"], default="grid")
    ranks.set_defaults(run=_ranks)

    diff = commands.add_parser(
        "diff",
        parents=[common, page],
        help="show what differs between two models, or what passes do to one",
        description="Exit status: 0 the same, 1 different, 2 trouble.",
        usage="%(prog)s MODEL (MODEL | --passes SPEC | --preset P) [--steps] [options]",
    )
    diff.add_argument("other", metavar="MODEL", nargs="?", help="the other model")
    diff.add_argument("--passes", metavar="SPEC", help="compare with what these passes make of it")
    diff.add_argument("--preset", help=f"compare with what a preset makes of it: {', '.join(PRESETS)}")
    diff.add_argument("--calibration", metavar="DATA", help=".npy or .pt file of inputs, or random (merge)")
    diff.add_argument("--steps", action="store_true", help="show what each of the passes does, in order")
    diff.add_argument("--no-values", action="store_true", help="leave the weights out of the comparison")
    diff.set_defaults(run=_diff)

    profile = commands.add_parser(
        "profile", parents=[common], help="show where a model's time goes and which layers are worth decomposing"
    )
    profile.set_defaults(run=_profile)

    demo = commands.add_parser(
        "demo", parents=[page], help="compare the presets on an embedded trained network, in two minutes"
    )
    demo.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    demo.set_defaults(run=_demo)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from fxlrd.app.demo import run

    _set_threads(arguments.threads)
    _check_writable("--html", arguments.html)
    comparison = run()
    _write_page(comparison, arguments.html)
    _print(comparison.to_table())


def _compress(arguments: argparse.Namespace) -> None:
    budget = None if arguments.budget is None else _budget(arguments.budget)
    options = {"preset": arguments.preset, "pipeline": arguments.passes, "budget": budget}
    report = _run(arguments, arguments.calibration, arguments.save, **options)
    _print(report.to_table())


def _diff(arguments: argparse.Namespace) -> int:
    given = [arguments.other, arguments.passes, arguments.preset]
    if sum(g is not None for g in given) != 1:
        raise FxlrdError("diff: give another model, or --passes, or --preset")
    if arguments.steps and arguments.other is not None:
        raise FxlrdError("--steps: that is for --passes and --preset; two models have no steps between them")
    _set_threads(arguments.threads)
    _check_writable("--json", arguments.json)
    _check_writable("--html", arguments.html)
    whole, steps = _compared(arguments)
    color = _color()
    text = "".join(f"{name}\n\n{d.to_text(color=color) or 'no difference'}\n\n\n" for name, d in steps)
    text += f"all\n\n{whole.to_text(color=color)}" if steps else whole.to_text(color=color)
    data = whole.to_dict() | ({"steps": [{"pass": name, **d.to_dict()} for name, d in steps]} if steps else {})
    _write_json(data, arguments.json)
    _write_page(whole, arguments.html)
    if text:
        _print(text)
    return int(bool(whole))


def _compared(arguments: argparse.Namespace) -> tuple[Diff, list[tuple[str, Diff]]]:
    """Return the difference that is asked for and, with --steps, that of each pass."""
    from fxlrd.app.models import calibration_for
    from fxlrd.capturing.model import _capture
    from fxlrd.capturing.whole import capture
    from fxlrd.differences.compare import Steps, diff
    from fxlrd.errors import CaptureError
    from fxlrd.graph.inputs import Inputs
    from fxlrd.progress import bar
    from fxlrd.request import steps_for

    values = not arguments.no_values
    model, x = _example(arguments, arguments.model)
    if arguments.other is not None:
        other, _ = _example(arguments, arguments.other)
        try:
            return diff(capture(model, x), capture(other, x), values=values), []
        except CaptureError:  # not as graphs then
            return diff(model, other, values=values), []
    data = None if arguments.calibration is None else calibration_for(arguments.calibration, arguments.batch, x)
    passes = steps_for(
        arguments.ratio, arguments.preset, arguments.passes, None, arguments.skip, data, arguments.compile
    )
    steps = Steps()
    done = passes(_capture(model, Inputs.of(x)), callback=steps, progress=bar)
    each = [(record.text, steps.diff(i, i + 1, report=done, values=values)) for i, record in enumerate(done.ledger)]
    return steps.diff(report=done, values=values), each if arguments.steps else []


def _color() -> bool:
    """Whether to colour: on a terminal, unless the environment says otherwise (no-color.org, force-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _profile(arguments: argparse.Namespace) -> None:
    from fxlrd.progress import bar
    from fxlrd.report.profile import profile

    _set_threads(arguments.threads)
    _check_writable("--json", arguments.json)
    model, x = _example(arguments, arguments.model)
    ratio = 2.0 if arguments.ratio is None else arguments.ratio
    found = profile(model, x, ratio=ratio, skip=arguments.skip, compile=arguments.compile, progress=bar)
    found = replace(found, model=arguments.model)
    _write_json(found.to_dict(), arguments.json)
    _print(found.to_table())


def _budget(text: str) -> Budget:
    from fxlrd.budget import Budget

    try:
        return Budget.parse(text)
    except FxlrdError as error:
        raise FxlrdError(f"--{error}" if str(error).startswith("budget") else str(error)) from error


def _ranks(arguments: argparse.Namespace) -> None:
    from fxlrd.passes import Decompose, Snap
    from fxlrd.pipeline import Pipeline

    ratio = 2.0 if arguments.ratio is None else arguments.ratio
    arguments.ratio = None
    pipeline = Pipeline([Decompose(ratio=ratio), Snap(search=arguments.search)])
    report = _run(arguments, pipeline=pipeline, measure=False)
    _print(report.ranks_table())


def _run(
    arguments: argparse.Namespace, calibration: str | None = None, folder: Path | None = None, **options: Any
) -> Report:
    from fxlrd.app.models import calibration_for, source_of
    from fxlrd.compression import compress
    from fxlrd.saving.save import save

    _set_threads(arguments.threads)
    _check_writable("--json", arguments.json)
    _check_writable("--html", arguments.html)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise FxlrdError(f"--save {folder}: that is a file; name a directory")
    model, x = _example(arguments, arguments.model)
    result = compress(
        model,
        x,
        ratio=arguments.ratio,
        skip=arguments.skip,
        calibration=None if calibration is None else calibration_for(calibration, arguments.batch, x),
        compile=arguments.compile,
        progress=True,
        inplace=False,
        **options,
    )
    report: Report = replace(result.report, model=arguments.model)
    if folder is not None:
        save(result, folder, source=source_of(arguments.model, arguments.weights))
    _write_json(report.to_dict(), arguments.json)
    _write_page(report, arguments.html)
    return report


def _print(text: str) -> None:
    """Print to standard output, if there is one: what cannot be printed there must not change the exit status."""
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        # What is left in the buffer would be tried again, and fail, when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # otherwise the reader (head, less) had enough
            raise FxlrdError(f"standard output: {one_line(error)}") from error


def _write_json(data: Any, path: Path | None) -> None:
    from fxlrd.files import write_out

    if path is None:
        return
    try:
        write_out(path, json.dumps(data, indent=1) + "\n")
    except OSError as error:
        raise FxlrdError(f"--json {path}: {one_line(error)}") from error


def _write_page(shown: Report | Comparison | Diff, path: Path | None) -> None:
    if path is None:
        return
    try:
        shown.to_html(path)
    except OSError as error:
        raise FxlrdError(f"--html {path}: {one_line(error)}") from error


def _example(arguments: argparse.Namespace, name: str) -> tuple[nn.Module, Tensor]:
    """Return a model and an input for it as the options say."""
    import torch

    from fxlrd.app.models import DTYPES, example_for, load_model

    dtype = DTYPES[arguments.dtype]
    model = load_model(name, arguments.weights, arguments.seed).to(dtype)
    x = example_for(arguments.input, arguments.batch, dtype, arguments.channels_last)
    if arguments.channels_last:
        model = model.to(memory_format=torch.channels_last)
    try:
        return model.to(arguments.device), x.to(arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise FxlrdError(f"--device {arguments.device}: {one_line(error)}") from error


def _set_threads(count: int | None) -> None:
    import torch

    if count is not None:
        if count < 1:
            raise FxlrdError(f"--threads {count}: at least one is needed")
        torch.set_num_threads(count)


def _check_writable(option: str, path: Path | None) -> None:
    """Fail before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise FxlrdError(f"{option} {path}: that is a folder; name a file")
    around = path.absolute().parent
    if not around.is_dir():
        raise FxlrdError(f"{option} {path}: the folder {around} does not exist")


def _warn(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    print(f"fxlrd: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
