"""The options of `fxlrd.compress` as a pipeline, and the requests that are refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import fx, nn

from fxlrd.budget import Budget
from fxlrd.calibration.batches import as_batches, read
from fxlrd.errors import FxlrdError
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.layers.kinds import LAYERS
from fxlrd.passes import Allocate
from fxlrd.passes.contract import Pass
from fxlrd.pipeline import Pipeline
from fxlrd.sharing import Job
from fxlrd.timing.clock import Timer, compare
from fxlrd.timing.inductor import Compile, check
from fxlrd.timing.int8 import check_installed

DEFAULT_PRESET = "lrd"
BUDGET_PRESET = "auto"


def check_context() -> None:
    """Raise FxlrdError where weights cannot be made that train and run anywhere."""
    if torch.is_inference_mode_enabled():
        raise FxlrdError("compress under torch.inference_mode() gives weights that cannot be trained: call it outside")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise FxlrdError("compress under autocast: call it outside, with model and example inputs in one dtype")


def check_model(model: Any, inplace: bool) -> None:
    """Raise FxlrdError for what is not a module, or a module whose Python code is wrapped, compiled or gone."""
    if not isinstance(model, nn.Module):
        raise FxlrdError(f"model: a {type(model).__name__} is not a torch.nn.Module")
    if hasattr(model, "_orig_mod"):
        raise FxlrdError("model: it is compiled already; compress model._orig_mod, then compile the result")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise FxlrdError(f"model: a {type(model).__name__} is a wrapper; compress model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise FxlrdError("model: a ScriptModule has no Python code to trace; compress the model it was made from")
    if _exported(model):
        raise FxlrdError("model: it was exported and has operators for layers; compress first, then export the result")
    _check_weights(model)
    if inplace and isinstance(model, LAYERS):
        raise FxlrdError("inplace: a bare layer cannot replace itself; wrap it in nn.Sequential first")


def _check_weights(model: nn.Module) -> None:
    """Raise FxlrdError where this process has only a part of the weights, or none."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise FxlrdError(f"model: FullyShardedDataParallel has flattened its parameters; {_WHOLE}")
    if any(getattr(hook, "offload", False) for m in model.modules() for hook in _hooks_of_accelerate(m)):
        raise FxlrdError(
            "model: accelerate has offloaded its weights; load it without offloading, or bring them back by "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "mps":
            raise FxlrdError(
                f"model: {name} is on mps, which has no float64, in which factors are computed: "
                'compress on the CPU, model.cpu(), and move the result, result.model.to("mps")'
            )
        if _is_dtensor(parameter) or hasattr(parameter, "ds_id"):  # the latter: DeepSpeed's ZeRO
            raise FxlrdError(f"model: {name} is sharded over processes; {_WHOLE}")


def _hooks_of_accelerate(module: nn.Module) -> Sequence[Any]:
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


_WHOLE = "compress the whole model before it is sharded, on every process, and shard the result"


def _is_dtensor(tensor: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # imported by whatever made one
    return module is not None and isinstance(tensor, module.DTensor)


def _exported(model: nn.Module) -> bool:
    if isinstance(model, torch.export.UnflattenedModule):
        return True
    if not isinstance(model, fx.GraphModule):
        return False
    return any(isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes)


def pipeline_for(
    *,
    ratio: float | None = None,
    preset: str | None = None,
    pipeline: Pipeline | Sequence[Pass] | str | None = None,
    budget: Budget | None = None,
    skip: str | Sequence[str] = (),
    calibration: Any = None,
    compile: Compile = False,
    timer: Timer = compare,
) -> Pipeline:
    """Return the passes that these options of `fxlrd.compress` ask for.

    Raises FxlrdError for options that exclude each other, that no pass of the pipeline has, or that need a package.
    """
    check(compile)
    if compile == "int8":
        check_installed()  # before inputs are calibrated with, which may take long
    passes = _chosen(preset, pipeline, budget)
    if ratio is not None:
        _check_takes_ratio(passes, pipeline, budget)
        passes = passes.with_options(ratio=ratio)
    if budget is not None:
        passes = with_budget(passes, budget)
    if skip:
        passes = passes.with_options(skip=(skip,) if isinstance(skip, str) else tuple(skip))
    if calibration is not None:
        passes = _with_calibration(passes, calibration)
    if compile and passes.reads("compile"):
        passes = passes.with_options(compile=compile)
    if timer is not compare and passes.reads("timer"):
        passes = passes.with_options(timer=timer)
    return passes


def _chosen(preset: str | None, pipeline: Pipeline | Sequence[Pass] | str | None, budget: Budget | None) -> Pipeline:
    if pipeline is None:
        return Pipeline.preset(preset or (DEFAULT_PRESET if budget is None else BUDGET_PRESET))
    if preset is not None:
        raise FxlrdError("preset and pipeline: give one of the two")
    return Pipeline.parse(pipeline) if isinstance(pipeline, str) else Pipeline(pipeline)


def _check_takes_ratio(passes: Pipeline, pipeline: Any, budget: Budget | None) -> None:
    if pipeline is not None:
        raise FxlrdError("ratio goes into the pipeline, as in decompose{ratio=2}, or with a preset")
    if budget is not None:
        raise FxlrdError("ratio and budget: give one of the two; a budget sets every layer's ranks by itself")
    if _allocates(passes):
        raise FxlrdError(f"ratio: {passes} sets every layer's ranks by a budget; give budget=, not ratio=")


def with_budget(passes: Pipeline, budget: Budget) -> Pipeline:
    """Return the passes under a budget. Raises FxlrdError for what is no budget, and where no pass spends one."""
    if not isinstance(budget, Budget):
        raise FxlrdError(f"budget: give fxlrd.Budget(latency=0.5), or params, flops or layers, not {budget!r}")
    if not _allocates(passes):
        raise FxlrdError(f"budget: only allocate spends one, and {passes} has none; use preset auto")
    return passes.with_options(**asdict(budget))


def _allocates(passes: Pipeline) -> bool:
    return any(isinstance(p, Allocate) for p in passes.passes)


def _with_calibration(passes: Pipeline, calibration: Any) -> Pipeline:
    readers = sum(hasattr(p, "calibration") for p in passes.passes)
    if readers > 1:
        calibration = in_memory(calibration)
    return passes.with_options(calibration=calibration)


def in_memory(calibration: Any) -> Any:
    """Return calibration inputs that can be read several times: a generator ends, a loader shuffles."""
    if isinstance(calibration, (torch.Tensor, list, tuple, Mapping, Inputs)):
        return calibration
    return list(read(as_batches(calibration)))


def check_agreed(job: Job, model: nn.Module, inputs: Inputs, passes: Pipeline) -> None:
    """Raise FxlrdError unless all processes were asked to do the same to the same model."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    job.check_agreed(
        {
            "models": [(name, t.shape, t.dtype) for name, t in weights.items()],
            "weights": [_sample(t) for t in weights.values()],
            "example inputs": [(t.shape, t.dtype) for t in tensors((inputs.args, inputs.kwargs))],
            "passes": str(passes),
        }
    )


def _sample(tensor: torch.Tensor) -> bytes:
    """Return some evenly spaced entries, as bytes."""
    values = tensor.detach().flatten()
    values = values[:: max(1, len(values) // _SAMPLED)].cpu().contiguous()
    return bytes(values.view(torch.uint8).numpy()) if len(values) else b""


_SAMPLED = 50
"""Entries of a tensor by which two processes tell whether they have the same, at least, of those that have so many."""


def all_inputs(job: Job, calibration: Any) -> list[Any]:
    """Return the calibration inputs of all processes: theirs in turn or, where all have the same, those."""
    own = list(read(as_batches(calibration)))
    of_each = job.gathered([_fingerprint(batch) for batch in own])
    if all(other == of_each[0] for other in of_each):
        return own
    absent = object()
    in_turn = chain.from_iterable(zip_longest(*job.gathered(own), fillvalue=absent))
    return [batch for batch in in_turn if batch is not absent]


def _fingerprint(batch: Any) -> list[Any]:
    values = (batch.args, batch.kwargs) if isinstance(batch, Inputs) else batch
    return [(t.shape, t.dtype, _sample(t)) for t in tensors(values)]
