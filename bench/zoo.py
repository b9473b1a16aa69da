"""Every model of torchvision, one of each of timm's families, architectures of transformers: compressed, or why not.

``python -m bench.zoo [--only 'resnet50,swin*,timm:*'] [--preset lrd] [--exact] [--largest 100e6]`` prints a row for
each. Weights are random, seeded, and the examples about as small as the model takes, so errors are large and say
little; that it captures, compresses and runs is what counts, and which share of the conv and linear parameters is left
alone (`bench.left_alone`). ``--exact`` decomposes at full rank as well, in place: then the outputs (of the regions,
where the whole is not traceable) must be those of the original up to rounding, in float32. A model that fails is a row,
its traceback goes to standard error; the table is printed also when interrupted.
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
from tqdm import tqdm

from bench import zoo_timm, zoo_torchvision, zoo_transformers
from bench.left_alone import LeftAlone, mean_text
from fxlrd import Budget, compress
from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.inputs import Inputs
from fxlrd.pipeline import PRESETS
from fxlrd.report.numbers import change, giga
from fxlrd.report.numbers import error as digits
from fxlrd.report.report import Report

EXACT = 1e-3
"""In float32 the depth of a network multiplies rounding errors; above this it is no rounding."""

HEADERS = ["model", "captured", "layers", "cut", "left alone", "parameters", "", "FLOPs", "", "error", "full rank"]


COLLECTIONS = {"torchvision": zoo_torchvision, "timm": zoo_timm, "transformers": zoo_transformers}
"""The modules that name and build the models, by the library of these."""


def names(only: str | None = None) -> list[str]:
    """Return the names of the models that names or globs with commas between them choose; without, of all.

    Those of other libraries than torchvision start with the library's name and a colon. Raises FxlrdError for a name or
    glob that fits no model.
    """
    every = [name for library in COLLECTIONS for name in _names_of(library, only)]
    if only is None:
        return every
    chosen = [p.strip() for p in only.split(",")]
    for pattern in chosen:
        if not any(fnmatch(n, pattern) for n in every):
            raise FxlrdError(
                f"--only {pattern}: no model of {', '.join(COLLECTIONS)} has this name, quantized ones aside"
            )
    return [n for n in every if any(fnmatch(n, p) for p in chosen)]


def _names_of(library: str, only: str | None) -> list[str]:
    try:
        return COLLECTIONS[library].names()
    except ImportError:
        if only is None or f"{library}:" in only:
            print(f"bench.zoo: {library} is not installed, its models are left out: pip install 'fxlrd[bench]'")
        return []


def collection(name: str) -> str:
    """Return the library of a model."""
    library = name.partition(":")[0]
    return library if library in COLLECTIONS and ":" in name else "torchvision"


def build(name: str) -> nn.Module:
    """Return a model with seeded random weights in eval mode."""
    return COLLECTIONS[collection(name)].build(name)


def inputs(name: str) -> Inputs:
    """Return seeded inputs of a model."""
    return COLLECTIONS[collection(name)].inputs(name)


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
    shares: dict[str, LeftAlone] = {}
    try:
        with tqdm(chosen, leave=False, disable=None) as progress:
            for name in progress:
                progress.set_description(name)
                start = time.perf_counter()
                row = [name, *_row(name, arguments.preset, arguments.exact, arguments.largest, shares)]
                row += [""] * (len(HEADERS) - len(row))
                rows.append([*row, str(shares.get(name, "")), f"{time.perf_counter() - start:.1f} s"])
                gc.collect()  # graphs have cycles, and hold the weights
    except KeyboardInterrupt:
        print(f"interrupted: {len(rows)} of {len(chosen)}")
    finally:
        print(tabulate(rows, headers=[*HEADERS, "of parameters left alone", "time"], disable_numparse=True))
        counts = Counter(row[1].rpartition(" ")[2] for row in rows)
        print(f"\n{len(rows)} models:", ", ".join(f"{number} {how}" for how, number in counts.most_common()))
        for library in COLLECTIONS:
            if listed := [share for name, share in shares.items() if collection(name) == library]:
                print(f"parameters left alone, mean of {len(listed)} models of {library}: {mean_text(listed)}")


def _row(name: str, preset: str, exact: bool, largest: float, shares: dict[str, LeftAlone]) -> list[str]:
    """Return a model's row, after its name; whatever goes wrong is one. What is left alone goes into ``shares``."""
    try:
        size = COLLECTIONS[collection(name)].parameters(name)
        if size > largest:
            return ["refused", "", "", f"larger than --largest: {size:,} parameters"]
        # The weights, factors, a copy of those; at full rank they are twice as large.
        needed, free = size * 4 * (4 if exact else 3) + 2**30, _free()
        if needed > free:
            return ["refused", "", "", f"{needed / 2**30:.1f} GiB of memory needed, {free / 2**30:.1f} available"]
        model, example = build(name), inputs(name)
        report = _compressed(model, example, preset)
        shares[name] = LeftAlone.of(model, report)
        cells = _cells(report)
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
    try:
        report = compress(model, example, pipeline="decompose{ranks=1000000}", measure=False, inplace=True).report
    except FxlrdError as error:
        return f"refused: {error}"
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
