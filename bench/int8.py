"""int8 beside fxlrd and on top of it, on a CPU: under Inductor (torchao's PT2E) and in ONNX Runtime (static, QDQ).

``python -m bench.int8 [--only MODEL] [--quick] [--json FILE]`` prints the original, the presets, and `auto` with forms
chosen by fp32 times and by int8 times (``compile="int8"``), each in fp32 and in int8, of a runtime all side by side;
speed is against the original in fp32 there. Stored in a JSON file (default build/bench/int8.json); a cell that is
there is not measured again. ResNet-50 and ViT-B/16 have random weights, at batch 1 and 8. Of the embedded network, at
batch 50, also the accuracy, on the 10,000 test images of Fashion-MNIST (``--quick``: on those that ship with fxlrd);
ranges of activations are measured on its 1,024 calibration images.

Targets of `auto` by int8 times over the original in int8 under Inductor: the embedded network 1.4 times at 0.3 points,
ResNet-50 2 times at batch 8. Needs torchao; without onnx, onnxscript and onnxruntime that runtime is left out.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fxlrd
from bench import settings
from bench.cells import Cells, Rows
from bench.fashion import load
from bench.models import image_model
from bench.onnx_runtime import PACKAGES, in_onnx_runtime
from bench.settings import Setting, parser, read
from bench.systems import ORIGINAL
from fxlrd.app import fashion
from fxlrd.errors import BudgetError
from fxlrd.graph.run import evaluating
from fxlrd.timing.clock import compare
from fxlrd.timing.inductor import compiled
from fxlrd.timing.int8 import quantized

MODELS = {"fashion": (50,), "resnet50": (1, 8), "vit_b_16": (1, 8)}
"""Batches of each model; those of the embedded network as its calibration images allow."""
IMAGES = 40
"""Random images to calibrate with."""
BUDGETS = {"fashion": (0.7, 0.6), "vit_b_16": (0.65,)}
"""Budgets of latency by int8 times, shares of the original's in int8. ViT-B/16 comes to 0.6 at batch 1."""
BUDGET = (0.45,)
"""That of models with random weights, whose errors say nothing."""
Call = Callable[[Tensor], Tensor]


def presets(name: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Return what `compress` is called with, by the name of a row."""
    if quick:
        return {"lrd": {"preset": "lrd"}}
    by_int8 = {
        f"auto, by int8 times, latency={share:g}": {"budget": fxlrd.Budget(latency=share), "compile": "int8"}
        for share in BUDGETS.get(name, BUDGET)
    }
    return {
        "ranks": {"preset": "ranks", "compile": True},
        "merge": {"preset": "merge"},
        "auto, by fp32 times, latency=0.6": {"budget": fxlrd.Budget(latency=0.6), "compile": True},
        **by_int8,
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("int8")
    options.add_argument("--only", action="append", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    arguments = read(options, argv)
    if importlib.util.find_spec("torchao") is None:
        print("bench.int8: skipped: it needs torchao (pip install torchao)")
        return
    title = "int8 beside low rank and on top of it"
    budgets = {name: list(BUDGETS.get(name, BUDGET)) for name in MODELS}
    results = settings.results(arguments, title, rows, budgets=budgets)
    for name in arguments.only or (["fashion"] if arguments.quick else MODELS):
        for batch in MODELS[name]:
            subject = Subject(name, batch, arguments)
            for runtime in _runtimes():
                results.cell(f"{name}, batch {batch}, {runtime}", lambda s=subject, r=runtime: s.figures(r))
    results.write()
    print(results.text())


def _runtimes() -> list[str]:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"ONNX Runtime is left out: it needs {', '.join(missing)}")
    return ["Inductor"] if missing else ["Inductor", "ONNX Runtime"]


class Subject:
    """A model at a batch, and what the presets make of it."""

    def __init__(self, name: str, batch: int, arguments: Namespace) -> None:
        self.name, self.arguments = name, arguments
        self.test: tuple[Tensor, Tensor] | None = None
        self.models: dict[str, nn.Module] = {}
        self.refused: dict[str, str] = {}
        if name == "fashion":
            self.model: nn.Module = fashion.trained().to(memory_format=torch.channels_last)
            images = fashion.calibration()
            self.test = fashion.test() if arguments.quick else load(train=False)
            self.calibration = list(images.split(batch))[: len(images) // batch]
        else:
            self.model, images = image_model(name, Setting("Inductor", "channels_last", "fp32", IMAGES))
            self.calibration = list(images.split(8))
        self.x = images[:batch]

    def made(self) -> Mapping[str, nn.Module]:
        """Return the original and what each preset makes of it, made once for both runtimes."""
        if not self.models:
            self.models = {ORIGINAL: self.model}
            for preset, options in presets(self.name, self.arguments.quick).items():
                data = None if options.get("preset") in ("lrd", "ranks") else self.calibration
                try:
                    result = fxlrd.compress(self.model, self.x, calibration=data, measure=False, **options)
                    self.models[preset] = result.model
                except BudgetError as error:
                    self.refused[preset] = str(error)
                torch.compiler.reset()  # what was timed is as large as the model, many times
        return self.models

    def figures(self, runtime: str) -> dict[str, Any]:
        """Return seconds, ratio, spread and, of the embedded network, accuracy, by model and precision."""
        x, calls = self.x, dict[str, Call]()
        with torch.no_grad(), evaluating(nn.ModuleList(self.made().values())):
            for name, model in self.made().items():
                calls[f"{name}, fp32"], calls[f"{name}, int8"] = self._calls(model, runtime)
            seconds = max(4.0, self.arguments.seconds / 10) * len(calls) if not self.arguments.quick else 1.0
            timings = compare({variant: partial(call, x) for variant, call in calls.items()}, x.device, seconds)
            right = {v: {"accuracy": _accuracy(call, x, *self.test)} if self.test else {} for v, call in calls.items()}
        calls.clear()
        torch.compiler.reset()
        return {
            variant: {"seconds": t.seconds, "ratio": t.ratio, "spread": t.spread, **right[variant]}
            for variant, t in timings.items()
        } | {preset: {"refused": reason} for preset, reason in self.refused.items()}

    def _calls(self, model: nn.Module, runtime: str) -> tuple[Call, Call]:
        alike = [batch for batch in torch.cat(self.calibration).split(len(self.x)) if len(batch) == len(self.x)]
        if runtime == "Inductor":
            return compiled(model), compiled(quantized(model, (self.x,), {}, partial(_run, batches=alike)))
        return in_onnx_runtime(model, self.x), in_onnx_runtime(model, self.x, alike)


def _run(prepared: nn.Module, batches: Sequence[Tensor]) -> None:
    """Run what observes ranges of activations; an export is for one batch size."""
    for batch in batches:
        prepared(batch)


def _accuracy(call: Call, like: Tensor, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers (0…1)."""
    right = sum(
        int((call(x).argmax(1) == y).sum())
        for x, y in zip(images.split(len(like)), labels.split(len(like)), strict=True)
        if len(x) == len(like)
    )
    return right / (len(labels) // len(like) * len(like))


def rows(cells: Cells) -> Rows:
    table: Rows = []
    for key, cell in cells.items():
        alone = cell["original, int8"]
        for variant, own in cell.items():
            if "refused" in own:
                rest = dict.fromkeys(("ms", "speed-up over fp32", "over int8 alone", "accuracy %"), "")
                table.append({"model, batch, runtime": key, "variant": f"{variant}: {own['refused']}", **rest})
                continue
            row = {"model, batch, runtime": key, "variant": variant, "ms": f"{own['seconds'] * 1e3:.4g}"}
            row["speed-up over fp32"] = f"{1 / own['ratio']:.2f} ± {own['spread'] / own['ratio'] ** 2:.2f}"
            row["over int8 alone"] = f"{alone['ratio'] / own['ratio']:.2f}"
            row["accuracy %"] = f"{100 * own['accuracy']:.2f}" if "accuracy" in own else ""
            table.append(row)
    return table


if __name__ == "__main__":
    main()
