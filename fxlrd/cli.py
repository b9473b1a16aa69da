"""The command line: demo, compress, frontier, ranks, diff, profile. fxlrd/app/commands.py has what each does."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fxlrd import __version__
from fxlrd.app import commands
from fxlrd.app.models import DTYPES, NAMES
from fxlrd.errors import FxlrdError
from fxlrd.escaping import visible
from fxlrd.pipeline import PRESETS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 for success and 2 for a request that cannot be met. For ``diff`` it is that of diff(1): 0 the
    same, 1 different, 2 trouble. Ctrl-C gives 130.
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
        print("fxlrd: interrupted; no file is half-written, and timings stay in the cache", file=sys.stderr)
        return 130
    except Exception:  # a defect; Python's own exit status, 1, would read as "different"
        traceback.print_exc()
        return 2


def _warn(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    print(f"fxlrd: warning: {visible(str(message))}", file=sys.stderr)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. argparse does not find the second model of diff where it follows options."""
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
    parser = _Parser(prog="fxlrd", description="Trained PyTorch models, faster by low-rank decomposition.")
    parser.add_argument("--version", action="version", version=f"fxlrd {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    model, page = _model_options(), _page_option()
    _add_compress(subparsers, [model, page])
    _add_frontier(subparsers, [model, page])
    _add_ranks(subparsers, [model, page])
    _add_diff(subparsers, [model, page])
    _add_profile(subparsers, [model])
    _add_demo(subparsers, [page])
    return parser


def _model_options() -> _Parser:
    """Return the options of every command that takes a model."""
    parser = _Parser(add_help=False)
    parser.add_argument("model", metavar="MODEL", help=NAMES)
    parser.add_argument("--weights", help="torchvision weights, such as DEFAULT (default: random, seeded)")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights")
    parser.add_argument("--ratio", type=float, help="compression ratio of each layer (default: 2)")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave layers alone: name or glob")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="batch size (default: 1)")
    parser.add_argument("--input", default="3x224x224", metavar="SHAPE", help="shape of one example")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="where to run and time (default: cpu)")
    parser.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    timed = parser.add_mutually_exclusive_group()
    timed.add_argument("--compile", action="store_true", help="time under Inductor with frozen weights")
    timed.add_argument("--int8", action="store_const", const="int8", dest="compile", help="time under Inductor in int8")
    _add_threads(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    return parser


def _page_option() -> _Parser:
    parser = _Parser(add_help=False)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as one HTML page")
    return parser


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")


def _add_compress(subparsers: Any, parents: list[_Parser]) -> None:
    parser = subparsers.add_parser("compress", parents=parents, help="compress a model and report on it")
    parser.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: lrd)")
    parser.add_argument("--passes", metavar="SPEC", help="passes in text form: decompose{ratio=2},snap")
    parser.add_argument("--budget", metavar="M=SHARE", help="latency=0.5 of the original's, or params, flops or layers")
    parser.add_argument("--calibration", metavar="DATA", help=".npy or .pt file of inputs, or random (merge, auto)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="save the result, to be a MODEL or for fxlrd.load")
    parser.set_defaults(run=commands.run_compress)


def _add_frontier(subparsers: Any, parents: list[_Parser]) -> None:
    text = "compress a model within several budgets: error and accuracy against latency"
    parser = subparsers.add_parser("frontier", parents=parents, help=text)
    parser.add_argument("--budgets", metavar="M=S,S,…", help="shares to try, such as latency=0.8,0.6,0.4 or params=0.5")
    parser.add_argument("--evaluate", metavar="FUNCTION", help="package.module:function; gives a model's accuracy")
    parser.add_argument("--passes", metavar="SPEC", help="passes with one allocate (default: preset auto)")
    parser.add_argument("--calibration", metavar="DATA", help=".npy or .pt file of inputs, or random")
    parser.add_argument("--save", type=Path, metavar="DIR", help="save the models, each in a folder of its budget")
    parser.set_defaults(run=commands.run_frontier)


def _add_ranks(subparsers: Any, parents: list[_Parser]) -> None:
    parser = subparsers.add_parser("ranks", parents=parents, help="show each layer's rank by ratio and by timing")
    parser.add_argument("--search", choices=["grid", "algorithm1"], default="grid")
    parser.set_defaults(run=commands.run_ranks)


def _add_diff(subparsers: Any, parents: list[_Parser]) -> None:
    parser = subparsers.add_parser(
        "diff",
        parents=parents,
        help="show what differs between two models, or what passes do to one",
        description="Exit status: 0 the same, 1 different, 2 trouble.",
        usage="%(prog)s MODEL (MODEL | --passes SPEC | --preset P) [--steps] [options]",
    )
    parser.add_argument("other", metavar="MODEL", nargs="?", help="the other model")
    parser.add_argument("--passes", metavar="SPEC", help="compare with what these passes make of it")
    parser.add_argument("--preset", help=f"compare with what a preset makes of it: {', '.join(PRESETS)}")
    parser.add_argument("--calibration", metavar="DATA", help=".npy or .pt file of inputs, or random (merge)")
    parser.add_argument("--steps", action="store_true", help="show what each of the passes does, in order")
    parser.add_argument("--no-values", action="store_true", help="leave the weights out of the comparison")
    parser.set_defaults(run=commands.run_diff)


def _add_profile(subparsers: Any, parents: list[_Parser]) -> None:
    text = "show where a model's time goes and which layers are worth decomposing"
    parser = subparsers.add_parser("profile", parents=parents, help=text)
    parser.set_defaults(run=commands.run_profile)


def _add_demo(subparsers: Any, parents: list[_Parser]) -> None:
    text = "compare the presets on an embedded trained network, in two minutes"
    parser = subparsers.add_parser("demo", parents=parents, help=text)
    _add_threads(parser)
    parser.set_defaults(run=commands.run_demo)
