"""The options of compress as a pipeline, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import fx, nn

from fxlrd.budget import Budget
from fxlrd.calibration.batches import as_batches
from fxlrd.errors import FxlrdError
from fxlrd.graph.inputs import Inputs
from fxlrd.layers.kinds import LAYERS
from fxlrd.passes import Allocate
from fxlrd.passes.contract import Pass
from fxlrd.pipeline import Pipeline


def _check_model(model: Any, inplace: bool) -> None:
    if not isinstance(model, nn.Module):
        raise FxlrdError(f"model: a {type(model).__name__} is not a torch.nn.Module")
    if hasattr(model, "_orig_mod"):
        raise FxlrdError("model: it is compiled already; compress model._orig_mod, then compile the result")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise FxlrdError(f"model: a {type(model).__name__} is a wrapper; compress model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise FxlrdError("model: a ScriptModule has no Python code to trace; compress the model it was made from")
    if isinstance(model, torch.export.UnflattenedModule) or (
        isinstance(model, fx.GraphModule)
        and any(isinstance(n.target, torch._ops.OpOverload) for n in model.graph.nodes)
    ):
        raise FxlrdError("model: it was exported and has operators for layers; compress first, then export the result")
    if inplace and isinstance(model, LAYERS):
        raise FxlrdError("inplace: a bare layer cannot replace itself; wrap it in nn.Sequential first")


def steps_for(
    ratio: float | None,
    preset: str | None,
    pipeline: Pipeline | Sequence[Pass] | str | None,
    budget: Budget | None,
    skip: str | Sequence[str],
    calibration: Any,
    under_inductor: bool,
) -> Pipeline:
    """Return the passes that these options of `compress` ask for. Raises FxlrdError where they do not go together."""
    if pipeline is not None and preset is not None:
        raise FxlrdError("preset and pipeline: give one of the two")
    if pipeline is None:
        steps = Pipeline.preset(preset or ("lrd" if budget is None else "auto"))
    else:
        steps = Pipeline.parse(pipeline) if isinstance(pipeline, str) else Pipeline(pipeline)
        if ratio is not None:
            raise FxlrdError("ratio goes into the pipeline, as in decompose{ratio=2}, or with a preset")
    if budget is not None:
        steps = _with_budget(steps, budget, ratio)
    elif ratio is not None:
        if any(isinstance(p, Allocate) for p in steps.passes):
            raise FxlrdError(f"ratio: {steps} sets every layer's ranks by a budget; give budget=, not ratio=")
        steps = steps.with_options(ratio=ratio)
    if skip:
        steps = steps.with_options(skip=(skip,) if isinstance(skip, str) else tuple(skip))
    if calibration is not None:
        readers = sum("calibration" in {f.name for f in fields(p)} for p in steps.passes)  # type: ignore[arg-type]
        if readers > 1 and not isinstance(calibration, (torch.Tensor, list, tuple, Mapping, Inputs)):
            calibration = list(as_batches(calibration))  # once for all: a generator ends, a loader shuffles
        steps = steps.with_options(calibration=calibration)
    if under_inductor and any(hasattr(p, "compile") for p in steps.passes):
        steps = steps.with_options(compile=True)
    return steps


def _with_budget(steps: Pipeline, budget: Budget, ratio: float | None) -> Pipeline:
    if not isinstance(budget, Budget):
        raise FxlrdError(f"budget: give fxlrd.Budget(latency=0.5), or params or flops, not {budget!r}")
    if ratio is not None:
        raise FxlrdError("ratio and budget: give one of the two; a budget sets every layer's ranks by itself")
    if not any(isinstance(p, Allocate) for p in steps.passes):
        raise FxlrdError(f"budget: only allocate spends one, and {steps} has none; use preset auto")
    shares = {"params": 0.0, "flops": 0.0, "latency": 0.0, budget.measure: budget.share}
    return steps.with_options(**shares)
