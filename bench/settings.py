"""The settings that the paper's tables are measured in, and the options that choose them."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchvision

from bench.cells import Cells, Results, Rows, machine

FOLDER = Path("build/bench")
"""Where results are written by default; those on the page of benchmarks are in bench/results/."""
MODES, BATCHES = ("eager", "Inductor"), (1, 8)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEED = 0


@dataclass(frozen=True)
class Setting:
    """How a model runs: eagerly or under Inductor (with frozen weights unless it trains), and what it runs on."""

    mode: str
    layout: str
    dtype: str
    batch: int

    @property
    def compiled(self) -> bool:
        return self.mode == "Inductor"

    def __str__(self) -> str:
        return f"{self.mode}, {self.layout}, {self.dtype}, batch {self.batch}"


def every(batches: Sequence[int] = BATCHES) -> list[Setting]:
    """Return all settings, in the order of a table."""
    return [Setting(*each) for each in product(MODES, LAYOUTS, DTYPES, batches)]


def measured(cells: Cells, *parts: str) -> list[Setting]:
    """Return the settings of which any cell is measured whose name begins with one of ``parts``, then the setting."""
    batches = sorted({int(key.rpartition("batch ")[2]) for key in cells if "batch " in key})
    return [setting for setting in every(batches) if any(f"{part}, {setting}" in cells for part in parts)]


def parser(name: str, *, models: str = "") -> argparse.ArgumentParser:
    """Return the options that the tables have in common; ``models`` are the names of torchvision's to measure."""
    options = argparse.ArgumentParser(prog=f"python -m bench.{name}")
    options.set_defaults(name=name, image=224)
    options.add_argument("--quick", action="store_true", help="small models and short timings: tests the script")
    options.add_argument("--json", type=Path, metavar="FILE", help=f"default: {FOLDER}/{name}.json")
    options.add_argument("--no-speed", action="store_true", help="leave out what depends on the load of the machine")
    options.add_argument("--seconds", type=float, default=40.0, help="bounds each timing of models side by side")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    options.add_argument("--modes", default="eager,Inductor")
    options.add_argument("--layouts", default="channels_last", help="of NCHW and channels_last")
    options.add_argument("--dtypes", default="fp32", help="of fp32 and bf16")
    options.add_argument("--batches", default="8", help="such as 1,8")
    options.add_argument("--all", action="store_true", help="every mode, layout and dtype at batch 1 and 8")
    if models:
        options.add_argument("--models", default=models)
    return options


def read(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, with ``settings`` as a list and those of ``--quick`` put in."""
    arguments = options.parse_args(argv)
    if arguments.quick:
        arguments.image, arguments.seconds, arguments.modes, arguments.batches = 32, 0.0, "eager", "2"
        if "models" in arguments:
            arguments.models = "tiny"
    elif arguments.json is None:
        arguments.json = FOLDER / f"{arguments.name}.json"
    if "models" in arguments:
        arguments.models = arguments.models.split(",")
    choices = ((arguments.modes, MODES), (arguments.layouts, LAYOUTS), (arguments.dtypes, DTYPES))
    for text, known in choices:
        if unknown := [word for word in text.split(",") if word not in known]:
            options.error(f"no {unknown[0]!r}: {', '.join(known)}")
    chosen = [text.split(",") for text, _ in choices]
    batches = [int(batch) for batch in arguments.batches.split(",")]
    arguments.settings = every() if arguments.all else [Setting(*each) for each in product(*chosen, batches)]
    if arguments.no_speed:
        arguments.settings = []
    if arguments.settings and not arguments.quick:
        torch.set_num_threads(arguments.threads)
    return arguments


def results(arguments: argparse.Namespace, title: str, rows: Callable[[Cells], Rows], **settings: object) -> Results:
    """Return what the table's file holds; ``settings`` are those of this table that all cells depend on."""
    device = torch.device(arguments.device)
    about = {"title": title, "machine": machine(device), "command": f"python -m bench.{arguments.name}"}
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "python": platform.python_version()}
    fixed = {"image": arguments.image, "threads": arguments.threads, "seed": SEED, "quick": arguments.quick}
    return Results(arguments.json, {"machine": about["machine"], **versions, **fixed, **settings}, about, rows)


def fill(
    results: Results,
    arguments: argparse.Namespace,
    counts: Callable[[str, int], dict[str, Any]],
    timed: Callable[[str, str, Setting, argparse.Namespace], dict[str, Any]],
) -> None:
    """Measure the missing cells of a table of models: what each counts, and its speed in each setting."""
    for name in arguments.models:
        results.cell(f"{name}, counts", lambda n=name: counts(n, arguments.image))
        for setting in arguments.settings:
            for phase in ("infer", "train"):
                key = f"{name}, {phase}, {setting}"
                results.cell(key, lambda n=name, p=phase, s=setting: timed(n, p, s, arguments))
    results.write()
