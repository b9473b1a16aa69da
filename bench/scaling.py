"""How the time and the memory of compress() grow with the model, from ResNet-18 to a billion parameters.

``python -m bench.scaling [--models NAME,…] [--quick]`` prints seconds (wall, and of all threads together) and the peak
of memory, from before the model is built, of ``decompose`` at 2× and of ``auto`` at half the parameters with 32 random
inputs, each in a process of its own, without timing of models. They are stored in a JSON file (``--json``, default
build/bench/scaling.json); a cell that is there is not measured again. ``auto`` is left out where it takes many minutes.
The weights are random, which the algebra does not care about: an input costs what it does in a trained model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bench import settings
from bench.cells import Cells, Rows
from bench.memory import linears, reset_peak, resident, size_of, warmed_up
from bench.models import image_model
from bench.settings import SEED, Setting, parser, read

BATCHES, BATCH = 4, 8
"""The calibration inputs of ``auto``."""
STACKS: dict[str, tuple[int, int]] = {
    "linears 50 M": (2048, 12),
    "linears 200 M": (2048, 48),
    "linears 1 B": (4096, 60),
}
"""Width and number of the layers of stacks of Linears."""
IMAGES = ("resnet18", "resnet50", "resnet101", "resnet152", "vit_b_16", "vit_l_16")
WITHOUT_AUTO = ("vit_l_16", "linears 200 M", "linears 1 B")
WAYS: dict[str, dict[str, Any]] = {"decompose": {"ratio": 2.0}, "auto": {"preset": "auto"}}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = read(_options(), argv)
    if arguments.child:
        name, way = arguments.child
        print(json.dumps(measured(name, way, arguments.image, arguments.threads)))
        return
    results = settings.results(arguments, "Time and memory of compress() by size of the model", rows)
    for name in arguments.models:
        for way in WAYS:
            if way != "auto" or name not in WITHOUT_AUTO:
                results.cell(f"{name}, {way}", partial(_in_a_child, name, way, arguments))
    results.write()
    print(results.text())


def _options() -> argparse.ArgumentParser:
    options = parser("scaling", models=",".join((*IMAGES, *STACKS)))
    options.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return options


def _in_a_child(name: str, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own."""
    quick = ["--quick"] if arguments.quick else []
    command = [sys.executable, "-m", "bench.scaling", *quick, "--threads", str(arguments.threads), "--child", name, way]
    made: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return made


def measured(name: str, way: str, image: int, threads: int) -> dict[str, Any]:
    """Return what one compression takes in this process: seconds, and bytes."""
    import torch

    import fxlrd

    warmed_up()
    torch.set_num_threads(threads)
    start = resident(peak=False)
    model, inputs = _model(name, image)
    reset_peak()
    options = dict(WAYS[way])
    if way == "auto":
        options |= {"budget": fxlrd.Budget(params=0.5), "calibration": [inputs(BATCH) for _ in range(BATCHES)]}
    wall, cpu = time.perf_counter(), time.process_time()
    result = fxlrd.compress(model, inputs(1), measure=False, **options)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    layers = sum(row["op"] in ("Linear", "Conv2d") for row in result.report.layers)
    peak, size = resident(peak=True) - start, size_of(model)
    return {"layers": layers, "in": size, "out": size_of(result.model), "peak": peak, "wall": wall, "cpu": cpu}


def _model(name: str, image: int) -> tuple[Any, Callable[[int], Any]]:
    """Return a seeded model, and what gives a batch of so many random inputs."""
    import torch
    from torch import nn

    if name in STACKS:
        torch.manual_seed(SEED)
        width, count = STACKS[name]
        return linears(width, count).eval(), lambda batch: torch.randn(batch, width)
    model, _ = image_model(name, Setting("eager", "NCHW", "fp32", 1), image)
    if name.startswith("vit"):
        nn.init.normal_(model.heads.head.weight, std=0.02)  # which torchvision starts with zeros
    return model, lambda batch: torch.randn(batch, 3, image, image)


def rows(cells: Cells) -> Rows:
    table: Rows = []
    for name in dict.fromkeys(key.rpartition(", ")[0] for key in cells):
        found = {way: cells[f"{name}, {way}"] for way in WAYS if f"{name}, {way}" in cells}
        first = next(iter(found.values()))
        row = {"model": name, "layers": str(first["layers"]), "MB": f"{first['in'] / 1e6:.0f}"}
        for way in WAYS:
            cell = found.get(way)
            row[f"{way}, s"] = "" if cell is None else f"{cell['wall']:.3g}"
            row[f"{way}, CPU s"] = "" if cell is None else f"{cell['cpu']:.3g}"
            row[f"{way}, CPU ms a layer"] = "" if cell is None else f"{1e3 * cell['cpu'] / cell['layers']:.3g}"
            row[f"{way}, peak MB"] = "" if cell is None else f"{cell['peak'] / 1e6:.0f}"
        table.append(row)
    return table


if __name__ == "__main__":
    main()
