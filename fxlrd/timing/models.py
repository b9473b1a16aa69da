"""How long models take, side by side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.timing.clock import Timer, Timing, compare
from fxlrd.timing.inductor import Compile
from fxlrd.timing.workload import Workload, time_workloads


def time_models(
    models: Mapping[str, nn.Module],
    inputs: Inputs,
    *,
    under_inductor: Compile = False,
    seconds: float = 4.0,
    timer: Timer = compare,
) -> dict[str, Timing]:
    """Time models side by side on the same inputs; ratios are to the first.

    Each runs in eval mode without gradients, under Inductor with frozen weights if ``under_inductor``. The models and
    the inputs are afterwards as they were. ``seconds`` bounds the timing of all of them together.
    """
    inputs = inputs.fresh()
    workloads = {name: Workload([(model, inputs)], under_inductor) for name, model in models.items()}
    return time_workloads(workloads, device_of(next(iter(models.values())), inputs), seconds, timer)


def device_of(model: nn.Module, inputs: Inputs) -> torch.device:
    """Return the device that the model runs on: that of its first parameter or, if it has none, of its first input."""
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else tensors((inputs.args, inputs.kwargs))[0].device
