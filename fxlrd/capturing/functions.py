"""Functions of a Dynamo graph as calls of stock modules: the function and arguments of each module's forward."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.node import has_side_effect

from fxlrd.layers.functions import CALLS, arguments_of, layer_around
from fxlrd.layers.kinds import BATCH_NORMS, OPTIONS, make

_NORM_ARGUMENTS = {
    **{"input": None, "running_mean": None, "running_var": None, "weight": None, "bias": None},
    **{"training": False, "momentum": 0.1, "eps": 1e-5},
}
STATIC = "_dynamo_static_input_type"
"""The mark that Dynamo puts on the placeholders of weights."""


@has_side_effect
def _enter(*_: Any) -> None:
    """Stand for the start of an autocast region in a raised graph, which runs in the dtype of its weights."""


@has_side_effect
def _exit(*_: Any) -> None:
    """Stand for the end of an autocast region."""


AUTOCAST: dict[Any, Any] = {_enter_autocast: _enter, _exit_autocast: _exit}
AUTOCAST_INVERSE = {stand_in: function for function, stand_in in AUTOCAST.items()}


class Path(NamedTuple):
    """Where a node is: the variable that holds the model, the name in it, and the module's class and identity."""

    root: str
    name: str
    cls: type
    key: str


def path_of(node: fx.Node) -> Path:
    """Return which module's forward called the function, as Dynamo recorded it."""
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    if not stack:
        return Path("", "", object, "")
    key, (text, cls) = stack[-1]
    match = re.match(r"[LG]\['([^']+)'\](.*)$", text)
    root, rest = match.groups() if match else ("", text)
    return Path(root, name_in(rest), cls if isinstance(cls, type) else object, str(key).partition("@")[0])


def name_in(source: str) -> str:
    """Return the name of a module in the model, from the expression that Dynamo reached it by.

    Code of the user's may reach a module by other ways than attributes: a class with a ``__getattr__`` of its own
    (diffusers, PEFT) by the dictionary of modules, a forward that was assigned by the module that it is bound to.

    >>> name_in(".__dict__['_modules']['blocks'][0].forward.__self__.conv@2")
    'blocks.0.conv'
    """
    parts: list[str] = []
    for match in re.finditer(r"\['?(.*?)'?\]|([^.\[\]]+)", re.sub(r"@\d+", "", source)):
        part = match[1] or match[2] or ""
        if part == "__self__":  # the part before is the method
            del parts[-1:]
        elif part and part not in ("_modules", "_orig_mod") and not part.startswith("__"):
            parts.append(part)
    return ".".join(part for part in parts if not hasattr(nn.Module, part))


def is_stock_call(node: fx.Node) -> bool:
    """Whether the function is what a stock layer's or BatchNorm's own forward calls; a subclass may do more."""
    if node.target is F.batch_norm:
        return path_of(node).cls in BATCH_NORMS
    return node.target in CALLS and CALLS[node.target][0] is path_of(node).cls


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by name, with defaults filled in."""
    if node.target is F.batch_norm:
        return {**_NORM_ARGUMENTS, **dict(zip(_NORM_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    return arguments_of(node.target, node.args, node.kwargs)


def module_of(node: fx.Node, weights: Mapping[str, Tensor]) -> nn.Module | None:
    """Return the stock module whose forward calls such a function, around the very same weights, or None."""
    tensors: dict[str, Tensor | None] = {"weight": None, "bias": None}
    settings: dict[str, Any] = {}
    for key, value in arguments(node).items():
        if key == "input":
            if not isinstance(value, fx.Node):
                return None
        elif isinstance(value, fx.Node):
            tensor = weights.get(value.name)
            plain = type(tensor) is nn.Parameter or (key.startswith("running_") and type(tensor) is Tensor)
            if tensor is None or not plain or not tensor.is_floating_point():
                return None  # computed, as where it is parametrized, or quantized
            tensors[key] = tensor
        elif isinstance(value, (list, tuple)) and any(isinstance(v, fx.Node) for v in value):
            return None
        elif key not in tensors:
            settings[key] = tuple(value) if isinstance(value, list) else value
    return _norm(node, settings, tensors) if node.target is F.batch_norm else _stock(node, settings, tensors)


def _stock(node: fx.Node, settings: dict[str, Any], tensors: dict[str, Tensor | None]) -> nn.Module | None:
    cls, weight = CALLS[node.target][0], tensors["weight"]
    if weight is None or (cls is nn.Linear and weight.dim() != 2):
        return None
    return layer_around(node.target, weight, tensors["bias"], settings)


def _norm(node: fx.Node, settings: dict[str, Any], tensors: dict[str, Tensor | None]) -> nn.Module | None:
    cls = next((c for c in BATCH_NORMS if c is path_of(node).cls), None)
    mean = tensors.get("running_mean")
    if cls is None or settings.get("training") or mean is None or tensors.get("running_var") is None:
        return None
    affine = tensors["weight"] is not None
    if affine != (tensors["bias"] is not None):
        return None
    settings |= {"num_features": len(mean), "affine": affine, "bias": affine, "track_running_stats": True}
    norm = _with_tensors(make(cls, {name: settings[name] for name in OPTIONS[cls]}), tensors)
    norm._buffers["num_batches_tracked"] = None
    return norm


def _with_tensors(module: nn.Module, tensors: dict[str, Tensor | None]) -> nn.Module:
    for key, tensor in tensors.items():
        (module._buffers if key.startswith("running_") else module._parameters)[key] = tensor  # type: ignore[assignment]
    return module
