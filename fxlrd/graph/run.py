"""Running a model and leaving it as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.random import OwnGenerators
from fxlrd.graph.settings import settings_restored

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
    """Put the module in eval mode; on leaving, each submodule is in its own former mode again.

    Only flags are set: ``eval()`` and ``train()`` of the user's classes may do more, such as merging an adapter.
    """
    modes = [(m, m.training) for m in module.modules()]
    set_mode(module, False)
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def set_mode(module: nn.Module, training: bool) -> None:
    """Set the mode flag of the module and of all inside it."""
    for m in module.modules():
        m.training = training


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """On leaving, the model's buffers hold what they held: a forward may count its calls, or keep a cache."""
    buffers = [(m._buffers, *each) for m in model.modules() for each in m._buffers.items()]
    before = [(owner, name, t, t.clone()) for owner, name, t in buffers if t is not None and not t.is_meta]
    try:
        yield
    finally:
        for owner, name, tensor, value in before:
            owner[name] = tensor
            if not bit_equal(tensor, value):
                with torch.no_grad():
                    tensor.copy_(value)


def bit_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same values, in any layout; NaN equals nothing."""
    return all(torch.equal(x, y) for x, y in zip(stored(a), stored(b), strict=True))


def stored(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that hold a tensor: of a sparse one its values, then its indices."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._values(), tensor._indices()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.values(), tensor.crow_indices(), tensor.col_indices()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.values(), tensor.ccol_indices(), tensor.row_indices()]
    return [tensor.to_dense()]


def counted(model: nn.Module, inputs: Inputs) -> tuple[Any, int]:
    """`run`, with the FLOPs (2 × multiply-adds)."""
    with counting() as counter:
        return run(model, inputs), counter.get_total_flops()


@contextmanager
def isolated(model: nn.Module, seed: int = 0) -> Iterator[OwnGenerators]:
    """On leaving, the model's buffers, torch's settings and random states are as before, whatever code ran.

    Random numbers come from generators of this run's own, which ``seed`` starts.
    """
    with unmoved(model), settings_restored(), OwnGenerators(seed) as generators:
        yield generators


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Run the model in eval mode without gradients, always with the same random numbers.

    Buffers, modes, torch's settings and random states are as before afterwards; what else forward leaves on the model
    is not: give it a copy of a user's model. Raises FxlrdError where it fails on these inputs.
    """
    with evaluating(model), isolated(model), torch.no_grad():
        return called_on(model, inputs)


@contextmanager
def training_unasked(model: nn.Module) -> Iterator[None]:
    """Run a model of one's own in training mode, with gradients.

    Warnings are not shown: the run is not the user's, who would give labels too.
    """
    set_mode(model, True)
    with isolated(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def called_on(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model with copies of the inputs. Raises FxlrdError, which names what the inputs are, where it fails."""
    try:
        own = inputs.fresh()
        return model(*own.args, **own.kwargs)
    except Exception as error:
        weights = next(iter(model.parameters()), None)
        has = f"the model's weights are {str(weights.dtype)[6:]} on {weights.device}; " if weights is not None else ""
        raise FxlrdError(
            f"the model fails on the example inputs ({inputs.describe()}): {has}{one_line(error)}"
        ) from error
