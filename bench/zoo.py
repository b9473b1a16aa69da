"""Every model of torchvision.models.list_models() but the quantized ones: compressed and verified, or why not.

``python -m bench.zoo [--only 'resnet50,swin*'] [--preset lrd] [--exact] [--largest 100e6]`` prints a row for each.
Weights are random, seeded, and the examples about as small as the model takes, so errors are large and say little; that
it captures, compresses and runs is what counts. ``--exact`` decomposes at full rank as well, in place: then the outputs
(of the regions, where the whole is not traceable) must be those of the original up to rounding, in float32. A model
that fails is a row, its traceback goes to standard error; the table is printed also when interrupted.
"""

from __future__ import annotations

import argparse
import gc
import math
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from fnmatch import fnmatch
from textwrap import shorten
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torchvision import models
from tqdm import tqdm

from fxlrd import Budget, compress
from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.inputs import Inputs
from fxlrd.layers.kinds import LAYERS
from fxlrd.pipeline import PRESETS
from fxlrd.report.numbers import change, giga
from fxlrd.report.numbers import error as digits
from fxlrd.report.report import Report

EXACT = 1e-3
"""In float32 the depth of a network multiplies rounding errors; above this it is no rounding."""

_SMALL = {"min_size": 128, "max_size": 128}
EXAMPLES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "raft_*": ({}, (1, 3, 128, 128)),
    "ssd*": ({}, (3, 128, 128)),  # these scale to the size that they are made for
    "*rcnn_*": (_SMALL, (3, 128, 128)),
    "fcos_*": (_SMALL, (3, 128, 128)),
    "retinanet_*": (_SMALL, (3, 128, 128)),
    "s3d": ({}, (1, 3, 14, 224, 224)),  # the last pooling takes 2×7×7
    "mvit_*": ({}, (1, 3, 16, 224, 224)),  # positions are learned for this size
    "swin3d_*": ({}, (1, 3, 4, 64, 64)),
    "mc3_18": ({}, (1, 3, 4, 32, 32)),
    "r*d_18": ({}, (1, 3, 4, 32, 32)),
    "vit_h_14": ({"image_size": 56}, (1, 3, 56, 56)),
    "vit_*": ({"image_size": 64}, (1, 3, 64, 64)),
    "maxvit_t": ({}, (1, 3, 224, 224)),  # partitions of 7 at every stage
    "inception_v3": ({}, (1, 3, 75, 75)),
    "*": ({}, (1, 3, 64, 64)),
}
"""Name or glob, the first that fits: the builder's options, and the shape of an input."""

HEADERS = ["model", "captured", "layers", "cut", "left alone", "parameters", "", "FLOPs", "", "error", "full rank"]


def names(only: str | None = None) -> list[str]:
    """Return the models' names, those that names or globs with commas between them choose."""
    every = [n for n in models.list_models() if not n.startswith("quantized")]
    if only is None:
        return every
    chosen = [p.strip() for p in only.split(",")]
    for pattern in chosen:
        if not any(fnmatch(n, pattern) for n in every):
            raise FxlrdError(f"--only {pattern}: no model of torchvision has this name, quantized ones aside")
    return [n for n in every if any(fnmatch(n, p) for p in chosen)]


def build(name: str) -> nn.Module:
    """Return a model with seeded random weights in eval mode."""
    options, _ = _example(name)
    # Detectors and segmenters would fetch a backbone's weights unless told not to.
    backbone = {"weights_backbone": None} if name in _with_backbone() else {}
    quiet = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # they warn of it otherwise
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, **backbone, **quiet, **options)
    # Some start with branches, or the last layer, at nothing or nearly so: no error would show. Larger weights, as for
    # ReLU, make EfficientNets so chaotic that rounding alone moves their outputs.
    for module in model.modules():
        if isinstance(module, LAYERS):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if isinstance(getattr(module, "layer_scale", None), nn.Parameter):
            nn.init.ones_(module.layer_scale)
    return model.eval()


def inputs(name: str) -> Inputs:
    """Return seeded inputs: one image, clip or pair of images; detectors take a list of images between 0 and 1."""
    _, shape = _example(name)
    generator = torch.Generator().manual_seed(0)
    if name in models.list_models(models.detection):
        return Inputs(([torch.rand(shape, generator=generator)],))
    number = 2 if name in models.list_models(models.optical_flow) else 1
    return Inputs(tuple(torch.randn(shape, generator=generator) for _ in range(number)))


def _example(name: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    return next(example for pattern, example in EXAMPLES.items() if fnmatch(name, pattern))


def _with_backbone() -> list[str]:
    return models.list_models(models.detection) + models.list_models(models.segmentation)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.zoo")
    parser.add_argument("--only", metavar="NAMES", help="names or globs, as resnet50,swin*")
    parser.add_argument("--preset", choices=PRESETS, default="lrd")
    parser.add_argument("--exact", action="store_true", help="check at full rank, too; takes much longer")
    parser.add_argument("--largest", type=float, default=math.inf, metavar="PARAMS", help="leave out larger models")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        chosen = names(arguments.only)
    except FxlrdError as error:
        sys.exit(f"bench.zoo: {error}")
    rows: list[list[str]] = []
    try:
        with tqdm(chosen, leave=False, disable=None) as progress:
            for name in progress:
                progress.set_description(name)
                start = time.perf_counter()
                row = [name, *_row(name, arguments.preset, arguments.exact, arguments.largest)]
                rows.append([*row, *[""] * (len(HEADERS) - len(row)), f"{time.perf_counter() - start:.1f} s"])
                gc.collect()  # graphs have cycles, and hold the weights
    except KeyboardInterrupt:
        print(f"interrupted: {len(rows)} of {len(chosen)}")
    finally:
        print(tabulate(rows, headers=[*HEADERS, "time"], disable_numparse=True))
        counts = Counter(row[1].rpartition(" ")[2] for row in rows)
        print(f"\n{len(rows)} models:", ", ".join(f"{number} {how}" for how, number in counts.most_common()))


def _row(name: str, preset: str, exact: bool, largest: float) -> list[str]:
    """Return a model's row, after its name; whatever goes wrong is one."""
    try:
        size = next(iter(models.get_model_weights(name))).meta["num_params"]
        if size > largest:
            return ["refused", "", "", f"larger than --largest: {size:,} parameters"]
        # The weights, factors, a copy of those; at full rank they are twice as large.
        needed, free = size * 4 * (4 if exact else 3) + 2**30, _free()
        if needed > free:
            return ["refused", "", "", f"{needed / 2**30:.1f} GiB of memory needed, {free / 2**30:.1f} available"]
        model, example = build(name), inputs(name)
        cells = _cells(_compressed(model, example, preset))
        return [*cells, _at_full_rank(model, example) if exact else ""]
    except FxlrdError as error:
        return ["refused", "", "", str(error)]
    except Exception as error:
        tqdm.write(f"{name}\n{traceback.format_exc()}", file=sys.stderr)
        return ["failed", "", "", one_line(error)]


def _compressed(model: nn.Module, example: Inputs, preset: str) -> Report:
    options: dict[str, Any] = {"budget": Budget(params=0.5)} if preset == "auto" else {"ratio": 2.0}
    if "calibrate" in PRESETS[preset]:
        options["calibration"] = [example]
    result = compress(model, example, preset=preset, measure=False, **options)
    counted = sum(p.numel() for p in result.model.parameters())
    if counted != result.report.after["params"]:
        raise AssertionError(f"the result has {counted:,} parameters, its report {result.report.after['params']:,}")
    with torch.no_grad():
        own = example.fresh()
        result.model(*own.args, **own.kwargs)
    return result.report


def _cells(report: Report) -> list[str]:
    rows = report.layers
    codes = {skip.name: skip.reason.code for record in report.ledger for skip in record.skipped}
    alone = [row for row in rows if row["decision"] in ("skipped", "original")]
    reasons = Counter(codes.get(row["name"]) or shorten(row["reason"], 40, placeholder=" …") for row in alone)
    regions = next((w for w in report.warnings if w.startswith("taken as")), None)
    before, after = report.before, report.after
    return [
        "whole" if regions is None else f"{regions.split()[2]} regions",
        str(len(rows)),
        str(len(rows) - len(alone)),
        ", ".join(f"{number} {reason}" for reason, number in reasons.most_common(3)),
        f"{before['params'] / 1e6:.2f} M",
        change(before["params"], after["params"]),
        giga(before["flops"]),
        change(before["flops"], after["flops"]),
        digits(report.passes[-1]["relative_error"]),
    ]


def _at_full_rank(model: nn.Module, example: Inputs) -> str:
    """Return how far outputs lie from the original's at full rank. The model is spent: this is done in place."""
    report = compress(model, example, pipeline="decompose{ranks=1000000}", measure=False, inplace=True).report
    moved = report.passes[0]["relative_error"]
    return digits(moved) if moved <= EXACT else f"{digits(moved)}: not rounding"


def _free() -> float:
    """Return the bytes of memory that may be taken; endless where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(float(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:
        return math.inf


if __name__ == "__main__":
    main()
