"""Convs and linear layers that compute their weight, or pad their input, before the one function that they call.

Weight standardisation (BiT, NFNets), a scale on the weight (StyleGAN), a mask; "same" padding by the input's size
(TensorFlow's), causal padding. Such a module is a stock layer around the computed weight, behind the padding, exactly
and for every input. Whether it is, its behaviour decides: a twin of it with random weights is run on inputs of several
sizes, in eval and in training mode, and the arguments are noted with which it calls the function.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from fxlrd.layers.functions import CALLS, arguments_of, layer_around
from fxlrd.layers.kinds import LAYERS, Conv, ConvOrLinear, as_layer, is_stock
from fxlrd.layers.padding import FixedPadding, Padding, SamePadding
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
from fxlrd.layers.stand_ins import stand_in

_SIZES = 5
"""Sizes of inputs that a conv is tried on: more than its stride, as a rule."""


@dataclass(frozen=True)
class Folded:
    """What a module computes: ``layer``, after ``padding`` if it is not None.

    The layer holds the module's own parameters where the module uses them as they are, and computed ones otherwise.
    """

    layer: ConvOrLinear
    padding: Padding | None = None


def fold(module: nn.Module) -> Folded | None:
    """Return the stock layer, and the padding before it, that computes what the module does; None if there is none.

    A module that `stand_in` finds a layer for is not folded. Hooks, and a forward of this one instance, are not looked
    at.

    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return nn.functional.linear(x, self.weight * 2, self.bias)
    >>> scaled = Scaled(2, 3)
    >>> bool((fold(scaled).layer.weight == scaled.weight * 2).all())
    True
    """
    decision = _decision(module)
    if decision is None:
        return None
    tensors = {id(t): t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
    own = copy.deepcopy(module, tensors)
    x = next(_inputs(own, decision.channels)).to(next(iter(tensors.values())))
    with torch.no_grad():
        call = _noted(own, x, training=False)
        if call is None:
            return None
        layer = _layer(call, module)
        folded = Folded(layer.train(module.training), decision.padding)
        return folded if close(call.output, _output(folded, x), tolerance(x.dtype)) else None


def padding_before(module: nn.Module) -> Padding | None:
    """Return the padding before the stock layer of a module that can be folded, or None."""
    decision = _decision(module)
    return None if decision is None else decision.padding


def is_layer(module: nn.Module) -> bool:
    """Whether the module is a conv or linear, a subclass of one, or computes what one does."""
    return isinstance(module, LAYERS) or stand_in(module) is not None or _decision(module) is not None


def layer_of(module: nn.Module) -> ConvOrLinear:
    """Return the layer that a module is (`is_layer`): itself, or the stock layer that computes what it does."""
    if (layer := stand_in(module)) is not None:
        return layer
    folded = fold(module)
    return folded.layer if folded is not None else as_layer(module)


def stock_layer(module: nn.Module) -> nn.Module:
    """Return the stock layer that computes what a module does by itself; one that is no layer, or pads, as it is."""
    if (layer := stand_in(module)) is not None:
        return layer
    folded = fold(module) if padding_before(module) is None else None
    return module if folded is None else folded.layer


@dataclass(frozen=True)
class _Decision:
    """That a module may be folded: the channels of its input, and how it pads that."""

    channels: int
    padding: Padding | None


# As in `stand_ins`: a model of many equal layers is probed once.
_decisions: WeakKeyDictionary[type, dict[Any, _Decision | None]] = WeakKeyDictionary()


def _decision(module: nn.Module) -> _Decision | None:
    if not _may_fold(module) or stand_in(module) is not None:
        return None
    decisions = _decisions.setdefault(type(module), {})
    key = behaviour_key(module)
    if key not in decisions:
        with random_state_kept():
            decisions[key] = _probed(module)
    return decisions[key]


def _may_fold(module: nn.Module) -> bool:
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    parameters = [p for p in module._parameters.values() if p is not None]
    return (
        not module._modules
        and not any(isinstance(t, (UninitializedBuffer, UninitializedParameter)) or t.is_meta for t in tensors)
        and any(p.dim() >= 2 for p in parameters)
        and all(p.is_floating_point() for p in parameters)
        and not type(module).__module__.startswith("torch.")
        and not (isinstance(module, LAYERS) and is_stock(module))
        and not is_more_than_its_forward(module)
        and takes_one_argument(module)
    )


def _probed(module: nn.Module) -> _Decision | None:
    for channels in _channels(module):
        try:
            decision = _tried(module, channels)
        except Exception:  # a forward that does not take what a layer takes is no layer, whatever the cause
            continue
        if decision is not None:
            return decision
    return None


def _tried(module: nn.Module, channels: int) -> _Decision | None:
    twin = random_twin(module, torch.float64)
    before = {name: t.detach().clone() for name, t in twin.state_dict().items()}
    inputs = list(_inputs(twin, channels))
    inputs[0].requires_grad_()
    with torch.enable_grad():
        calls = [_noted(twin, x, training) for x, training in zip(inputs, cycle((False, True)), strict=False)]
    noted = [call for call in calls if call is not None]
    if len(noted) < len(inputs) or not all(_alike(call, noted[0]) for call in noted):
        return None
    layer = _layer(noted[0], twin)
    folds = (Folded(layer, padding) for padding in _paddings(noted, layer))
    folded = next((each for each in folds if _gives_outputs(each, noted)), None)
    if folded is None or not _same_gradient(noted[0].output, _output(folded, inputs[0]), inputs[0]):
        return None
    unchanged = all(torch.equal(t, before[name]) for name, t in twin.state_dict().items())
    return _Decision(channels, folded.padding) if unchanged else None


def _gives_outputs(folded: Folded, calls: Sequence[_Call]) -> bool:
    try:
        return all(close(call.output, _output(folded, call.input), EXACT) for call in calls)
    except RuntimeError:  # without its padding, an input is smaller than the kernel
        return False


def _output(folded: Folded, x: Tensor) -> Tensor:
    output: Tensor = folded.layer(x if folded.padding is None else folded.padding.apply(x))
    return output


def _same_gradient(output: Tensor, expected: Tensor, x: Tensor) -> bool:
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
    mine, stock = (torch.autograd.grad(value, x, cotangent)[0] for value in (output, expected))
    return close(mine, stock, EXACT)


def _channels(module: nn.Module) -> list[int]:
    """Return how many channels the module's input may have."""
    if isinstance(module, nn.Linear):
        return [module.in_features]
    if isinstance(module, Conv):
        return [module.in_channels]
    shape = _weight(module).shape
    if len(shape) == 2:
        return [shape[1], shape[0]]
    groups = getattr(module, "groups", 1)
    return [shape[1] * groups if isinstance(groups, int) else shape[1]]


def _weight(module: nn.Module) -> Tensor:
    return max((p for p in module._parameters.values() if p is not None), key=lambda p: (p.dim(), p.numel()))


def _inputs(module: nn.Module, channels: int) -> Iterator[Tensor]:
    """Yield inputs of several sizes, which differ from axis to axis."""
    weight = _weight(module)
    if weight.dim() == 2:
        shapes: list[tuple[int, ...]] = [(2, 3, channels), (3, channels), (1, 2, channels)]
    else:
        dilation = getattr(module, "dilation", 1)
        steps = dilation if isinstance(dilation, tuple) else (dilation,) * (weight.dim() - 2)
        extents = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], steps, strict=True)]
        shapes = [
            (2 if not more else 1, channels, *(e + more + i for i, e in enumerate(extents))) for more in range(_SIZES)
        ]
    for shape in shapes:
        yield random_values(shape, seed=7).to(weight.device, weight.dtype)


@dataclass
class _Call:
    """A module's one call of a function of stock layers: the function, its arguments, paddings before it, the output.

    ``input`` is the module's; the function has got ``arguments["input"]``.
    """

    function: Any
    arguments: Mapping[str, Any]
    pads: Sequence[tuple[tuple[int, ...], str, float]]
    input: Tensor
    output: Tensor

    @property
    def settings(self) -> dict[str, Any]:
        """Stride, padding and so on, of a conv."""
        settings = {key: v for key, v in self.arguments.items() if key not in ("input", "weight", "bias")}
        return {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}


class _Noting(TorchFunctionMode):
    """Notes the calls of functions of stock layers, and of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.pads: list[tuple[tuple[int, ...], str, float]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.pad:
            self._note_padding(*args, **kwargs)
        elif func in CALLS:
            self.calls.append((func, arguments_of(func, args, kwargs)))
        return func(*args, **kwargs)

    def _note_padding(self, input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> None:
        self.pads.append((tuple(int(p) for p in pad), mode, value or 0.0))


def _noted(module: nn.Module, x: Tensor, training: bool) -> _Call | None:
    module.train(training)
    with _Noting() as noting:
        output = type(module).forward(module, x)
    if len(noting.calls) != 1 or not isinstance(output, Tensor):
        return None
    function, arguments = noting.calls[0]
    return _Call(function, arguments, noting.pads, x, output)


def _alike(call: _Call, first: _Call) -> bool:
    """Whether two calls are of one function with the same weight, bias and settings."""
    bias, first_bias = call.arguments["bias"], first.arguments["bias"]
    return (
        call.function is first.function
        and call.settings == first.settings
        and close(call.arguments["weight"], first.arguments["weight"], EXACT)
        and (bias is first_bias is None or (first_bias is not None and close(bias, first_bias, EXACT)))
    )


def _layer(call: _Call, module: nn.Module) -> ConvOrLinear:
    def parameter(tensor: Tensor | None) -> nn.Parameter | None:
        own = next((p for p in module._parameters.values() if p is tensor), None)
        if tensor is None or own is not None:
            return own
        return nn.Parameter(tensor.detach().clone(), _weight(module).requires_grad)

    weight = parameter(call.arguments["weight"])
    assert weight is not None
    return layer_around(call.function, weight, parameter(call.arguments["bias"]), call.settings)


def _paddings(calls: Sequence[_Call], layer: ConvOrLinear) -> Iterator[Padding | None]:
    """Yield what may come before the function in all the calls: nothing, the padding that was noted, "same" padding."""
    yield None
    if len({tuple(call.pads) for call in calls}) == 1 and len(calls[0].pads) == 1:
        yield FixedPadding(*calls[0].pads[0])
    if isinstance(layer, Conv):
        extents = tuple(d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
        yield SamePadding(extents, tuple(layer.stride))
