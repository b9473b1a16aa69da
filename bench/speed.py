"""The speed of models side by side: a forward in eval mode, and a step of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from bench.settings import Setting
from fxlrd.graph.inputs import Inputs
from fxlrd.timing.clock import Timing, compare
from fxlrd.timing.models import time_models

Timed = dict[str, dict[str, float]]
KEPT = "BatchNorm statistics kept"
"""How the name of a model ends whose BatchNorms train in eval mode."""


def infer(models: Mapping[str, nn.Module], x: Tensor, setting: Setting, seconds: float) -> Timed:
    """Time a forward of each model, interleaved; ratios are to the first."""
    torch.compiler.reset()  # what was compiled for another row stays out of this one's caches
    timings = time_models(models, Inputs.of(x), under_inductor=setting.compiled, seconds=seconds)
    return plain(timings)


def train(models: Mapping[str, nn.Module], x: Tensor, setting: Setting, seconds: float) -> Timed:
    """Time a step of each model, interleaved: forward, backward and SGD. The models are trained.

    Those of a name that ends with `KEPT` have their BatchNorms in eval mode.
    """
    torch.compiler.reset()
    return plain(compare({name: _step(name, model, x, setting) for name, model in models.items()}, x.device, seconds))


def _step(name: str, model: nn.Module, x: Tensor, setting: Setting) -> Callable[[], None]:
    model.train()
    if name.endswith(KEPT):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)
    call = model
    if setting.compiled:
        call = torch.compile(fx.GraphModule(model, model.graph) if isinstance(model, fx.GraphModule) else model)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(call(x).float(), target).backward()
        optimizer.step()

    return run


def plain(timings: Mapping[str, Timing]) -> Timed:
    """Return timings as JSON holds them."""
    return {name: asdict(timing) for name, timing in timings.items()}


def fps(timing: Mapping[str, float], batch: int) -> str:
    """Return images per second."""
    return f"{batch / timing['seconds']:.4g}"


def change(timing: Mapping[str, float]) -> str:
    """Return by how many per cent more images are computed in a second than by the first model, with the spread."""
    return percent(100 * (1 / timing["ratio"] - 1), 100 * timing["spread"] / timing["ratio"] ** 2)


def percent(change: float, spread: float, digits: int = 1) -> str:
    """Return a change in per cent with its spread, and that it is none where the spread covers it."""
    return f"{change:+.{digits}f} ± {spread:.{digits}f}" + " (no difference shown)" * (spread >= abs(change))


def cells_of(timed: Mapping[str, Any], name: str, batch: int) -> tuple[str, str]:
    """Return images per second and the change against the first model, or nothing where it was not timed."""
    if name not in timed:
        return "", ""
    first = name == next(iter(timed))
    return fps(timed[name], batch), "" if first else change(timed[name])
