"""Running a model and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.inputs import Inputs

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


class _Nowhere:
    """Stands in for torch's tracker of modules, whose hooks fail on modules that are given a parameter."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count FLOPs as torch.utils.flop_counter does (2 × multiply-adds).

    nn.MultiheadAttention's fused path, whose FLOPs torch does not count, is kept off meanwhile.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, since it imports triton

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
    with BaseTorchFunctionMode(), counter:
        yield counter


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module in eval mode; on leaving, each submodule is in its own former mode again."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """On leaving, the model's buffers hold what they held: a forward may count its calls, or keep a cache."""
    found = [(m._buffers, *each) for m in model.modules() for each in m._buffers.items()]
    kept = [(buffers, name, t, t.clone()) for buffers, name, t in found if t is not None and not t.is_meta]
    try:
        yield
    finally:
        for buffers, name, tensor, value in kept:
            buffers[name] = tensor
            if not torch.equal(tensor, value):
                with torch.no_grad():
                    tensor.copy_(value)


def seeded(model: nn.Module, inputs: Inputs) -> Any:
    """`run`, always with the same random numbers; the generators are left as they were."""
    here = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(here)):
        torch.manual_seed(0)
        return run(model, inputs)


def counted(model: nn.Module, inputs: Inputs) -> tuple[Any, int]:
    """`seeded`, with the FLOPs of the run (2 × multiply-adds)."""
    with counting() as counter:
        return seeded(model, inputs), counter.get_total_flops()


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Run the model in eval mode without gradients, its buffers as before afterwards.

    Raises FxlrdError where it fails on these inputs.
    """
    with evaluating(model), unmoved(model), torch.no_grad():
        try:
            own = inputs.fresh()
            return model(*own.args, **own.kwargs)
        except Exception as error:
            weights = next(iter(model.parameters()), None)
            has = (
                f"the model's weights are {str(weights.dtype)[6:]} on {weights.device}; " if weights is not None else ""
            )
            raise FxlrdError(
                f"the model fails on the example inputs ({inputs.describe()}): {has}{one_line(error)}"
            ) from error
