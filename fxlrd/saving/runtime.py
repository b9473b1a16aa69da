"""Tensors that a model's own forward assigns: caches that take their shape from the inputs, and state that it carries.

``self.anchors = make_anchors(…)`` in a forward gives the attribute, or buffer, a shape that no construction sets. So
its shape is no part of an architecture. What forward assigns is read from the code of its class: of ``forward``, and of
the methods that it names, and those that they name.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from fxlrd.saving.tensors import joined

_NO_ATTRIBUTES: Mapping[str, frozenset[str]] = {}


@functools.cache
def assigned_in_forward(cls: Any) -> Mapping[str, frozenset[str]]:
    """Return what ``forward`` assigns to attributes of the module, each with what is assigned in the same methods.

    Methods of torch's own classes are left out.
    """
    methods: dict[str, FunctionType] = {}
    for kind in reversed(cls.__mro__):
        if not kind.__module__.startswith("torch."):
            methods.update({name: f for name, value in vars(kind).items() if (f := _function(value)) is not None})
    if "forward" not in methods:
        return _NO_ATTRIBUTES
    reached, waiting = set(), ["forward"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        named = {n for code in _codes(methods[name].__code__) for n in code.co_names}
        waiting += (named & methods.keys()) - reached - set(waiting)
    stores = [frozenset(_stored(methods[name])) for name in sorted(reached - {"__init__"})]
    return {key: frozenset().union(*(s for s in stores if key in s)) - {key} for key in frozenset().union(*stores)}


def _function(value: Any) -> FunctionType | None:
    """Return the function of a method or property, without its decorators."""
    value = value.fget if isinstance(value, property) else getattr(value, "func", value)
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _stored(function: FunctionType) -> Iterator[str]:
    """Yield the names of the attributes of its first argument that a method assigns."""
    code = function.__code__
    if not code.co_argcount:
        return
    first, before = code.co_varnames[0], ""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR" and before.split(", ")[-1] == first:
            yield str(instruction.argval)
        if instruction.opname not in ("CACHE", "EXTENDED_ARG"):
            before = instruction.argrepr


def runtime_buffers(module: nn.Module) -> set[str]:
    """Return the names of a module's own buffers that its forward assigns."""
    cls: Any = type(module)
    return module._buffers.keys() & assigned_in_forward(cls).keys()


def runtime_tensors(model: nn.Module) -> dict[str, bool]:
    """Return the buffers and tensor attributes that forwards assign, by name, and whether a checkpoint lacks a part.

    It does where one method assigns the tensor and something that is no tensor, such as the size that it was made for:
    the two are of no use without each other.
    """
    result = {}
    for name, module in model.named_modules(remove_duplicate=False):
        cls: Any = type(module)
        tensors = {**vars(module), **module._buffers}
        for key, others in assigned_in_forward(cls).items():
            if isinstance(tensors.get(key), Tensor):
                result[joined(name, key)] = not all(isinstance(tensors.get(other), Tensor) for other in others)
    return result
