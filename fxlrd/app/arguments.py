"""The options of the command line. Nothing here imports torch: --help, mistakes and completion do not wait for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from fxlrd.errors import FxlrdError

PRESETS = ("lrd", "ranks", "freeze", "merge", "branch", "auto")
DTYPES = ("float32", "float64", "bfloat16", "float16")
MODEL = "torchvision:resnet50, timm:resnet50, hf:FOLDER, package.module:factory or a saved directory"
SHELLS = ("bash", "zsh", "fish")
_DATA = "folder of images or texts, file of texts, .npy or .pt file of inputs, or random"

_COMPRESSION, _EXAMPLES, _OUTPUT = "the compression", "your examples", "the output"
"""Titles of groups of options."""
_USAGE = "%(prog)s MODEL [options]"


def path(text: str) -> Path:
    """Read the path of a file or folder: no shell expands ~ in --save=~/smaller."""
    return Path(text).expanduser()


class Parser(argparse.ArgumentParser):
    """A parser that raises FxlrdError, and shows an example below its help."""

    def __init__(self, *arguments: Any, example: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.epilog = f"example:\n  {example}" if example else None
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(self, message: str) -> NoReturn:
        """Raise FxlrdError."""
        raise FxlrdError(f"{message}; see {self.prog} --help")


def parser_of(version: str) -> Parser:
    """Return the parser of the command line; what it parses has the name of the ``command``."""
    parser = Parser(
        prog="fxlrd",
        description="Trained PyTorch models, faster by low-rank decomposition.",
        example="fxlrd compress timm:resnet50 --weights DEFAULT --budget latency=0.6 --calibration photos --save out",
    )
    parser.add_argument("--version", action="version", version=f"fxlrd {version}")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    model, page, data = _model_options(), _page_option(), _data_options()
    _add_compress(subparsers, [model, data, page])
    _add_frontier(subparsers, [model, data, page])
    _add_ranks(subparsers, [model, page])
    _add_diff(subparsers, [model, data, page])
    _add_profile(subparsers, [model])
    _add_demo(subparsers, [page])
    _add_completion(subparsers)
    return parser


def _model_options() -> Parser:
    """Return the options of every command that takes a model."""
    parser = Parser(add_help=False)
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    group = parser.add_argument_group("the model and its inputs")
    weights = "of torchvision or timm by name, such as DEFAULT, or a file (default: random)"
    group.add_argument("--weights", metavar="NAME|FILE", help=weights)
    group.add_argument("--seed", type=int, default=0, help="seed of random weights (default: 0)")
    group.add_argument("--batch", type=int, default=1, metavar="N", help="batch size that is timed (default: 1)")
    group.add_argument("--input", metavar="SHAPE", help="shape of one example (default: the model's, or 3x224x224)")
    group.add_argument("--size", metavar="N|HxW", help="size of an image, instead of --input")
    group.add_argument(
        "--length", type=int, metavar="N", help="tokens of a text (default: 128 or, of language models, 256)"
    )
    group.add_argument("--dtype", choices=DTYPES, help="default: float32, or that of an hf: folder")
    group.add_argument("--device", default="cpu", help="where to run and time (default: cpu)")
    group.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    group = parser.add_argument_group(_COMPRESSION)
    group.add_argument("--ratio", type=float, metavar="R", help="compression ratio of each layer (default: 2)")
    group.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave layers alone: name or glob")
    timed = group.add_mutually_exclusive_group()
    timed.add_argument("--compile", action="store_true", help="time under Inductor with frozen weights")
    timed.add_argument("--int8", action="store_const", const="int8", dest="compile", help="time under Inductor in int8")
    _add_threads(group)
    group = parser.add_argument_group(_OUTPUT)
    group.add_argument("--json", type=path, metavar="FILE", help="write the report as JSON")
    return parser


def _data_options() -> Parser:
    """Return the options on the user's own examples."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group(_EXAMPLES)
    group.add_argument("--calibration", metavar="DATA", help=f"{_DATA} (for merge, auto, --budget)")
    group.add_argument("--examples", type=int, metavar="N", help="calibrate with N at most (default: 512 or 128)")
    group.add_argument("--mean", metavar="M,M,M", help="mean of the channels of images, 0 to 1 (default: the model's)")
    group.add_argument("--std", metavar="S,S,S", help="their standard deviation")
    return parser


def _page_option() -> Parser:
    parser = Parser(add_help=False)
    group = parser.add_argument_group(_OUTPUT)
    group.add_argument("--html", type=path, metavar="FILE", help="write the same as one HTML page")
    return parser


def _add_threads(parser: Any) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")


def _group(parser: Any, title: str) -> Any:
    """Return the group of options with a title, which the parser has of a parent."""
    return next(group for group in parser._action_groups if group.title == title)


def _add_eval(parser: Parser) -> None:
    _group(parser, _EXAMPLES).add_argument(
        "--eval", metavar="DATA", help="measure models on these (default: a fifth is held out)"
    )


def _add_compress(subparsers: Any, parents: list[Parser]) -> None:
    text = "compress a model and report on it"
    example = "fxlrd compress hf:my-classifier --budget latency=0.7 --calibration reviews.csv --save faster"
    parser = subparsers.add_parser(
        "compress", parents=parents, help=text, description=text, example=example, usage=_USAGE
    )
    compression = _group(parser, _COMPRESSION)
    compression.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: lrd)")
    compression.add_argument("--passes", metavar="SPEC", help="passes in text form: decompose{ratio=2},snap")
    compression.add_argument(
        "--budget", metavar="M=SHARE", help="latency=0.5 of the original's, or params, flops or layers"
    )
    _add_eval(parser)
    group = parser.add_argument_group("training afterwards")
    group.add_argument("--finetune", metavar="DATA", help="train on this: a folder for each class, or running text")
    group.add_argument("--epochs", type=int, metavar="N", help="default: 1")
    group.add_argument("--lr", type=float, help="peak learning rate (default: 0.005 by SGD, 0.0001 by AdamW)")
    group.add_argument("--distill", type=float, metavar="W", help="weight of the original's answers (default: 0)")
    _group(parser, _OUTPUT).add_argument(
        "--save", type=path, metavar="DIR", help="save the result, to be a MODEL or for fxlrd.load"
    )


def _add_frontier(subparsers: Any, parents: list[Parser]) -> None:
    text = "compress a model within several budgets: error and accuracy against latency"
    example = "fxlrd frontier torchvision:resnet50 --weights DEFAULT --budgets latency=0.8,0.6,0.4 --calibration photos"
    parser = subparsers.add_parser(
        "frontier", parents=parents, help=text, description=text, example=example, usage=_USAGE
    )
    compression = _group(parser, _COMPRESSION)
    compression.add_argument(
        "--budgets", metavar="M=S,S,…", help="shares to try, such as latency=0.8,0.6,0.4 or params=0.5"
    )
    _add_eval(parser)
    _group(parser, _EXAMPLES).add_argument(
        "--evaluate", metavar="FUNCTION", help="package.module:function; gives a model's accuracy"
    )
    compression.add_argument("--passes", metavar="SPEC", help="passes with one allocate (default: preset auto)")
    _group(parser, _OUTPUT).add_argument(
        "--save", type=path, metavar="DIR", help="save the models, each in a folder of its budget"
    )


def _add_ranks(subparsers: Any, parents: list[Parser]) -> None:
    text = "show each layer's rank by ratio and by timing"
    example = "fxlrd ranks torchvision:resnet50 --batch 8 --channels-last"
    parser = subparsers.add_parser("ranks", parents=parents, help=text, description=text, example=example, usage=_USAGE)
    parser.add_argument(
        "--search",
        choices=["grid", "algorithm1"],
        default="grid",
        help="which ranks are timed: a grid, or the paper's Algorithm 1 (default: grid)",
    )


def _add_diff(subparsers: Any, parents: list[Parser]) -> None:
    parser = subparsers.add_parser(
        "diff",
        parents=parents,
        help="show what differs between two models, or what passes do to one",
        description="Exit status: 0 the same, 1 different, 2 trouble.",
        usage="%(prog)s MODEL (MODEL | --passes SPEC | --preset P) [--steps] [options]",
        example="fxlrd diff torchvision:resnet18 --passes decompose,snap --steps",
    )
    parser.add_argument("other", metavar="MODEL", nargs="?", help="the other model")
    parser.add_argument("--passes", metavar="SPEC", help="compare with what these passes make of it")
    parser.add_argument("--preset", help=f"compare with what a preset makes of it: {', '.join(PRESETS)}")
    parser.add_argument("--steps", action="store_true", help="show what each of the passes does, in order")
    parser.add_argument("--no-values", action="store_true", help="leave the weights out of the comparison")


def _add_profile(subparsers: Any, parents: list[Parser]) -> None:
    text = "show where a model's time goes and which layers are worth decomposing"
    example = "fxlrd profile timm:mobilenetv3_large_100 --batch 8 --channels-last"
    subparsers.add_parser("profile", parents=parents, help=text, description=text, example=example, usage=_USAGE)


def _add_demo(subparsers: Any, parents: list[Parser]) -> None:
    text = "compare the presets on an embedded trained network, in two minutes"
    example = "fxlrd demo --html demo.html"
    parser = subparsers.add_parser("demo", parents=parents, help=text, description=text, example=example)
    _add_threads(parser)


def _add_completion(subparsers: Any) -> None:
    text = "print what makes a shell complete commands, options and names of models"
    example = 'eval "$(fxlrd completion bash)"     # in ~/.bashrc'
    parser = subparsers.add_parser("completion", help=text, description=text, example=example)
    parser.add_argument("shell", choices=SHELLS)
