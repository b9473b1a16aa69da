"""The paper's Table 1: depth, parameters, FLOPs and frames per second of ResNets before and after vanilla LRD at 2×.

``python -m bench.table1 [--all] [--no-speed] [--quick]`` prints the published figures beside the measured ones and
stores them in a JSON file (``--json``, default build/bench/table1.json); a cell that is there is not measured again.
FLOPs are 2 × multiply-adds. The paper leaves the stride of a 1×1 conv on its second factor; on the first, as here,
the function is the same and FLOPs are fewer. Train is a step of SGD. The weights are random: figures are about speed.
Changes are in per cent, with the half-width of the 95 % interval.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from bench import settings, speed
from bench.cells import Cells, Rows
from bench.models import TITLES, image_model
from bench.settings import Setting, measured, parser, read
from bench.systems import ORIGINAL, SYSTEMS, compressed, counts
from fxlrd import capture

LRD = "Vanilla LRD"
PUBLISHED = {
    ("resnet50", ORIGINAL): (50, 25.56, 8.23, 346, 1232),
    ("resnet50", LRD): (115, 12.78, 4.67, 367, 1316),
    ("resnet101", ORIGINAL): (101, 44.55, 15.68, 207, 713),
    ("resnet101", LRD): (233, 22.21, 8.39, 227, 788),
    ("resnet152", ORIGINAL): (152, 60.19, 23.14, 145, 510),
    ("resnet152", LRD): (352, 30.01, 12.11, 162, 577),
}
"""Depth, parameters in millions, FLOPs in billions, frames per second in training and inference."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = read(parser("table1", models=",".join(TITLES)), argv)
    results = settings.results(arguments, "Table 1: ResNets before and after vanilla LRD", rows)
    settings.fill(results, arguments, _counts, _timed)
    print(results.text())


def _counts(name: str, image: int) -> dict[str, Any]:
    gm = capture(*image_model(name, Setting("eager", "NCHW", "fp32", 1), image))
    return {ORIGINAL: counts(gm, 1), LRD: counts(compressed(gm, SYSTEMS[LRD], []), 1)}


def _timed(name: str, phase: str, setting: Setting, arguments: Namespace) -> speed.Timed:
    model, x = image_model(name, setting, arguments.image, arguments.device)
    gm = capture(model, x)
    models = {ORIGINAL: gm, LRD: compressed(gm, SYSTEMS[LRD], [])}
    return getattr(speed, phase)(models, x, setting, arguments.seconds)


def rows(cells: Cells) -> Rows:
    table: Rows = []
    names = dict.fromkeys(key.partition(",")[0] for key in cells)
    for name in names:
        for system in (ORIGINAL, LRD):
            head = _head(cells, name, system)
            timed = [_speeds(cells, name, system, s) for s in measured(cells, f"{name}, infer", f"{name}, train")]
            table += [head | (timed[0] if timed else {}), *({"model": head["model"]} | row for row in timed[1:])]
    return table


def _head(cells: Cells, name: str, system: str) -> dict[str, Any]:
    """Return what a model is, and the published figures, which are of an unknown setting."""
    own = cells.get(f"{name}, counts", {}).get(system)
    layers, params, flops, train, infer = PUBLISHED.get((name, system), ("",) * 5)
    row = {"model": f"{TITLES.get(name, name)}, {system}", "layers (paper)": str(layers)}
    row |= {"layers": str(own["layers"]) if own else "", "params M (paper)": str(params)}
    row |= {"params M": f"{own['params'] / 1e6:.2f}" if own else "", "FLOPs G (paper)": str(flops)}
    row |= {"FLOPs G": f"{own['flops'] / 1e9:.2f}" if own else ""}
    return row | {"train fps (paper)": str(train), "infer fps (paper)": str(infer)}


def _speeds(cells: Cells, name: str, system: str, setting: Setting) -> dict[str, Any]:
    row = {"setting": str(setting)}
    for phase in ("train", "infer"):
        timed = cells.get(f"{name}, {phase}, {setting}", {})
        row[f"{phase} fps"], row[f"{phase} %"] = speed.cells_of(timed, system, setting.batch)
    return row


if __name__ == "__main__":
    main()
