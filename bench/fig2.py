"""The paper's Fig. 2: throughput of a 512×512×3×3 conv of ResNet-152 in Tucker form, against its rank.

``python -m bench.fig2 [--from 200] [--to 330] [--step 1] [--all] [--quick]`` times every rank and stores it in a JSON
file (``--json``, default build/bench/fig2.json), ten ranks a cell, each cell beside the original conv; a cell that is
there is not measured again. With matplotlib it draws fig2.svg beside the file, where the staircase shows. The table
has the step that the paper names, from rank 257 to 256, the steepest measured ones, and means. The input is 7×7, as in
layer4.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bench import settings, speed
from bench.cells import Cells, Rows
from bench.figures import draw
from bench.settings import DTYPES, LAYOUTS, SEED, Setting, every, parser, read
from bench.systems import ORIGINAL
from fxlrd.graph.inputs import Inputs
from fxlrd.layers.build import skeleton
from fxlrd.timing.clock import compare
from fxlrd.timing.workload import Workload, time_workloads

PUBLISHED = (257, 256)
"""The step that the paper names: 15 % of the layer's throughput."""
STEEPEST = 3
MULTIPLES = (8, 16, 32)
"""Steps onto a multiple of these are also averaged, beside all others: one step may be noise."""
A_CELL = 10
CALLS = 10


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("fig2")
    options.add_argument("--from", type=int, default=200, dest="first", help="the lowest rank")
    options.add_argument("--to", type=int, default=330, dest="last", help="the highest rank")
    options.add_argument("--step", type=int, default=1)
    arguments = read(options, argv)
    channels, positions = (512, 7) if not arguments.quick else (32, 4)
    if arguments.quick:
        arguments.first, arguments.last, arguments.step = 16, 24, 2
    title = "Fig. 2: throughput of a conv in Tucker form against its rank"
    results = settings.results(arguments, title, rows, channels=channels, positions=positions, step=arguments.step)
    ranks = range(arguments.first, arguments.last + 1, arguments.step)
    for setting in arguments.settings:
        for start in range(0, len(ranks), A_CELL):
            some = ranks[start : start + A_CELL]
            key = f"ranks {some[0]} to {some[-1]}, {setting}"
            results.cell(key, lambda r=some, s=setting: _timed(channels, positions, r, s, arguments))
    results.write()
    print(results.text())
    if arguments.json is not None and (lines := _lines(results.cells)):
        draw(arguments.json.with_suffix(".svg"), lines, "rank", "throughput, × the original conv's")


def _timed(channels: int, positions: int, ranks: Iterable[int], setting: Setting, arguments: Namespace) -> speed.Timed:
    torch.manual_seed(SEED)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).eval()
    x = torch.randn(setting.batch, channels, positions, positions)
    form = {"dtype": DTYPES[setting.dtype], "memory_format": LAYOUTS[setting.layout], "device": arguments.device}
    return staircase(conv.to(**form), x.to(**form), ranks, setting, arguments.seconds)


def staircase(conv: nn.Conv2d, x: Tensor, ranks: Iterable[int], setting: Setting, seconds: float) -> speed.Timed:
    """Time a conv in Tucker form at each rank, side by side with the conv; a sample is of `CALLS` calls."""
    models = {ORIGINAL: conv} | {str(rank): skeleton(conv, (rank, rank)) for rank in ranks}
    torch.compiler.reset()
    inputs = Inputs.of(x)
    workloads = {name: Workload([(model, inputs)] * CALLS, setting.compiled) for name, model in models.items()}
    return speed.plain(time_workloads(workloads, x.device, seconds, compare))


def rows(cells: Cells) -> Rows:
    table: Rows = []
    for setting, line in _lines(cells).items():
        by_rank = {int(rank): (ratio, spread) for rank, ratio, spread in line}
        steps = {(high, low): _step(by_rank, high, low) for low, high in pairwise(sorted(by_rank))}
        steepest = sorted(steps, key=lambda step: -steps[step][0])[:STEEPEST]
        for step in dict.fromkeys([PUBLISHED, *steepest]):
            if step in steps:
                row = {"setting": setting, "ranks": f"{step[0]} → {step[1]}"}
                row |= {"throughput % (paper)": "15" if step == PUBLISHED else ""}
                table.append(row | {"throughput %": speed.percent(*steps[step])})
        for multiple in MULTIPLES:
            onto = [gain for (_, low), (gain, _) in steps.items() if low % multiple == 0]
            table.append({"setting": setting, **_averaged(f"onto multiples of {multiple}", onto)})
        others = [gain for (_, low), (gain, _) in steps.items() if low % min(MULTIPLES)]
        table.append({"setting": setting, **_averaged("onto others", others)})
    return table


def _averaged(what: str, gains: list[float]) -> dict[str, str]:
    """Return the mean of gains with its 95 % interval."""
    row = {"ranks": f"{what} (mean of {len(gains)})", "throughput % (paper)": ""}
    if len(gains) < 2:
        return row | {"throughput %": ""}
    noise = 1.96 * statistics.stdev(gains) / len(gains) ** 0.5
    return row | {"throughput %": speed.percent(statistics.mean(gains), noise)}


def _step(by_rank: dict[int, tuple[float, float]], high: int, low: int) -> tuple[float, float]:
    """Return the gain in throughput from one rank to a lower one in per cent, and its spread."""
    (above, noise_above), (below, noise_below) = by_rank[high], by_rank[low]
    ratio = below / above
    return 100 * (ratio - 1), 100 * ratio * ((noise_above / above) ** 2 + (noise_below / below) ** 2) ** 0.5


def _lines(cells: Cells) -> dict[str, list[tuple[float, float, float]]]:
    """Return the points of each setting: rank, throughput relative to the original, and its spread."""
    batches = sorted({int(key.rpartition("batch ")[2]) for key in cells})
    lines = {}
    for setting in map(str, every(batches)):
        timed = [cell for key, cell in cells.items() if key.endswith(f", {setting}")]
        points = {int(r): t for cell in timed for r, t in cell.items() if r != ORIGINAL}
        if points:
            lines[setting] = [(r, 1 / t["ratio"], t["spread"] / t["ratio"] ** 2) for r, t in sorted(points.items())]
    return lines


if __name__ == "__main__":
    main()
