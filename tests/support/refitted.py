"""What a layer is after `refit`, of a model that keeps its own forward."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.batches import as_inputs, rows_are_examples, to_fit
from fxlrd.graph.captured import runnable
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.run import run
from fxlrd.passes._refit_regions import RIDGE


def calls_of(model: nn.Module, name: str, batches: list[Inputs]) -> list[tuple[Tensor, Tensor]]:
    """Return what a layer reads and makes, in whole runs of the model."""
    pairs: list[tuple[Tensor, Tensor]] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, output: pairs.append((args[0].clone(), output.clone())))
    for each in batches:
        run(model, each)
    handle.remove()
    return pairs


def assert_fitted(gm: fx.GraphModule, after: fx.GraphModule, model: nn.Module, name: str, data: Any) -> None:
    """Assert that a layer is the least squares fit to the original's outputs of what the final model feeds it.

    E[rest·zᵀ] = ρ·Δ and, with a bias, E[rest] = 0: where the gradient of the objective is nought.
    """
    batches = list(to_fit(as_inputs(gm, data), divisible=partial(rows_are_examples, gm)))
    z = torch.cat([z.flatten(0, -2) for z, _ in calls_of(runnable(after), f"{name}.last", batches)])
    y = torch.cat([y.flatten(0, -2) for _, y in calls_of(copy.deepcopy(model), name, batches)])
    old, new = gm.get_submodule(f"{name}.last"), after.get_submodule(f"{name}.last")
    rest = y - new(z)
    change, constant = new.weight - old.weight, new.bias is not None
    centred = z - z.mean(0) * constant
    ridge = RIDGE * centred.square().mean()
    torch.testing.assert_close(rest.mT @ centred / len(z), ridge * change, rtol=1e-8, atol=1e-11)
    if constant:
        torch.testing.assert_close(rest.mean(0), torch.zeros_like(rest[0]), rtol=0, atol=1e-11)
    assert change.norm() > 1e-4
