"""How much of what a model's FLOPs promise becomes speed: ranks, merging and `auto` by latency on ResNets.

``python -m bench.attained [--latency 0.5] [--all] [--quick]`` prints each system's speed-up beside its FLOP ratio and
stores them in a JSON file (``--json``, default build/bench/attained.json); a cell that is there is not measured again.
The speed-up over the FLOP ratio is the share attained: 1 where a FLOP of what fxlrd makes takes as long as one of the
original. Folding BatchNorms saves time but no FLOPs. All of a setting are timed side by side, in eval mode. The weights
are random: figures are about speed.

Targets: `auto` by latency attains 0.93 at batch 8 and 0.85 at batch 1 under Inductor; ResNet-152 2.3 times as fast at
batch 8; `merge` 1.9 times as fast in eager mode.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from torch import fx

from bench import settings, speed
from bench.cells import Cells, Rows
from bench.models import TITLES, calibration, image_model
from bench.settings import Setting, measured, parser, read
from bench.systems import ORIGINAL, OURS, SYSTEMS, compressed, counts
from fxlrd import Pipeline, capture

AUTO, FOLDED = "auto, by latency", "auto, by latency, BatchNorm folded"
MERGED = "Layer Merging, snapped, BatchNorm folded"
RULES = {"Vanilla LRD": SYSTEMS["Vanilla LRD"], "Optimized Ranks": SYSTEMS["Optimized Ranks"], MERGED: OURS[MERGED]}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("attained", models=",".join(TITLES))
    options.add_argument("--latency", type=float, default=0.5, help="auto's budget, as a share of the original's time")
    arguments = read(options, argv)
    title = "Speed-up as a share of the FLOP ratio"
    results = settings.results(arguments, title, rows, latency=arguments.latency)
    for name in arguments.models:
        for setting in arguments.settings:
            results.cell(f"{name}, {setting}", lambda n=name, s=setting: _timed(n, s, arguments))
    results.write()
    print(results.text())


def _timed(name: str, setting: Setting, arguments: Namespace) -> dict[str, Any]:
    model, x = image_model(name, setting, arguments.image, arguments.device)
    gm = capture(model, x)
    made: dict[str, fx.GraphModule] = {ORIGINAL: gm}
    for system, text in RULES.items():
        made[system] = compressed(gm, text, calibration(x), setting.compiled)
    # A model as small as that of --quick may not get faster.
    budget = {"latency": None, "params": 0.5} if arguments.quick else {"latency": arguments.latency}
    auto = Pipeline.preset("auto").with_options(**budget)
    made[AUTO] = compressed(gm, str(auto), calibration(x), setting.compiled)
    if not setting.compiled:  # Inductor folds them
        made[FOLDED] = compressed(made[AUTO], "merge{mode=exact,norms=true}", [])
    numbers = {system: counts(each, setting.batch) for system, each in made.items()}
    timed = speed.infer(made, x, setting, arguments.seconds)
    return {system: numbers[system] | timed[system] for system in made}


def rows(cells: Cells) -> Rows:
    table: Rows = []
    for name in dict.fromkeys(key.partition(",")[0] for key in cells):
        for setting in measured(cells, name):
            cell = cells[f"{name}, {setting}"]
            for system in [s for s in cell if s != ORIGINAL]:
                row = {"model": TITLES.get(name, name), "setting": str(setting), "system": system}
                table.append(row | _figures(cell[ORIGINAL], cell[system]))
    return table


def _figures(before: dict[str, float], after: dict[str, float]) -> dict[str, str]:
    flops, faster = before["flops"] / after["flops"], 1 / after["ratio"]
    spread = after["spread"] / after["ratio"] ** 2
    return {
        "parameters": f"{after['params'] / before['params']:.3f}",
        "FLOP ratio": f"{flops:.2f}",
        "speed-up": f"{faster:.2f} ± {spread:.2f}",
        "attained": f"{faster / flops:.2f} ± {spread / flops:.2f}",
    }


if __name__ == "__main__":
    main()
