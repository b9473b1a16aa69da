"""Whether an operation treats each channel of a tensor alone, by what it computes.

To select channels S must commute with it, f(x[S]) = f(x)[S], where f on the left has its parameters for S only. That is
checked in float64, on random values of several sizes, for random sets S and their complements: an operation that reads
another channel (a norm over channels, a softmax, a largest entry) sees another set in one of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fxlrd.graph.random import OwnGenerators
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

    A module must do so in eval mode and in training mode, where of random values only the shapes are compared.
    """
    channels = sizes[axis]
    if len(node.all_input_nodes) != 1 or channels < 2:
        return False
    few = tuple(channels if i == axis else min(n, _FEW) for i, n in enumerate(sizes))
    tried = _tried(gm, node, channels)
    return bool(tried) and all(_commutes_on(each, (few, sizes), axis) for each in tried)


class _Tried(NamedTuple):
    """An operation to try; one that ``may_draw`` random numbers gives others with fewer channels."""

    selected: Selected
    may_draw: bool = False


def _tried(gm: fx.GraphModule, node: fx.Node, channels: int) -> list[_Tried]:
    """Return what the node computes of its one tensor, in each mode of the module that it calls."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return [_Tried(partial(_call_of_module, node, module, channels, mode), mode) for mode in (False, True)]
    if node.op not in ("call_function", "call_method"):
        return []
    target = node.target if node.op == "call_function" else getattr(Tensor, str(node.target), None)
    return [_Tried(lambda part: _called(node, target))] if callable(target) else []


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


def _commutes_on(tried: _Tried, shapes: tuple[tuple[int, ...], ...], axis: int) -> bool:
    for sizes in dict.fromkeys(shapes):
        try:
            with isolated(nn.Module()) as generators, torch.no_grad():
                return _commutes(tried, sizes, axis, generators)
        except Exception:  # whatever the operation says of sizes, dtypes or values that it does not take
            continue
    return False


def _commutes(tried: _Tried, sizes: tuple[int, ...], axis: int, generators: OwnGenerators) -> bool:
    generator = torch.Generator().manual_seed(0)
    channels = sizes[axis]
    for size in _SIZES:
        x = size * torch.randn(sizes, generator=generator, dtype=torch.float64)
        if (operation := tried.selected(None)) is None:
            return False
        of_all = operation(x.clone())
        if not isinstance(of_all, Tensor) or of_all.dim() != x.dim() or of_all.shape[axis] != channels:
            return False
        for _ in range(_SETS):
            for part in torch.randperm(channels, generator=generator).split((channels + 1) // 2):
                operation = tried.selected(part)
                made = None if operation is None else operation(x.index_select(axis, part))
                shapes_only = tried.may_draw and generators.drawn
                if not _equal(made, of_all.index_select(axis, part), shapes_only):
                    return False
    return True


def _equal(a: Any, b: Tensor, shapes_only: bool) -> bool:
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    return shapes_only or torch.allclose(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)
