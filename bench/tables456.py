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

import torch
from torch import nn

from bench import settings, speed
from bench.cells import Cells, Rows
from bench.fashion import accuracy, load
from bench.frontier import Batches
from bench.pruning import pruned
from bench.settings import DTYPES, LAYOUTS, Setting, measured, parser, read
from bench.systems import ORIGINAL, SYSTEMS, TIMED, counts
from fxlrd import Budget, capture, compress, finetune
from fxlrd.app import fashion
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
LR = 0.005


class Subject:
    """The trained network, the images it is fitted to and trained on, and its test images."""

    def __init__(self, arguments: Namespace) -> None:
        self.model = fashion.trained()
        if arguments.quick:  # the images that ship have no labels but the network's own
            images, self.test = fashion.calibration()[:128], tuple(t[:50] for t in fashion.test())
            labels = self.model(images).argmax(1).detach()
            self.loader = Batches(images, labels, batch=16, count=1)
        else:
            images, labels = load(train=True)
            self.test = load(train=False)
            self.loader = Batches(images, labels, count=arguments.steps)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1024]
        self.calibration = list(images[chosen].split(len(chosen) // 8))
        self.made = cache(self._made)  # cells of one system share it

    def _made(self, system: str, compile: bool = False) -> nn.Module:
        x = self.calibration[0][:8]
        if system == ORIGINAL:
            return self.model
        if system == PRUNING:
            return pruned(self.model, x, 0.3, [self.model.fc])
        if system == AUTO:
            options: dict[str, Any] = {"budget": Budget(params=0.5), "calibration": self.calibration}
        else:
            options = {"pipeline": PIPELINES[system]}
            options |= {"calibration": self.calibration} if "calibrate" in PIPELINES[system] else {}
        if TIMED in options.get("pipeline", ""):
            options["compile"] = compile
        return compress(self.model, x, measure=False, **options).model

    def top1(self, model: nn.Module) -> float:
        return 100 * accuracy(model, *self.test)

    def figures(self, system: str) -> dict[str, Any]:
        """Return depth, parameters, FLOPs and the accuracy before any training."""
        model = self.made(system)
        return {**counts(capture(model, self.calibration[0][:1]), 1), "top1": self.top1(_channels_last(model))}

    def trained(self, system: str, seed: int) -> dict[str, float]:
        model = _channels_last(self.made(system))
        finetune(model, self.loader, epochs=1, lr=LR, seed=seed, progress=False)
        return {"top1": self.top1(model)}

    def timed(self, systems: Sequence[str], setting: Setting, arguments: Namespace) -> speed.Timed:
        """Time all systems side by side; those that time ranks, for this mode."""
        form: dict[str, Any] = {"dtype": DTYPES[setting.dtype], "memory_format": LAYOUTS[setting.layout]}
        x = self.test[0][: setting.batch].to(arguments.device, **form)
        models = {
            system: capture(copy.deepcopy(self.made(system, setting.compiled)).to(arguments.device, **form), x)
            for system in systems
        }
        return speed.infer(models, x, setting, arguments.seconds)


def _channels_last(model: nn.Module) -> nn.Module:
    """Return a copy in the layout in which CPUs run and train convs faster."""
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("tables456")
    options.add_argument("--steps", type=int, default=150, help="of training, for each system and seed")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--systems", help="only these, separated by semicolons")
    arguments = read(options, argv)
    title = f"Tables 4 to 6: accuracy of the trained network after {arguments.steps} steps of training"
    results = settings.results(arguments, title, rows, steps=arguments.steps, lr=LR, batch=128)
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
