"""What is written down of a model's modules, so that another model can be compared with it without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fxlrd.layers.attention import ProjectedAttention
from fxlrd.saving.runtime import runtime_buffers
from fxlrd.saving.schema import ModuleDescription
from fxlrd.saving.tensors import parents

_FREE = {"p", "inplace", "momentum", "training"}
"""Options that may differ between two instances of one architecture: no output in eval mode depends on them."""
_DROPS = ("p", "drop_prob")
"""A module that has one of these drops values in training: Dropout, StochasticDepth, DropPath."""
_ABSENT = object()


def description(module: nn.Module) -> ModuleDescription:
    """Return a module's class, the options that set what it computes, and the shapes of its own tensors.

    The options are those that its class lists in ``__constants__``, as far as JSON has them. Buffers that its forward
    assigns are left out.
    """
    listed = {name: getattr(module, name, _ABSENT) for name in getattr(module, "__constants__", ())}
    options = {name: _plain(value) for name, value in listed.items() if name not in _FREE and _is_plain(value)}
    tensors = {**module._parameters, **module._buffers}
    at_runtime = runtime_buffers(module)
    shaped = {n: t for n, t in tensors.items() if t is not None and n not in at_runtime}
    shapes = {n: None if is_lazy(t) else tuple(t.shape) for n, t in shaped.items()}
    return ModuleDescription(type(module).__name__, options, shapes)


def is_as_described(module: nn.Module, was: ModuleDescription) -> bool:
    """Whether the description of the module is this one. Buffers that its forward assigns do not count."""
    at_runtime = runtime_buffers(module)
    return description(module) == replace(was, shapes={n: s for n, s in was.shapes.items() if n not in at_runtime})


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    """Return a value as it comes back from JSON: tuples are lists."""
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def descriptions(model: nn.Module, replaced: Mapping[str, nn.Module] | None = None) -> dict[str, ModuleDescription]:
    """Return a description of every module that computes something, by name.

    Modules ``replaced`` are described instead of those that have replaced them. Containers are left out, and modules
    that do nothing in eval mode: whether a model has a Dropout may depend on how it is trained. An open attention is
    described as the stock one that it was.
    """
    modules = dict(model.named_modules())
    opened = {name: module for name, module in modules.items() if isinstance(module, ProjectedAttention)}
    replaced = {name: module for name, module in (replaced or {}).items() if name not in opened}
    closed = {part: m for name, was in opened.items() for part, m in was.closed().named_modules(prefix=name)}
    inside = {f"{name}.{part}": m for name, was in replaced.items() for part, m in was.named_modules() if part}
    described = {}
    for name, module in {**modules, **replaced, **inside, **closed}.items():
        around = parents(name)
        if name not in inside and any(parent in replaced for parent in around):
            continue
        if name not in closed and any(parent in opened for parent in around):
            continue
        own = description(module)
        idle = isinstance(module, nn.Identity) or any(hasattr(module, option) for option in _DROPS)
        if own.shapes or own.options or not (module._modules or idle):
            described[name] = own
    return described


def mismatch(wanted: Mapping[str, ModuleDescription], model: nn.Module) -> str | None:
    """Return the first difference between a model and these descriptions as text, or None."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, was in wanted.items():
        if name not in modules:
            return f"the model has no module {name[:80]!r}"
        if is_as_described(modules[name], was):
            continue
        if (text := _difference(description(modules[name]), was, is_model=not name)) is not None:
            return f"{name or 'the model'}{text}"
    if (more := next((name for name in descriptions(model) if name not in wanted), None)) is not None:
        return f"{more or 'the model'} is a {type(modules[more]).__name__} and was not there"
    return None


def _difference(now: ModuleDescription, was: ModuleDescription, is_model: bool) -> str | None:
    """Return the first difference; the model itself may be of a class of any name."""
    if now.kind != was.kind and not is_model:
        return f" is a {now.kind} in the model and was a {was.kind[:80]!r}"
    for option in sorted(was.options.keys() & now.options.keys()):  # what other versions of torch list may be more
        if now.options[option] != was.options[option]:
            return f": {option} is {now.options[option]!r} and was {str(was.options[option])[:80]!r}"
    for tensor in {**now.shapes, **was.shapes}:
        if now.shapes.get(tensor, _ABSENT) != was.shapes.get(tensor, _ABSENT):
            a, b = (_shape_text(side.shapes.get(tensor)) for side in (now, was))
            return f": the shape of {tensor[:80]!r} is {a} and was {b[:80]!r}"
    return None


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return str(None if shape is None else list(shape))
