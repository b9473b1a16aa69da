"""The paper's Fig. 5: throughput of ResNet-152 against the number of branches of its Tucker cores.

``python -m bench.fig5 [--all] [--models resnet50] [--quick]`` prints the throughput at N = 1 (which is vanilla LRD)
to 16 branches, stores it in a JSON file and, with matplotlib, draws fig5.svg beside it. A setting that is in the file
is not measured again. All of a setting are timed side by side with the original. The paper prints no values; its
Table 5 has +7.43 % of throughput for branching. The weights are random: figures are about speed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from torch import fx

from bench import settings, speed
from bench.cells import Cells, Rows
from bench.figures import draw
from bench.models import image_model
from bench.settings import Setting, measured, parser, read
from bench.systems import ORIGINAL, counts
from fxlrd import Pipeline, capture
from fxlrd.passes import Branch, Decompose

GROUPS = (1, 2, 4, 8, 16)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = read(parser("fig5", models="resnet152"), argv)
    title = "Fig. 5: throughput against branches"
    results = settings.results(arguments, title, rows)
    for name in arguments.models:
        results.cell(f"{name}, counts", lambda n=name: _counts(n, arguments))
        for setting in arguments.settings:
            results.cell(f"{name}, {setting}", lambda n=name, s=setting: _timed(n, s, arguments))
    results.write()
    print(results.text())
    lines = _lines(results.cells)
    if arguments.json is not None and lines:
        axis = {"xscale": "log", "xticks": GROUPS, "xticklabels": GROUPS}
        draw(arguments.json.with_suffix(".svg"), lines, "branches", "throughput, × the original's", axis)


def _branched(name: str, setting: Setting, arguments: Namespace) -> tuple[dict[str, fx.GraphModule], Any]:
    model, x = image_model(name, setting, arguments.image, arguments.device)
    gm = capture(model, x)
    decomposed = Pipeline([Decompose(ratio=2.0)])(gm, verify=False).graph_module
    made = {ORIGINAL: gm, "1": decomposed}
    for groups in GROUPS[1:]:
        branch = Pipeline([Branch(groups=groups, rotate=False)])
        made[str(groups)] = branch(decomposed, verify=False).graph_module
    return made, x


def _counts(name: str, arguments: Namespace) -> dict[str, Any]:
    made, _ = _branched(name, Setting("eager", "NCHW", "fp32", 1), arguments)
    return {branches: counts(gm, 1) for branches, gm in made.items()}


def _timed(name: str, setting: Setting, arguments: Namespace) -> speed.Timed:
    made, x = _branched(name, setting, arguments)
    return speed.infer(made, x, setting, arguments.seconds)


def rows(cells: Cells) -> Rows:
    table: Rows = []
    for name in dict.fromkeys(key.partition(",")[0] for key in cells):
        for branches, own in cells.get(f"{name}, counts", {}).items():
            row = {"model": name, "branches": branches, "params M": f"{own['params'] / 1e6:.2f}"}
            row |= {"FLOPs G": f"{own['flops'] / 1e9:.2f}"}
            for setting in measured(cells, name):
                timed = cells[f"{name}, {setting}"]
                row[f"fps, {setting}"], row[f"%, {setting}"] = speed.cells_of(timed, branches, setting.batch)
            table.append(row)
    return table


def _lines(cells: Cells) -> dict[str, list[tuple[float, float, float]]]:
    return {
        key: [(int(n), 1 / t["ratio"], t["spread"] / t["ratio"] ** 2) for n, t in cell.items() if n != ORIGINAL]
        for key, cell in cells.items()
        if not key.endswith("counts")
    }


if __name__ == "__main__":
    main()
