"""Layers in other clothes: modules of any class that compute what a stock conv or linear does.

Some subclasses only call the same function in another way (timm's ``Linear``), some classes write the product out
(``x @ W.T + b``), GPT-2's ``Conv1D`` holds its weight transposed. What such a module is, its behaviour decides: a twin
of it with random weights must give the outputs and the gradients of a stock layer with those weights, in train and in
eval mode, again on a second call. The stock layer around the module's own weights then stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fxlrd.layers.kinds import CONVS, LAYERS, Conv, ConvOrLinear, is_stock, make, options, stock_type
from fxlrd.layers.probes import (
    EXACT,
    behaviour_key,
    close,
    is_more_than_its_forward,
    random_state_kept,
    random_twin,
    random_values,
    takes_one_argument,
    tolerance,
)


def stand_in(module: nn.Module) -> ConvOrLinear | None:
    """Return the stock layer that computes what the module does, or None for a module that is no conv or linear.

    A stock layer stands in for itself. Otherwise the layer is new and holds the module's own parameters, a transposed
    weight as a view of the module's. Hooks, and a forward of this one instance, are not looked at.

    >>> class Product(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.ones(4, 3))
    ...     def forward(self, x):
    ...         return x @ self.weight
    >>> stand_in(Product())
    Linear(in_features=4, out_features=3, bias=False)
    """
    if isinstance(module, LAYERS) and is_stock(module):
        return module
    index = _decision(module)
    return None if index is None else _CANDIDATES[index](module)


def _own_tensors(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None] | None:
    """Return the weight and the bias of a module that holds these and nothing else."""
    parameters = [p for p in module._parameters.values() if p is not None]
    others = [t for t in module._buffers.values() if t is not None]
    if module._modules or others or not 1 <= len(parameters) <= 2 or is_more_than_its_forward(module):
        return None
    if any(isinstance(p, UninitializedParameter) or not p.is_floating_point() for p in parameters):
        return None
    weight, *biases = sorted(parameters, key=Tensor.dim, reverse=True)
    bias = biases[0] if biases else None
    return (weight, bias) if weight.dim() >= 2 and (bias is None or bias.dim() == 1) else None


def linear_around(
    weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool = False, training: bool = False
) -> nn.Linear:
    """Return a Linear that holds these very parameters; of a ``transposed`` weight (C×S) it holds a view."""
    if transposed:
        weight = nn.Parameter(weight.detach().mT, weight.requires_grad)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer._parameters.update(weight=weight, bias=bias)
    return layer.train(training)


def _linear(module: nn.Module) -> ConvOrLinear | None:
    weight, bias = _tensors(module)
    fits = weight.dim() == 2 and (bias is None or len(bias) == len(weight))
    return linear_around(weight, bias, training=module.training) if fits else None


def _transposed_linear(module: nn.Module) -> ConvOrLinear | None:
    weight, bias = _tensors(module)
    fits = weight.dim() == 2 and (bias is None or len(bias) == weight.shape[1])
    return linear_around(weight, bias, transposed=True, training=module.training) if fits else None


def _conv(module: nn.Module, **changes: Any) -> ConvOrLinear | None:
    if not isinstance(module, Conv):
        return None
    weight, bias = _tensors(module)
    layer = make(stock_type(module), options(module) | changes)
    layer._parameters.update(weight=weight, bias=bias)
    assert isinstance(layer, Conv)
    return layer.train(module.training)


def _same_conv(module: nn.Module) -> ConvOrLinear | None:
    # With an even kernel torch warns of a copy of the input.
    if (
        not isinstance(module, CONVS)
        or any(step != 1 for step in module.stride)
        or not all(size % 2 for size in module.kernel_size)
    ):
        return None
    return _conv(module, padding="same")


_Candidate = Callable[[nn.Module], ConvOrLinear | None]
_CANDIDATES: tuple[_Candidate, ...] = (_linear, _transposed_linear, _conv, _same_conv)
"""What a module may be, in the order in which that is tried: each makes the stock layer around its tensors."""


def _tensors(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    tensors = _own_tensors(module)
    assert tensors is not None
    return tensors


# Behaviour is a matter of the class, of plain attributes and of shapes: a model of many equal layers is probed once.
_decisions: WeakKeyDictionary[type, dict[Any, int | None]] = WeakKeyDictionary()


def _decision(module: nn.Module) -> int | None:
    """Return the index of the candidate that the module behaves as."""
    if _own_tensors(module) is None:
        return None
    decisions = _decisions.setdefault(type(module), {})
    key = behaviour_key(module)
    if key not in decisions:
        decisions[key] = _probed(module)
    return decisions[key]


def _probed(module: nn.Module) -> int | None:
    if not takes_one_argument(module):
        return None
    with random_state_kept():
        return next((i for i, candidate in enumerate(_CANDIDATES) if _behaves_as(module, candidate)), None)


def _behaves_as(module: nn.Module, candidate: _Candidate) -> bool:
    try:
        with torch.enable_grad():
            return _gives_the_same(module, candidate)
    except Exception:  # a forward that does not take what a layer takes is no layer, whatever the cause
        return False


def _gives_the_same(module: nn.Module, candidate: _Candidate) -> bool:
    twin = random_twin(module, torch.float64)
    layer = candidate(twin)
    if layer is None:
        return False
    weight, before = _tensors(twin)[0], _tensors(twin)[0].detach().clone()
    for training, x in zip((False, True, False), (*_inputs(layer), *_inputs(layer)), strict=False):
        if not _agree(twin.train(training), layer, x, EXACT):
            return False
    if not torch.equal(weight, before):  # it clips its weight, say
        return False
    return _agrees_in_own_dtype(module, candidate)


def _agrees_in_own_dtype(module: nn.Module, candidate: _Candidate) -> bool:
    """Whether the outputs agree in the module's dtype: its forward may ask for that."""
    dtype = _tensors(module)[0].dtype
    twin = random_twin(module, dtype)
    layer = candidate(twin)
    assert layer is not None
    x = next(_inputs(layer))
    with torch.no_grad():
        output, expected = type(twin).forward(twin, x), layer(x)
    return close(output, expected, tolerance(dtype))


def _inputs(layer: ConvOrLinear) -> Iterator[Tensor]:
    """Yield inputs of two shapes, each with small and large values."""
    if isinstance(layer, nn.Linear):
        shapes: list[tuple[int, ...]] = [(2, 3, layer.in_features), (3, layer.in_features)]
    else:
        sizes = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        shapes = [(2, layer.in_channels, *(size + more for size in sizes)) for more in (3, 4)]
    for shape in shapes:
        x = random_values(shape, seed=7)
        x[0] *= 100
        yield x.to(layer.weight.device, layer.weight.dtype)


def _agree(twin: nn.Module, layer: ConvOrLinear, x: Tensor, tolerance: float) -> bool:
    """Whether both give the same output and the same gradients."""
    weight, bias = _tensors(twin)
    mine = _results(type(twin).forward, twin, x, weight, bias)
    stock = _results(type(layer).forward, layer, x, layer.weight, layer.bias)
    if mine is None or stock is None:
        return False
    if layer.weight is not weight:
        stock["weight"] = stock["weight"].mT
    return all(close(mine[name], stock[name], tolerance) for name in stock)


def _results(
    forward: Callable[..., Any], module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None
) -> dict[str, Tensor] | None:
    """Return the output and the gradients for a fixed cotangent; None where the output is no tensor or misses one."""
    tensors = {"input": x.clone().requires_grad_(), "weight": weight} | ({} if bias is None else {"bias": bias})
    output = forward(module, tensors["input"])
    if not isinstance(output, Tensor):
        return None
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
    gradients = torch.autograd.grad(output, list(tensors.values()), cotangent)
    return {"output": output, **dict(zip(tensors, gradients, strict=True))}
