"""The paper's Table 3: depth, compression, FLOPs and speed-up of the five systems on ResNets, with no cell left empty.

``python -m bench.table3 [--all] [--no-speed] [--quick]`` prints the published figures beside the measured ones and
stores them in a JSON file (``--json``, default build/bench/table3.json); a cell that is there is not measured again.
All figures are changes against the original in per cent; of speed, with the half-width of the 95 % interval. Train is
a step of SGD. All systems of a row are timed side by side. Merging is at α = 2.75, with which the paper's parameters
and FLOPs come out; the others are at 2×, and branching has N = 4. The weights are random: figures are about speed.

Targets: preset ranks at least 1.5 times the original at batch 8, fp32, channels_last; merging, snapped, 1.8 times in
eager mode, BatchNorm folded, and 2.0 times under Inductor; a step of freezing 1.2 times that of vanilla LRD. Eager
speed depends on the C library's allocator: glibc returns large activations to the kernel, unless told to keep them
(``MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000``), which is noted as ``allocator``.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from torch import fx

from bench import settings, speed
from bench.cells import Cells, Rows
from bench.models import TITLES, calibration, image_model
from bench.settings import FOLDER, Setting, measured, parser, read
from bench.systems import ORIGINAL, OURS, SYSTEMS, TIMED, compressed, counts
from fxlrd import capture

PUBLISHED = {
    ("resnet50", "Vanilla LRD"): (115, -50.00, -43.26, 6.07, 6.82),
    ("resnet50", "Optimized Ranks"): (115, -47.28, -47.71, 14.16, 13.96),
    ("resnet50", "Layer Freezing"): (115, -50.00, -43.26, 24.57, 6.82),
    ("resnet50", "Layer Merging"): (50, -51.49, -55.09, 43.64, 40.58),
    ("resnet50", "Layer Branching"): (0, 0, 0, 0, 0),
    ("resnet101", "Vanilla LRD"): (233, -50.00, -46.53, 9.66, 10.52),
    ("resnet101", "Optimized Ranks"): (233, -51.96, -49.56, 14.49, 19.92),
    ("resnet101", "Layer Freezing"): (233, -50.00, -46.53, 29.95, 10.52),
    ("resnet101", "Layer Merging"): (101, -56.40, -58.86, 52.66, 54.56),
    ("resnet101", "Layer Branching"): (0, 0, 0, 0, 0),
    ("resnet152", "Vanilla LRD"): (352, -50.00, -47.69, 11.73, 13.14),
    ("resnet152", "Optimized Ranks"): (352, -51.86, -50.20, 15.86, 18.43),
    ("resnet152", "Layer Freezing"): (352, -50.00, -47.69, 31.72, 13.14),
    ("resnet152", "Layer Merging"): (152, -58.11, -60.18, 55.86, 54.90),
    ("resnet152", "Layer Branching"): (0, 0, 0, 0, 0),
}
"""Depth, and per cent of parameters, FLOPs, speed of training, speed of inference."""
HEADS = ("layers", "params %", "FLOPs %", "train %", "infer %")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = read(parser("table3", models=",".join(TITLES)), argv)
    allocator = "keeps memory" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "as it comes"
    if allocator != "as it comes" and arguments.json == FOLDER / "table3.json":
        arguments.json = FOLDER / "table3_memory_kept.json"
    title = "Table 3: the five systems on ResNets"
    results = settings.results(arguments, title, rows, allocator=allocator)
    settings.fill(results, arguments, _counts, _timed)
    print(results.text())


def _counts(name: str, image: int) -> dict[str, Any]:
    """Return what the systems make of a model whose ranks do not depend on the device."""
    model, x = image_model(name, Setting("eager", "NCHW", "fp32", 1), image)
    gm = capture(model, x)
    made = {ORIGINAL: gm} | {k: compressed(gm, v, calibration(x)[:1]) for k, v in SYSTEMS.items() if TIMED not in v}
    return {system: counts(each, 1) for system, each in made.items()}


def _timed(name: str, phase: str, setting: Setting, arguments: Namespace) -> dict[str, Any]:
    model, x = image_model(name, setting, arguments.image, arguments.device)
    gm = capture(model, x)
    systems = {**SYSTEMS, **OURS}
    if phase == "infer":  # freezing changes nothing there
        systems = {k: v for k, v in systems.items() if "freeze" not in v}
    made: dict[str, fx.GraphModule] = {ORIGINAL: gm}
    for system, text in systems.items():
        made[system] = compressed(gm, text, calibration(x), setting.compiled)
    numbers = {system: counts(each, setting.batch) for system, each in made.items()}
    timed = getattr(speed, phase)(made, x, setting, arguments.seconds)
    return {system: numbers[system] | timed[system] for system in made}


def rows(cells: Cells) -> Rows:
    table: Rows = []
    for name in dict.fromkeys(key.partition(",")[0] for key in cells):
        timed = measured(cells, f"{name}, infer", f"{name}, train") or [None]
        for system in (*SYSTEMS, *OURS):
            if all(system in OURS and setting is None for setting in timed):
                continue
            published = PUBLISHED.get((name, system), ("",) * len(HEADS))
            for setting in timed:
                figures = _figures(cells, name, system, setting)
                row = {"model": TITLES.get(name, name), "system": system, "setting": str(setting or "")}
                for head, paper, own in zip(HEADS, published, figures, strict=True):
                    row |= {f"{head} (paper)": str(paper), head: own}
                table.append(row)
    return table


def _figures(cells: Cells, name: str, system: str, setting: Setting | None) -> tuple[str, ...]:
    infer, train = (cells.get(f"{name}, {phase}, {setting}", {}) for phase in ("infer", "train"))
    # Freezing is timed in training only: the forward is that of vanilla LRD.
    in_infer = "Vanilla LRD" if system.startswith("Layer Freezing") else system
    before, after = _numbers(cells, name, system, [infer, train])
    speeds = [speed.change(timed[s]) if s in timed else "" for timed, s in ((train, system), (infer, in_infer))]
    if not after:
        return ("", "", "", *speeds)
    changes = [f"{100 * (after[key] / before[key] - 1):+.2f}" for key in ("params", "flops")]
    return (str(after["layers"]), *changes, *speeds)


def _numbers(cells: Cells, name: str, system: str, timed: list[Any]) -> tuple[Any, Any]:
    """Return the counts of the original and of the system: as timed in this setting, or as ranks by ratio give them."""
    for cell in (*timed, cells.get(f"{name}, counts", {})):
        if system in cell:
            return cell[ORIGINAL], cell[system]
    return None, None


if __name__ == "__main__":
    main()
