"""python -m bench.int8 [--quick] [--json FILE]: int8 beside fxlrd and on top of it, under Inductor on a CPU.

Of ResNet-50 and ViT-B/16 with random weights, at batch 1 and 8: the original in fp32 and in int8 (torchao's PT2E), and
what fxlrd makes of it, in fp32 and in int8, with forms chosen by fp32 times and by int8 times (``compile="int8"``), all
side by side. Of the embedded network also the accuracy, on 2,000 test images; ranges of activations are measured on the
calibration images. Needs torchao; without it the benchmark says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxlrd
from fxlrd.app import fashion
from fxlrd.files import write_out
from fxlrd.graph.run import evaluating
from fxlrd.timing.clock import compare
from fxlrd.timing.inductor import compiled
from fxlrd.timing.int8 import quantized

BATCH = 50
"""Images a call of the embedded network, as the calibration images allow."""
Chosen = dict[str, dict[str, Any]]
CHOSEN: Chosen = {
    "auto, by fp32 times": {"budget": fxlrd.Budget(latency=0.6), "compile": True},
    "auto, by int8 times": {"budget": fxlrd.Budget(latency=0.7), "compile": "int8"},
}
"""Options of compress: by int8 times, a budget is a share of the original's time in int8."""
PRESETS: Chosen = {
    "ranks": {"preset": "ranks", "compile": True},
    "merge": {"preset": "merge"},
    **CHOSEN,
}
QUICK: Chosen = {"lrd": {"preset": "lrd"}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.int8", description="int8 beside fxlrd and on top of it.")
    parser.add_argument("--quick", action="store_true", help="the embedded network, decomposed: tests the script")
    parser.add_argument("--only", action="append", metavar="MODEL", help="fashion, resnet50, vit_b_16; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures after each model")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("torchao") is None:
        print("bench.int8: skipped: it needs torchao (pip install torchao)")
        return
    rows: list[dict[str, Any]] = []
    names = arguments.only or (["fashion"] if arguments.quick else ["fashion", "resnet50", "vit_b_16"])
    for measured in _rows(names, QUICK if arguments.quick else PRESETS):
        rows += measured
        print(tabulate(measured, headers="keys", floatfmt=".4g"), flush=True)
        if arguments.json is not None:
            write_out(arguments.json, json.dumps(rows, indent=1) + "\n")


def _rows(names: Sequence[str], presets: Chosen) -> Iterator[list[dict[str, Any]]]:
    for name in names:
        if name == "fashion":
            model = fashion.trained().to(memory_format=torch.channels_last)
            images = fashion.calibration()
            yield _measured(name, model, images[:BATCH], list(images.split(BATCH)), presets, fashion.test())
            continue
        for batch in (1, 8):
            model, images = _model(name, max(batch, 40))
            yield _measured(f"{name}, batch {batch}", model, images[:batch], list(images.split(8)), presets)


def _model(name: str, images: int) -> tuple[nn.Module, Tensor]:
    from torchvision import models

    torch.manual_seed(0)
    model = getattr(models, name)().eval().to(memory_format=torch.channels_last)
    return model, torch.randn(images, 3, 224, 224).to(memory_format=torch.channels_last)


def _measured(
    name: str,
    model: nn.Module,
    x: Tensor,
    calibration: list[Tensor],
    presets: Chosen,
    test: tuple[Tensor, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Return the figures of a model and of what each preset makes of it, in fp32 and in int8."""
    models = {"original": model}
    for preset, options in presets.items():
        data = None if options.get("preset") in ("lrd", "ranks") else calibration
        models[preset] = fxlrd.compress(model, x, calibration=data, measure=False, **options).model
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    with torch.no_grad(), evaluating(nn.ModuleList(models.values())):
        for made, each in models.items():
            calls[f"{made}, fp32"] = compiled(each)
            calls[f"{made}, int8"] = compiled(quantized(each, (x,), {}, partial(_run, batches=calibration, like=x)))
        timings = compare({variant: partial(call, x) for variant, call in calls.items()}, x.device, 4.0 * len(calls))
        accuracies = {variant: _accuracy(call, x, *test) for variant, call in calls.items()} if test else {}
    return [
        {
            name: variant,
            "ms": timing.seconds * 1e3,
            "speed": 1 / timing.ratio,
            "spread": timing.spread / timing.ratio**2,
            **({"accuracy": accuracies[variant]} if test else {}),
        }
        for variant, timing in timings.items()
    ]


def _run(prepared: nn.Module, batches: Sequence[Tensor], like: Tensor) -> None:
    """Run what observes ranges of activations; an export is for one batch size."""
    for batch in torch.cat([*batches]).split(len(like)):
        if len(batch) == len(like):
            prepared(batch)


def _accuracy(call: Callable[[Tensor], Tensor], like: Tensor, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers (0…1)."""
    right = sum(
        int((call(x).argmax(1) == y).sum())
        for x, y in zip(images.split(len(like)), labels.split(len(like)), strict=True)
        if len(x) == len(like)
    )
    return right / (len(labels) // len(like) * len(like))


if __name__ == "__main__":
    main()
