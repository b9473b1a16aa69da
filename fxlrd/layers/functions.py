"""The functions that the forwards of stock layers call: which, and with what arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fxlrd.layers.kinds import CONVS, OPTIONS, TRANSPOSED, ConvOrLinear, as_layer, make

# The arguments of torch's functions in order, and their defaults: inspect cannot read the signatures.
TENSORS = {"input": None, "weight": None, "bias": None}
_DEFAULTS = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
_CONV_ARGUMENTS = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("stride", "padding", "output_padding", "groups", "dilation")
_CONV_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED_FUNCTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _arguments_after_tensors(names: Sequence[str]) -> dict[str, Any]:
    return {**TENSORS, **{name: _DEFAULTS[name] for name in names}}


CALLS: dict[Any, tuple[type[nn.Module], dict[str, Any]]] = {
    F.linear: (nn.Linear, TENSORS),
    **{
        function: (kind, _arguments_after_tensors(_CONV_ARGUMENTS))
        for function, kind in zip(_CONV_FUNCTIONS, CONVS, strict=True)
    },
    **{
        function: (kind, _arguments_after_tensors(_TRANSPOSED_ARGUMENTS))
        for function, kind in zip(_TRANSPOSED_FUNCTIONS, TRANSPOSED, strict=True)
    },
}
"""By function: the module whose forward calls it, and the function's arguments with their defaults, in order."""
FUNCTIONS = {kind: function for function, (kind, _) in CALLS.items()}


def arguments_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a function in `CALLS` by name, with defaults filled in."""
    names = CALLS[function][1]
    return {**names, **dict(zip(names, args, strict=False)), **kwargs}


def layer_around(function: Any, weight: Tensor, bias: Tensor | None, settings: Mapping[str, Any]) -> ConvOrLinear:
    """Return the stock layer that calls the function with these very tensors and settings (stride, padding, …)."""
    cls = CALLS[function][0]
    outer, inner = weight.shape[:2]
    options: dict[str, Any] = {**settings, "bias": bias is not None}
    if cls is nn.Linear:
        options |= {"in_features": inner, "out_features": outer}
    else:
        inner *= settings["groups"]
        sizes = (outer, inner) if cls in TRANSPOSED else (inner, outer)
        options |= {"in_channels": sizes[0], "out_channels": sizes[1], "kernel_size": tuple(weight.shape[2:])}
        options["padding_mode"] = "zeros"
    layer = as_layer(make(cls, {name: options[name] for name in OPTIONS[cls]}))
    tensors: Any = {"weight": weight, "bias": bias}
    layer._parameters.update(tensors)
    return layer
