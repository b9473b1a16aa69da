"""fxlrd demo: the presets side by side on the embedded trained network, at the same number of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from fxlrd.app import fashion
from fxlrd.budget import Budget
from fxlrd.capturing.whole import capture
from fxlrd.compression import compress
from fxlrd.files import write_out
from fxlrd.graph import cost
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.run import evaluating
from fxlrd.passes import Calibrate, Decompose, Merge, Recalibrate, Refit
from fxlrd.pipeline import Pipeline
from fxlrd.progress import Progress, bar, quiet
from fxlrd.report.numbers import giga
from fxlrd.report.report import Report
from fxlrd.timing.cache import Setting
from fxlrd.timing.clock import Timer, Timing, compare
from fxlrd.timing.models import time_models

ABOUT = "A bottleneck ResNet trained on Fashion-MNIST, compressed without any training; 2,000 test images."
SHARE = 0.5
BATCH = 64


@dataclass(frozen=True)
class Row:
    """One model of the comparison.

    Attributes:
        accuracy: the share of right answers (0…1) of the model as it is.
        recalibrated: the same with BatchNorm statistics re-estimated.
        speed: relative to the original's; ``speed_spread`` is the half-width of its 95 % interval.
    """

    name: str
    accuracy: float
    recalibrated: float
    params: int
    flops: int
    latency_ms: float
    speed: float
    speed_spread: float


@dataclass(frozen=True)
class Comparison:
    """The models side by side, the original first; the setting that they were timed in; the report of the last."""

    rows: tuple[Row, ...]
    setting: str
    report: Report

    def to_table(self) -> str:
        """Return the comparison as text."""
        return _table(self.rows, self.setting)

    def to_html(self, path: str | Path) -> None:
        """Write the comparison as one page, with the report of the last model in it."""
        from fxlrd.report.html import page

        variants = [asdict(row) for row in self.rows]
        write_out(Path(path), page(self.report.to_dict(), self.report.diff, variants, _lead(self.rows)))


def run(share: float = SHARE, progress: bool = True, timer: Timer = compare) -> Comparison:
    """Compress the embedded network with each preset to ``share`` of its parameters, and compare the results."""
    show: Progress[Any] = bar if progress else quiet
    model = fashion.trained().to(memory_format=torch.channels_last)
    images = fashion.calibration().to(memory_format=torch.channels_last)
    batches = list(images.split(BATCH))
    test = fashion.test()
    x = images[:BATCH]
    original = capture(model, x)
    calibrated = Calibrate(batches, outputs=False, effects=128, holdout=True)(original, show).graph_module
    lrd = _ratio(share, lambda ratio: Decompose(ratio=ratio)(original).graph_module, original)
    merged = _ratio(share, lambda ratio: Merge(ratio=ratio)(calibrated).graph_module, original)
    merge = Pipeline([Merge(ratio=merged), Refit(batches), Recalibrate(batches)])
    compressed = partial(compress, model, x, measure=False, progress=progress, timer=timer)
    models: dict[str, nn.Module] = {"original": model}
    models["lrd"] = compressed(pipeline=f"decompose{{ratio={lrd}}}").model
    models["ranks"] = compressed(pipeline=f"decompose{{ratio={lrd}}},snap").model
    models["merge"] = merge(calibrated, progress=show).graph_module
    result = compressed(budget=Budget(params=share), calibration=batches)
    models["auto"] = result.model
    timings = time_models(models, Inputs.of(x), seconds=6.0, timer=timer)
    rows = tuple(_row(name, m, timings[name], x, batches, test) for name, m in models.items())
    machine = Setting.current(x.device, False)
    setting = f"{machine.device}, eager, channels_last, {machine.threads} threads, torch {machine.torch_version}"
    return Comparison(rows, setting, _measured(result.report, rows[0], rows[-1]))


def _measured(report: Report, first: Row, row: Row) -> Report:
    """Return the report with what was measured of the model beside the others."""
    return replace(
        report,
        model="Fashion-MNIST, bottleneck ResNet",
        settings={**report.settings, "speedup": row.speed, "speedup_spread": row.speed_spread},
        before={**report.before, "latency_ms": first.latency_ms, "accuracy": first.accuracy},
        after={**report.after, "latency_ms": row.latency_ms, "accuracy": row.accuracy},
    )


def _lead(rows: Sequence[Row]) -> str:
    return f"{ABOUT} The figures below are those of the preset {rows[-1].name}."


def _ratio(share: float, make: Callable[[float], fx.GraphModule], original: fx.GraphModule) -> float:
    """Return the ratio at which ``make`` leaves about ``share`` of the parameters."""
    low, high = 1.05, 8.0
    for _ in range(7):
        middle = (low + high) / 2
        if cost.params(make(middle)) > share * cost.params(original):
            low = middle
        else:
            high = middle
    return round(high, 3)


def _row(
    name: str, model: nn.Module, timing: Timing, x: Tensor, batches: list[Tensor], test: tuple[Tensor, Tensor]
) -> Row:
    gm = capture(model, x)
    recalibrated = Recalibrate(calibration=batches, guard=False)(gm).graph_module
    return Row(
        name,
        accuracy(model, *test),
        accuracy(recalibrated, *test),
        cost.params(model),
        cost.flops(gm),
        timing.seconds * 1e3,
        1 / timing.ratio,
        timing.spread / timing.ratio**2,
    )


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers (0…1), in eval mode."""
    right = 0
    with evaluating(model), torch.no_grad():
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            right += int((model(x).argmax(1) == y).sum())
    return right / len(labels)


def _table(rows: Sequence[Row], setting: str) -> str:
    first = rows[0]
    cells = [
        [
            row.name,
            f"{100 * row.accuracy:.1f} %",
            f"{100 * row.recalibrated:.1f} %",
            "" if row is first else f"{100 * (row.recalibrated - first.recalibrated):+.1f}",
            f"{row.params:,}",
            giga(row.flops),
            f"{row.latency_ms:.1f} ms",
            "" if row is first else f"{row.speed:.2f}× ± {row.speed_spread:.2f}",
        ]
        for row in rows
    ]
    headers = ["", "accuracy", "BN re-estimated", "points", "parameters", "FLOPs", f"latency ({BATCH} images)", "speed"]
    align = ("left", *["right"] * 7)
    title = f"{ABOUT}\n{setting}"
    return title + "\n\n" + tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True, colalign=align)
