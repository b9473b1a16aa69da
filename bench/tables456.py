"""The paper's Tables 4 to 6 on the embedded trained network: accuracy after the same small budget of training.

``python -m bench.tables456 [--steps 150] [--seeds 3] [--all] [--no-speed] [--quick]`` prints the five systems, `auto`
at half the parameters, channel pruning by 30 % (torch-pruning, where it is installed) and the original, each trained
for the same steps of 128 images of Fashion-MNIST from each seed, beside the published changes in Top-1 of ResNet-50,
101 and 152 on ImageNet. Stored in a JSON file (``--json``, default build/bench/tables456.json); a cell that is there
is not measured again. The change is against the original trained the same, seed by seed: mean and standard deviation.
The five systems are at 2×, merging at α = 2.75. Top-5 says nothing among ten classes.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
from argparse import Namespace
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import nn

from bench import settings, speed
from bench.cells import Cells, Rows
from bench.network import BATCH, LR, Network, channels_last
from bench.pruning import pruned
from bench.settings import DTYPES, LAYOUTS, Setting, measured, parser, read
from bench.systems import ORIGINAL, SYSTEMS, TIMED, counts
from fxlrd import Budget, capture, compress
from fxlrd.pipeline import PRESETS

PIPELINES = {
    **SYSTEMS,
    "Layer Merging": PRESETS["merge"],
    "Layer Merging, relocated": "merge{mode=relocate}",
    "Layer Branching, not rotated": "decompose,branch{rotate=false}",
}
"""The last two do as the paper does: BatchNorm and ReLU move across the factors; cores are cut as they are."""
AUTO, PRUNING = "auto, params=1/2", "channel pruning, 30 %"
PUBLISHED = {
    "Vanilla LRD": ("+0.54", "-0.43", "-"),
    "Optimized Ranks": ("-", "-", "-"),
    "Layer Freezing": ("-", "-", "-0.48"),
    "Layer Merging, relocated": ("-0.21", "-0.82", "-0.44"),
    "Layer Branching, not rotated": ("0", "-0.70", "-0.34"),
}
"""Changes in Top-1, in points. The 0 is a cell that the paper left empty."""


class Subject:
    """What each system makes of the trained network."""

    def __init__(self, arguments: Namespace) -> None:
        self.network = Network(arguments.steps, arguments.quick)
        self.made = cache(self._made)  # cells of one system share it

    def _made(self, system: str, compile: bool = False) -> nn.Module:
        model, x, data = self.network.model, self.network.x, self.network.calibration
        if system == ORIGINAL:
            return model
        if system == PRUNING:
            return pruned(model, x, 0.3, [model.fc])
        if system == AUTO:
            options: dict[str, Any] = {"budget": Budget(params=0.5), "calibration": data}
        else:
            options = {"pipeline": PIPELINES[system]}
            options |= {"calibration": data} if "calibrate" in PIPELINES[system] else {}
        if TIMED in options.get("pipeline", ""):
            options["compile"] = compile
        return compress(model, x, measure=False, **options).model

    def figures(self, system: str) -> dict[str, Any]:
        """Return depth, parameters, FLOPs and the accuracy before any training."""
        model = self.made(system)
        top1 = self.network.top1(channels_last(model))
        return {**counts(capture(model, self.network.x[:1]), 1), "top1": top1}

    def trained(self, system: str, seed: int) -> dict[str, float]:
        return {"top1": self.network.trained(self.made(system), seed)}

    def timed(self, systems: Sequence[str], setting: Setting, arguments: Namespace) -> speed.Timed:
        """Time all systems side by side; those that time ranks, for this mode."""
        form: dict[str, Any] = {"dtype": DTYPES[setting.dtype], "memory_format": LAYOUTS[setting.layout]}
        x = self.network.test[0][: setting.batch].to(arguments.device, **form)
        models = {
            system: capture(copy.deepcopy(self.made(system, setting.compiled)).to(arguments.device, **form), x)
            for system in systems
        }
        return speed.infer(models, x, setting, arguments.seconds)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("tables456")
    options.add_argument("--steps", type=int, default=150, help="of training, for each system and seed")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--systems", help="only these, separated by semicolons")
    arguments = read(options, argv)
    title = f"Tables 4 to 6: accuracy of the trained network after {arguments.steps} steps of training"
    results = settings.results(arguments, title, rows, steps=arguments.steps, lr=LR, batch=BATCH)
    subject = Subject(arguments)
    systems = arguments.systems.split(";") if arguments.systems else _systems(arguments)
    for system in systems:
        results.cell(f"{system}, made", lambda s=system: subject.figures(s))
        for seed in range(arguments.seeds if not arguments.quick else 2):
            results.cell(f"{system}, seed {seed}", lambda s=system, n=seed: subject.trained(s, n))
    for setting in arguments.settings:
        results.cell(f"speed, {setting}", lambda s=setting: subject.timed(systems, s, arguments))
    results.write()
    print(results.text())


def _systems(arguments: Namespace) -> list[str]:
    """Return the systems; with ``--no-speed``, those whose ranks no timing chooses."""
    systems = [ORIGINAL, *PIPELINES, AUTO, PRUNING]
    if importlib.util.find_spec("torch_pruning") is None:
        print("channel pruning is left out: it needs torch-pruning (pip install -e '.[bench]')")
        systems.remove(PRUNING)
    return [s for s in systems if not (arguments.no_speed and TIMED in PIPELINES.get(s, ""))]


def rows(cells: Cells) -> Rows:
    table: Rows = []
    for system in (ORIGINAL, *PIPELINES, AUTO, PRUNING):
        if f"{system}, made" not in cells:
            continue
        own, original = cells[f"{system}, made"], cells.get(f"{ORIGINAL}, made", {})
        row = {"system": system, "layers": str(own["layers"])}
        for key, head in (("params", "params %"), ("flops", "FLOPs %")):
            row[head] = f"{100 * (own[key] / original[key] - 1):+.2f}" if original and system != ORIGINAL else ""
        row["Top-1 as made"] = f"{own['top1']:.2f}"
        row |= _trained(cells, system) | {"Δ (paper: 50 / 101 / 152)": " / ".join(PUBLISHED.get(system, ()))}
        for setting in measured(cells, "speed"):
            row[f"speed %, {setting}"] = speed.cells_of(cells[f"speed, {setting}"], system, setting.batch)[1]
        table.append(row)
    return table


def _trained(cells: Cells, system: str) -> dict[str, str]:
    """Return the accuracy after training, and its change against the original's from the same seeds."""
    top1 = _by_seed(cells, system)
    row = {"Top-1 trained": _mean(list(top1.values())) if top1 else "", "seeds": str(len(top1))}
    original = _by_seed(cells, ORIGINAL)
    changes = [top1[seed] - original[seed] for seed in top1 if seed in original]
    if system == ORIGINAL or len(changes) < 2:
        return row | {"Δ": ""}
    return row | {"Δ": speed.percent(statistics.mean(changes), statistics.stdev(changes), digits=2)}


def _by_seed(cells: Cells, system: str) -> dict[str, float]:
    start = f"{system}, seed "
    return {key[len(start) :]: cell["top1"] for key, cell in cells.items() if key.startswith(start)}


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
