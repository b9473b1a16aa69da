"""Accuracy against measured speed on the trained network: `auto` by latency, the paper's presets, and channel pruning.

``python -m bench.frontier [--modes eager,Inductor] [--methods auto,pruning] [--steps 150] [--quick] [--json FILE]``
makes each variant, measures its accuracy on the 10,000 test images of Fashion-MNIST, before and after the same training
(the original teaches), and its speed at batch 64, interleaved with the original. Forms that are chosen by timing are
chosen in the mode that they are timed in. Channel pruning (by magnitude: torch-pruning, in the extra ``bench``) has
`auto` at its speed beside it, linear between `auto`'s points. Fitted to 1,024 training images without labels;
"re-estimated" is with BatchNorm statistics from those. Stored in a JSON file (default build/bench/frontier.json), with
an SVG beside it; a cell that is there is not measured again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import settings, speed
from bench.cells import Cells, Rows
from bench.network import BATCH, LR, Network
from bench.pruning import pruned
from bench.settings import Setting, measured, parser, read
from bench.systems import ORIGINAL
from fxlrd import Budget, capture, compress
from fxlrd.errors import FxlrdError

METHODS = {
    "auto": ("latency", (0.8, 0.65, 0.5)),
    "merge": ("α", (2.0, 2.75, 4.0)),
    "ranks": ("ratio", (1.5, 2.0)),
    "branch": ("ratio", (2.0,)),
    "lrd": ("ratio", (1.5, 2.0, 3.0)),
    "pruning": ("removed", (0.1, 0.15, 0.2, 0.3)),
}
"""What each is made with: a share of the latency, a ratio, or the share of the channels to remove."""
AUTO, PRUNING = "auto", "pruning"
TRAINED = (AUTO, PRUNING)
SECONDS = 15.0
"""Bounds each timing."""
COLOURS = {
    "lrd": "#999999",
    "ranks": "#0072b2",
    "branch": "#cc79a7",
    "merge": "#009e73",
    AUTO: "#d55e00",
    PRUNING: "#000000",
}
TICKS = (10, 20, 40, 60, 70, 80, 85, 88, 90, 92, 93, 94)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("frontier")
    options.set_defaults(batches="64", seconds=SECONDS)
    options.add_argument("--methods", default=",".join(METHODS), help=", ".join(METHODS))
    options.add_argument("--steps", type=int, default=150, help=f"of training, {BATCH} images each; 0 is none")
    arguments = read(options, argv)
    title = f"Accuracy against speed, before and after {arguments.steps} steps of training"
    results = settings.results(arguments, title, rows, steps=arguments.steps, lr=LR, batch=BATCH)
    network = Network(arguments.steps, arguments.quick)
    results.cell(ORIGINAL, lambda: accuracies(network, network.model))
    for setting in arguments.settings:
        for method in _methods(arguments.methods):
            for value in METHODS[method][1]:
                own = (network, method, value, setting, arguments)
                results.cell(variant(method, value, setting), lambda own=own: _figures(*own))
    results.write()
    print(results.text())
    if arguments.json is not None:
        figure(results.cells, arguments.json.with_suffix(".svg"))


def _methods(text: str) -> list[str]:
    methods = text.split(",")
    if PRUNING in methods and importlib.util.find_spec("torch_pruning") is None:
        print("channel pruning is left out: it needs torch-pruning (pip install -e '.[bench]')")
        methods.remove(PRUNING)
    return methods


def variant(method: str, value: float, setting: Setting) -> str:
    return f"{method}, {METHODS[method][0]}={value:g}, {setting}"


def accuracies(network: Network, model: nn.Module) -> dict[str, float]:
    """Return the share of the parameters and, in per cent of right answers, the model as made and re-estimated."""
    again = network.top1(network.estimated(model))
    return {"params": network.share(model), "made": network.top1(model), "again": again}


def _figures(network: Network, method: str, value: float, setting: Setting, arguments: Any) -> dict[str, Any]:
    """Return what a variant comes to; why it cannot be made, where it is refused."""
    x = network.test[0][: setting.batch].to(memory_format=settings.LAYOUTS[setting.layout])
    try:
        model = _made(network, method, value, x, setting.compiled)
    except FxlrdError as error:
        return {"refused": str(error)}
    cell: dict[str, Any] = accuracies(network, model)
    if method in TRAINED and arguments.steps > 0:
        cell["trained"] = network.trained(network.estimated(model), teacher=network.model)
    models = {ORIGINAL: capture(network.model, x), method: capture(model, x)}
    return cell | speed.infer(models, x, setting, arguments.seconds)[method]


def _made(network: Network, method: str, value: float, x: torch.Tensor, compiled: bool) -> nn.Module:
    if method == PRUNING:
        return pruned(network.model, x, value, [network.model.fc])
    options: dict[str, Any] = {"budget": Budget(latency=value)} if method == AUTO else {"preset": method}
    options |= {} if method == AUTO else {"ratio": value}
    options |= {"calibration": network.calibration} if method in (AUTO, "merge") else {}
    return compress(network.model, x, compile=compiled, measure=False, **options).model


def _variants(cells: Cells, setting: Setting) -> Iterator[tuple[str, float, Any]]:
    """Yield the variants that are measured in a setting: the method, its value and the cell."""
    for method, (_, values) in METHODS.items():
        for value in values:
            if (own := cells.get(variant(method, value, setting))) is not None:
                yield method, value, own


def rows(cells: Cells) -> Rows:
    table: Rows = []
    names = ["model", "mode", "parameters", "speed-up", "as made %", "re-estimated %", "trained %"]
    names += ["auto at its speed, re-estimated %", "auto at its speed, trained %"]
    empty = dict.fromkeys(names, "")
    first = cells[ORIGINAL]
    right = {"as made %": f"{first['made']:.2f}", "re-estimated %": f"{first['again']:.2f}"}
    table.append(empty | {"model": ORIGINAL, "parameters": "1.000", "speed-up": "1.00"} | right)
    for setting in _settings(cells):
        for method, value, own in _variants(cells, setting):
            row = empty | {"model": f"{method}, {METHODS[method][0]}={value:g}", "mode": setting.mode}
            if "refused" in own:
                table.append(row | {"model": f"{row['model']}: {own['refused']}"})
                continue
            row |= {"parameters": f"{own['params']:.3f}", "as made %": f"{own['made']:.2f}"}
            row["speed-up"] = f"{1 / own['ratio']:.2f} ± {own['spread'] / own['ratio'] ** 2:.2f}"
            row["re-estimated %"] = f"{own['again']:.2f}"
            row["trained %"] = f"{own['trained']:.2f}" if "trained" in own else ""
            if method == PRUNING:
                row["auto at its speed, re-estimated %"] = at(cells, setting, own, "again", first["again"])
                row["auto at its speed, trained %"] = at(cells, setting, own, "trained", first["made"])
            table.append(row)
    return table


def _settings(cells: Cells) -> list[Setting]:
    parts = [f"{method}, {word}={value:g}" for method, (word, values) in METHODS.items() for value in values]
    return measured(cells, *parts)


def at(cells: Cells, setting: Setting, peer: Mapping[str, float], kind: str, original: float) -> str:
    """Return auto's accuracy at the peer's latency: linear between auto's points, the original being one."""
    own = [cell for method, _, cell in _variants(cells, setting) if method == AUTO and kind in cell]
    curve = sorted([(1.0, original), *((cell["ratio"], cell[kind]) for cell in own)])
    ratio = peer["ratio"]
    if kind not in peer or len(curve) == 1:
        return ""
    if ratio < curve[0][0]:
        return "faster than auto's"
    if ratio >= 1:
        return f"{original:.2f}"
    (r0, a0), (r1, a1) = next(pair for pair in pairwise(curve) if pair[0][0] <= ratio < pair[1][0])
    interpolated = a0 + (a1 - a0) * (ratio - r0) / (r1 - r0)
    return f"{interpolated:.2f} ({interpolated - peer[kind]:+.2f})"


def figure(cells: Cells, path: Path) -> None:
    """Draw accuracy against speed: a row of panels a mode, a line a method.

    The scale is logarithmic in the share of wrong answers, so that half a point counts near the original.
    """
    try:
        import matplotlib
    except ImportError:
        print(f"{path} is not drawn: it needs matplotlib (pip install -e '.[bench]')")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    modes, first = _settings(cells), cells[ORIGINAL]
    with pyplot.rc_context({"svg.hashsalt": path.stem}):
        size = (11, 4.4 * len(modes) + 0.6)
        drawn, axes = pyplot.subplots(len(modes), 2, figsize=size, sharex=True, squeeze=False, layout="constrained")
        for line, setting in zip(axes, modes, strict=True):
            _panel(line[0], cells, setting, "again", first["again"])
            _panel(line[1], cells, setting, "trained", first["made"])
        axes[0][0].set_title("without training, BatchNorm statistics re-estimated", fontsize=10)
        axes[0][1].set_title("after the same training", fontsize=10)
        legend = axes[0][0].get_legend_handles_labels()
        drawn.legend(*legend, fontsize=9, ncols=7, frameon=False, loc="outside lower center")
        drawn.savefig(path, metadata={"Date": None})
        pyplot.close(drawn)
    print(f"{path} written")


def _panel(axes: Any, cells: Cells, setting: Setting, kind: str, original: float) -> None:
    import numpy as np
    from matplotlib import ticker

    axes.axhline(original, color="#666666", linewidth=0.8, linestyle=":", zorder=1)
    axes.plot([1], [original], "*", color="#666666", markersize=12, linestyle="", label=ORIGINAL, zorder=4)
    lowest = original
    for method, colour in COLOURS.items():
        points = [own for name, _, own in _variants(cells, setting) if name == method and kind in own]
        if not points:
            continue
        points.sort(key=lambda own: -own["ratio"])
        lowest = min(lowest, *(own[kind] for own in points))
        strong = method in TRAINED
        axes.errorbar(
            [1 / own["ratio"] for own in points],
            [own[kind] for own in points],
            xerr=[own["spread"] / own["ratio"] ** 2 for own in points],
            color=colour,
            marker="s" if method == PRUNING else "o",
            linestyle="--" if method == PRUNING else "-",
            linewidth=2.2 if strong else 1.3,
            markersize=6 if strong else 5,
            elinewidth=1,
            capsize=2,
            zorder=3 if strong else 2,
            label="channel pruning" if method == PRUNING else method,
        )
    axes.set_yscale("function", functions=(lambda y: -np.log(101 - y), lambda z: 101 - np.exp(-z)))
    if original - lowest > 12:
        axes.set_yticks([tick for tick in TICKS if lowest - 5 < tick < 95])
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g×"))
    axes.set(xlabel=f"speed-up, {setting}", ylabel="accuracy (%)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
