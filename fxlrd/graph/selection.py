"""Whether an operation treats each channel of a tensor alone, by what it computes.

To select channels S must commute with it, f(x[S]) = f(x)[S], where f on the left has its parameters for S only. That is
checked in float64, on random values of several sizes, for random sets S and their complements: an operation that reads
another channel (a norm over channels, a softmax, a largest entry) sees another set in one of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.graph.run import isolated, set_mode
from fxlrd.layers.narrow import narrowed

_SETS = 4
"""Random sets of channels that are tried, each with its complement."""
_SIZES = (1.0, 30.0)
_FEW = 3
"""The size of the other axes, where the operation works on so few."""

Operation = Callable[[Tensor], Any]
Selected = Callable[[Tensor | None], Operation | None]
"""Returns an operation for some channels only, given their indices, or for all; None where there is none such."""


def commutes_with_selection(gm: fx.GraphModule, node: fx.Node, sizes: tuple[int, ...], axis: int) -> bool:
    """Whether selecting channels along ``axis`` commutes with an operation of one tensor of shape ``sizes``.

    A module with parameters must do so in eval and in training mode.
    """
    channels = sizes[axis]
    if len(node.all_input_nodes) != 1 or channels < 2:
        return False
    few = tuple(channels if i == axis else min(n, _FEW) for i, n in enumerate(sizes))
    operations = _operations(gm, node, channels)
    return bool(operations) and all(_commutes_on(selected, (few, sizes), axis) for selected in operations)


def _operations(gm: fx.GraphModule, node: fx.Node, channels: int) -> list[Selected]:
    """Return what the node computes of its one tensor, in each mode of the module that it calls."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        modes = [False, True] if any(True for _ in module.parameters()) else [module.training]
        return [partial(_call_of_module, node, module, channels, mode) for mode in modes]
    if node.op not in ("call_function", "call_method"):
        return []
    target = node.target if node.op == "call_function" else getattr(Tensor, str(node.target), None)
    return [lambda part: _called(node, target)] if callable(target) else []


def _call_of_module(
    node: fx.Node, module: nn.Module, channels: int, mode: bool, part: Tensor | None
) -> Operation | None:
    new = narrowed(module, torch.arange(channels) if part is None else part, channels)
    if new is not None:
        set_mode(new.double(), mode)
    return _called(node, new)


def _called(node: fx.Node, target: Callable[..., Any] | None) -> Operation | None:
    (argument,) = node.all_input_nodes

    def run(values: Tensor) -> Any:
        assert target is not None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values if n is argument else n)
        return target(*args, **kwargs)

    return None if target is None else run


def _commutes_on(selected: Selected, shapes: tuple[tuple[int, ...], ...], axis: int) -> bool:
    for sizes in dict.fromkeys(shapes):
        try:
            with isolated(nn.Module()), torch.no_grad():
                return _commutes(selected, sizes, axis)
        except Exception:  # whatever the operation says of sizes, dtypes or values that it does not take
            continue
    return False


def _commutes(selected: Selected, sizes: tuple[int, ...], axis: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    channels = sizes[axis]
    for size in _SIZES:
        x = size * torch.randn(sizes, generator=generator, dtype=torch.float64)
        if (operation := selected(None)) is None:
            return False
        whole = operation(x.clone())
        if not isinstance(whole, Tensor) or whole.dim() != x.dim() or whole.shape[axis] != channels:
            return False
        for _ in range(_SETS):
            for part in torch.randperm(channels, generator=generator).split((channels + 1) // 2):
                operation = selected(part)
                if operation is None or not _equal(
                    operation(x.index_select(axis, part)), whole.index_select(axis, part)
                ):
                    return False
    return True


def _equal(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)
