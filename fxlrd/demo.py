"""fxlrd demo: the presets side by side on the embedded trained network, at the same number of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from fxlrd import cost, fashion
from fxlrd.budget import Budget
from fxlrd.capture import capture
from fxlrd.compress import compress
from fxlrd.graph import Inputs, evaluating, propagate
from fxlrd.latency import Setting, compare
from fxlrd.passes import Calibrate, Decompose, Merge, Recalibrate
from fxlrd.progress import Progress, bar, quiet
from fxlrd.report.table import giga

SHARE = 0.5
BATCH = 64


@dataclass(frozen=True)
class Row:
    """One model of the comparison: accuracies (0…1) as it is and with BatchNorm statistics re-estimated."""

    name: str
    model: nn.Module
    accuracy: float
    recalibrated: float


def run(share: float = SHARE, progress: bool = True) -> str:
    """Compress the embedded network in each way and return the table."""
    show: Progress[Any] = bar if progress else quiet
    model = fashion.trained().to(memory_format=torch.channels_last)
    images = fashion.calibration().to(memory_format=torch.channels_last)
    batches = list(images.split(128))
    test = fashion.test()
    x = images[:BATCH]
    original = capture(model, x)
    calibrated = Calibrate(calibration=batches, outputs=False, effects=256)(original).graph_module
    lrd = _ratio(share, lambda ratio: Decompose(ratio=ratio)(original).graph_module, original)
    merged = _ratio(share, lambda ratio: Merge(ratio=ratio)(calibrated).graph_module, original)
    fitted = "calibrate{outputs=false,effects=256,holdout=true}"
    ways: list[tuple[str, dict[str, Any]]] = [
        ("lrd", {"pipeline": f"decompose{{ratio={lrd}}}"}),
        ("ranks", {"pipeline": f"decompose{{ratio={lrd}}},snap"}),
        (
            "merge",
            {"pipeline": f"{fitted},merge{{ratio={merged}}},refit,recalibrate", "calibration": batches},
        ),
        ("auto", {"budget": Budget(params=share), "calibration": batches}),
    ]
    rows = [_row("original", model, batches, test)]
    for name, options in show(ways, "presets"):
        result = compress(model, x, measure=False, progress=progress, **options)
        rows.append(_row(name, result.model, batches, test))
    return _table(rows, x)


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


def _row(name: str, model: nn.Module, batches: list[Tensor], test: tuple[Tensor, Tensor]) -> Row:
    gm = Recalibrate(calibration=batches, guard=False)(capture(model, batches[0][:2])).graph_module
    return Row(name, model, accuracy(model, *test), accuracy(gm, *test))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers (0…1), in eval mode."""
    right = 0
    with evaluating(model), torch.no_grad():
        for x, y in zip(images.split(250), labels.split(250), strict=True):
            right += int((model(x).argmax(1) == y).sum())
    return right / len(labels)


def _table(rows: list[Row], x: Tensor) -> str:
    with torch.no_grad():
        timings = compare({r.name: lambda r=r: r.model(x) for r in rows}, x.device, seconds=8.0)  # type: ignore[misc]
    first = rows[0]
    cells = []
    for row in rows:
        gm = capture(row.model, x)
        propagate(gm, Inputs.of(x))
        timing = timings[row.name]
        cells.append(
            [
                row.name,
                f"{100 * row.accuracy:.1f} %",
                f"{100 * row.recalibrated:.1f} %",
                "" if row is first else f"{100 * (row.recalibrated - first.recalibrated):+.1f}",
                f"{cost.params(row.model):,}",
                giga(cost.flops(gm)),
                f"{timing.seconds * 1e3:.1f} ms",
                "" if row is first else f"{1 / timing.ratio:.2f}× ± {timing.spread / timing.ratio**2:.2f}",
            ]
        )
    headers = [
        "",
        "accuracy",
        "BN re-estimated",
        "points",
        "parameters",
        "FLOPs",
        f"latency ({len(x)} images)",
        "speed",
    ]
    setting = Setting.here(x.device, False)
    title = (
        "A bottleneck ResNet trained on Fashion-MNIST, compressed without any training; 2,000 test images.\n"
        f"{setting.device}, eager, channels_last, {setting.threads} threads, torch {setting.torch_version}"
    )
    align = ("left", *["right"] * 7)
    return title + "\n\n" + tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True, colalign=align)
