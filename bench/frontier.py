"""Accuracy against size and measured speed on a trained network, with the paper's presets and with channel pruning.

``python -m bench.frontier [--figure FILE.png] [--finetune 1]`` prints two tables, of the embedded
network on the 10,000 test images. ``drops``: what preset auto loses under budgets of parameters, next to
uniform ranks of as many parameters, and what merging loses next to the published relocation; targets beside it.
``frontier``: accuracy against speed under Inductor with frozen weights, batch 64, channels_last, interleaved with the
original; also for magnitude pruning of whole channels (torch-pruning, ``pip install -e '.[bench]'``).

Calibration: 1,024 training images without labels. "Re-estimated" is with BatchNorm statistics from those, of the
original too, and a drop without training is between the two re-estimated ones. ``--finetune 1`` adds an epoch of
fxlrd.finetune, the original teaching, with the same settings for all; that drop is from the original as trained.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from bench.fashion import accuracy, augmented, load
from bench.pruning import pruned
from fxlrd import Budget, capture, compress, finetune
from fxlrd.app import fashion
from fxlrd.errors import FxlrdError
from fxlrd.graph import cost
from fxlrd.graph.inputs import Inputs
from fxlrd.passes import Decompose, Recalibrate
from fxlrd.timing.clock import Timing
from fxlrd.timing.models import time_models

BATCH = 64
DROPS = {1 / 2: (0.3, 0.0), 1 / 3: (0.5, None), 1 / 4: (1.0, 0.3)}
"""Share of the parameters: the largest drop in points without training, and after an epoch of it."""
MERGES = {
    "merge, α = 2.75": ("calibrate{outputs=false,effects=256,holdout=true},merge,recalibrate", 1.5),
    "merge as published (relocate), α = 2.75": ("merge{mode=relocate}", None),
}
SETTINGS = {  # ratio, share of the latency, share of the channels to remove
    "auto": (0.8, 0.65, 0.5),
    "merge": (2.0, 2.75, 4.0),
    "ranks": (1.5, 2.0),
    "branch": (2.0,),
    "lrd": (1.5, 2.0, 3.0),
    "pruning": (0.1, 0.15, 0.2, 0.3),
}
TUNED = {
    "lrd": (),
    "ranks": (),
    "branch": (),
    "merge": (),
    "auto": (0.65, 0.5),
    "pruning": (0.15, 0.2, 0.3),
}
COLOURS = {
    "lrd": "#999999",
    "ranks": "#0072b2",
    "branch": "#cc79a7",
    "merge": "#009e73",
    "auto": "#d55e00",
    "pruning": "#000000",
}
TICKS = (10, 20, 40, 60, 70, 80, 85, 88, 90, 92, 94)


class Batches:
    """The training images, augmented anew in each epoch; ``count`` batches of them."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int = 128, count: int | None = None) -> None:
        self.images, self.labels, self.batch = images, labels, batch
        self.count = count or -(-len(images) // batch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(augmented(self.images, self.labels, self.batch), self.count)


@dataclass(frozen=True)
class Point:
    """A variant: its share of the parameters, time as a share of the original's, and accuracies in %."""

    method: str
    setting: float
    params: float
    timing: Timing
    made: float
    again: float
    tuned: float | None


class Bench:
    """The trained network, and what every variant of it goes through."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = fashion.trained().to(memory_format=torch.channels_last)
        images, labels = load(train=True)
        generator = torch.Generator().manual_seed(0)
        self.calibration = list(images[torch.randperm(len(images), generator=generator)[:1024]].split(128))
        self.loader = Batches(images, labels, count=arguments.quick)
        self.epochs, self.lr = arguments.finetune, arguments.lr
        self.results = arguments.results
        self.training = f"{self.epochs} epoch(s)" if not arguments.quick else f"{self.epochs * arguments.quick} steps"
        self.test = tuple(t[: arguments.images] for t in load(train=False))
        self.x = self.test[0][:BATCH].contiguous(memory_format=torch.channels_last)
        self.original = capture(self.model, self.x)
        self.accuracy = self.right(self.model)
        self.again = self.right(self.estimated(self.model))

    def right(self, model: nn.Module) -> float:
        return 100 * accuracy(model, *self.test)

    def estimated(self, model: nn.Module) -> fx.GraphModule:
        """Return the model with BatchNorm statistics from the calibration images."""
        return Recalibrate(calibration=self.calibration, guard=False)(capture(model, self.x)).graph_module

    def share(self, model: nn.Module) -> float:
        return cost.params(model) / cost.params(self.model)

    def tuned(self, name: str, model: nn.Module) -> float:
        """Return the accuracy after fine-tuning a copy; with ``--results``, that of an earlier run."""
        key = f"{name}, {cost.params(model)} parameters, {self.training}, lr {self.lr:g}"
        results = json.loads(self.results.read_text()) if self.results and self.results.exists() else {}
        if key not in results:
            model = copy.deepcopy(model)
            finetune(model, self.loader, epochs=self.epochs, lr=self.lr, teacher=self.model)
            results[key] = self.right(model)
            if self.results:
                self.results.write_text(json.dumps(results, indent=1))
        return float(results[key])

    def timed(self, model: nn.Module) -> Timing:
        torch.compiler.reset()
        models = {"original": self.original, "variant": capture(model, self.x)}
        return time_models(models, Inputs.of(self.x), under_inductor=True, seconds=12.0)["variant"]

    def uniform(self, share: float) -> fx.GraphModule:
        """Return the model at the uniform ratio that leaves this share of the parameters, or just more."""
        low, high = 1.0, 64.0
        for _ in range(10):
            middle = (low * high) ** 0.5
            if self.share(Decompose(ratio=middle)(self.original).graph_module) >= share:
                low = middle
            else:
                high = middle
        return Decompose(ratio=low)(self.original).graph_module


def target(most: float | None) -> str:
    return "" if most is None else f"≤ {most:.1f}"


def drops(bench: Bench) -> None:
    head = f"{bench.accuracy:.2f}", "", f"{bench.again:.2f}"
    rows = [["original", "1.000", *head, "", "", "", "", ""]]

    def add(name: str, model: nn.Module, most: float | None = None, after: float | None = None) -> None:
        again = bench.estimated(model)
        made, right = bench.right(model), bench.right(again)
        row = [name, f"{bench.share(model):.3f}", f"{made:.2f}", f"{bench.accuracy - made:+.2f}"]
        row += [f"{right:.2f}", f"{bench.again - right:+.2f}", target(most)]
        if after is not None and bench.epochs:
            tuned = bench.tuned(name, again)
            row += [f"{tuned:.2f}", f"{bench.accuracy - tuned:+.2f}", target(after)]
        print(" | ".join(row), flush=True)
        rows.append(row)

    for share, (most, after) in DROPS.items():
        model = compress(
            bench.model, bench.x, budget=Budget(params=share), calibration=bench.calibration, measure=False
        ).model
        add(f"auto, params = 1/{1 / share:.0f}", model, most, after)
        add("  uniform ranks, weights alone", bench.uniform(bench.share(model)))
    for name, (text, most) in MERGES.items():
        data = bench.calibration if "calibrate" in text else None
        add(name, compress(bench.model, bench.x, pipeline=text, calibration=data, measure=False).model, most)
    headers = ["", "parameters", "as made %", "drop", "re-estimated %", "drop", "target"]
    headers += [bench.training + " %", "drop", "target"]
    print("\n" + tabulate(rows, headers=headers, disable_numparse=True), flush=True)


def variant(bench: Bench, method: str, setting: float) -> nn.Module:
    if method == "pruning":
        return pruned(bench.model, bench.x, setting, [bench.model.fc])
    if method == "auto":
        options = {"budget": Budget(latency=setting), "calibration": bench.calibration}
    else:
        options = {"preset": method, "ratio": setting}
        if method == "merge":
            options["calibration"] = bench.calibration
    return compress(bench.model, bench.x, compile=True, measure=False, **options).model


def frontier(bench: Bench, methods: list[str]) -> list[Point]:
    variants = []
    for method in methods:
        for setting in SETTINGS[method]:
            try:
                model = variant(bench, method, setting)
            except FxlrdError as error:
                print(f"{method} {setting:g}: {error}", flush=True)
                continue
            again = bench.estimated(model)
            tuned = bench.tuned(f"{method} {setting:g}", again) if bench.epochs and setting in TUNED[method] else None
            variants.append((method, setting, model, bench.right(model), bench.right(again), tuned))
            print(method, setting, *(f"{right:.2f}" for right in variants[-1][3:] if right is not None), flush=True)
    print("timing", flush=True)  # last and all together: training beside it would disturb it
    points = [Point(method, setting, bench.share(m), bench.timed(m), *right) for method, setting, m, *right in variants]
    rows = [["original", "", "1.000", "1.00×", "", f"{bench.accuracy:.2f}", f"{bench.again:.2f}", "", "", ""]]
    for p in points:
        rows.append([p.method, f"{p.setting:g}", f"{p.params:.3f}", f"{1 / p.timing.ratio:.2f}×"])
        rows[-1] += [f"± {p.timing.spread / p.timing.ratio**2:.2f}", f"{p.made:.2f}", f"{p.again:.2f}"]
        rows[-1] += ["" if p.tuned is None else f"{p.tuned:.2f}"]
        if p.method == "pruning":
            rows[-1] += [at(bench.again, points, p, "again")]
            rows[-1] += ["" if p.tuned is None else at(bench.accuracy, points, p, "tuned")]
    headers = ["", "setting", "parameters", "speed", "", "as made %", "re-estimated %", bench.training + " %"]
    headers += ["auto at its speed, re-estimated", "the same, fine-tuned"]
    print("\n" + tabulate(rows, headers=headers, disable_numparse=True), flush=True)
    return points


def at(original: float, points: list[Point], peer: Point, kind: str) -> str:
    """Return auto's accuracy at the peer's latency: linear between auto's points, the original being one."""
    curve = [(p.timing.ratio, getattr(p, kind)) for p in points if p.method == "auto"]
    curve = sorted([(1.0, original)] + [(ratio, right) for ratio, right in curve if right is not None])
    ratio = peer.timing.ratio
    if len(curve) == 1:
        return ""
    if ratio < curve[0][0]:
        return "faster than auto's"
    if ratio >= 1:
        return f"{original:.2f}"
    (r0, a0), (r1, a1) = next(pair for pair in pairwise(curve) if pair[0][0] <= ratio < pair[1][0])
    interpolated = a0 + (a1 - a0) * (ratio - r0) / (r1 - r0)
    return f"{interpolated:.2f} ({interpolated - getattr(peer, kind):+.2f})"


def figure(points: list[Point], trained: float, again: float, path: Path) -> None:
    """Draw accuracy against speed: one line a method, without training and, where there are any, after it.

    The scale is logarithmic in the share of wrong answers, so that half a point counts near the original.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    panels = [("again", "Without training, BatchNorm statistics re-estimated", again)]
    if any(p.tuned is not None for p in points):
        panels.append(("tuned", "After fine-tuning, the same for all", trained))
    size = (1 + 5.5 * len(panels), 5.4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axis, (kind, title, original) in zip(axes[0], panels, strict=True):
        axis.axhline(original, color="#666666", linewidth=0.8, linestyle=":", zorder=1)
        axis.plot([1], [original], "*", color="#666666", markersize=12, linestyle="", label="original", zorder=4)
        for method, colour in COLOURS.items():
            line = [p for p in points if p.method == method and getattr(p, kind) is not None]
            if not line:
                continue
            line.sort(key=lambda p: -p.timing.ratio)
            peer, strong = method == "pruning", method in ("auto", "pruning")
            axis.errorbar(
                [1 / p.timing.ratio for p in line],
                [getattr(p, kind) for p in line],
                xerr=[p.timing.spread / p.timing.ratio**2 for p in line],
                color=colour,
                marker="s" if peer else "o",
                linestyle="--" if peer else "-",
                linewidth=2.2 if strong else 1.3,
                markersize=6 if strong else 5,
                elinewidth=1,
                capsize=2,
                zorder=3 if strong else 2,
                label="channel pruning (torch-pruning)" if peer else method,
            )
        axis.set_yscale("function", functions=(lambda y: -np.log(101 - y), lambda z: 101 - np.exp(-z)))
        lowest = min(getattr(p, kind) for p in points if getattr(p, kind) is not None)
        if original - lowest > 12:
            axis.set_yticks([t for t in TICKS if lowest - 5 < t < 100])
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g×"))
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(f"speed-up (×), Inductor with frozen weights, batch {BATCH}")
        axis.set_ylabel("accuracy (%)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        fontsize=9,
        ncols=7 if len(panels) > 1 else 4,
        frameon=False,
        loc="outside lower center",
    )
    figure.savefig(path, dpi=150)
    print(f"{path} written")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.frontier")
    parser.add_argument("--figure", type=Path, help="write the frontier as a PNG")
    parser.add_argument("--finetune", type=int, default=0, metavar="EPOCHS")
    parser.add_argument("--lr", type=float, default=0.005, help="peak learning rate of fine-tuning, for all alike")
    parser.add_argument("--table", choices=("drops", "frontier"), help="only this one")
    parser.add_argument("--methods", default=",".join(SETTINGS), help="of the frontier, as auto,pruning")
    parser.add_argument("--images", type=int, default=10000, help="to try it out: on so many test images")
    parser.add_argument("--results", type=Path, help="JSON that keeps what fine-tuning came to for the next run")
    parser.add_argument("--quick", type=int, metavar="N", help="an epoch of fine-tuning is N batches of 128 images")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    torch.manual_seed(0)
    bench = Bench(arguments)
    if arguments.table != "frontier":
        drops(bench)
    if arguments.table != "drops":
        points = frontier(bench, arguments.methods.split(","))
        if arguments.figure:
            figure(points, bench.accuracy, bench.again, arguments.figure)


if __name__ == "__main__":
    main()
