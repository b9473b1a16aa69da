"""Whether an operation treats each channel of a tensor alone, by what it computes.

To select channels S must commute with it, f(x[S]) = f(x)[S]. That is checked in float64, on random values of several
sizes, for random sets S and their complements: an operation that reads a value of another channel (a norm, a softmax, a
largest entry) sees another set in one of the two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.graph.run import evaluating, isolated

_SETS = 4
"""Random sets of channels that are tried, each with its complement."""
_SIZES = (1.0, 30.0)
_FEW = 3
"""The size of the other axes, where the operation works on so few."""


def commutes_with_selection(gm: fx.GraphModule, node: fx.Node, sizes: tuple[int, ...], axis: int) -> bool:
    """Whether selecting channels along ``axis`` commutes with an operation of one tensor of shape ``sizes``.

    Modules with parameters or buffers do not count: these would have to be cut as well.
    """
    function = _function(gm, node)
    channels = sizes[axis]
    if function is None or channels < 2:
        return False
    few = tuple(channels if i == axis else min(n, _FEW) for i, n in enumerate(sizes))
    for tried in dict.fromkeys((few, sizes)):
        try:
            return _commutes(function, tried, axis)
        except Exception:  # whatever the operation says of sizes, dtypes or values that it does not take
            continue
    return False


def _function(gm: fx.GraphModule, node: fx.Node) -> Callable[[Tensor], Any] | None:
    """Return the operation of its one tensor, or None if it has others or a state."""
    if len(node.all_input_nodes) != 1 or sum(1 for a in (*node.args, *node.kwargs.values()) if a is node) > 1:
        return None
    argument = node.all_input_nodes[0]
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if module.state_dict() or any(True for _ in module.parameters()):
            return None
        target: Callable[..., Any] = copy.copy(module).double()
    elif node.op == "call_function":
        assert callable(node.target)
        target = node.target
    elif node.op == "call_method":
        target = getattr(Tensor, str(node.target), None) or _none
    else:
        return None

    def run(values: Tensor) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values if n is argument else n)
        return target(*args, **kwargs)

    return run


def _none(*_: Any) -> None:
    return None


def _commutes(function: Callable[[Tensor], Any], sizes: tuple[int, ...], axis: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    channels = sizes[axis]
    holder = nn.Module()
    with isolated(holder), torch.no_grad(), evaluating(holder):
        for size in _SIZES:
            x = size * torch.randn(sizes, generator=generator, dtype=torch.float64)
            whole = function(x.clone())
            if not isinstance(whole, Tensor) or whole.dim() != x.dim() or whole.shape[axis] != channels:
                return False
            for _ in range(_SETS):
                order = torch.randperm(channels, generator=generator)
                for part in order.split(max(1, channels // 2)):
                    selected = function(x.index_select(axis, part))
                    if not _equal(selected, whole.index_select(axis, part)):
                        return False
    return True


def _equal(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)
