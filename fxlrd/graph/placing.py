"""Modules into a model, under their names and wherever else its modules hold those that were there.

A forward may go over a plain list of layers that are registered as well (Mask2Former's prediction heads): a layer that
is replaced under its name alone would go on computing there.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import nn

_OWN = frozenset(vars(nn.Module()))
_DEPTH = 3


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of those of these names, also in attributes, containers and partial functions.

    Lists, dicts and deques are changed in place.

    >>> model = nn.Sequential(nn.ReLU())
    >>> model.steps = [model[0]]
    >>> put(model, {"0": nn.Identity()})
    >>> model.steps
    [Identity()]
    """
    new = {id(model.get_submodule(name)): module for name, module in modules.items()}
    for name, module in modules.items():
        model.set_submodule(name, module)
    for holder in list(model.modules()):
        for key, value in list(vars(holder).items()):
            if key not in _OWN and (replaced := _with(value, new, _DEPTH)) is not value:
                vars(holder)[key] = replaced


def _with(value: Any, new: Mapping[int, nn.Module], depth: int) -> Any:
    """Return the value with ``new`` modules in the place of those of these identities; itself if it has none."""
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    if depth == 0 or not isinstance(value, (list, tuple, dict, deque, set, functools.partial)):
        return value
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
        func, *others = items = [_with(part, new, depth - 1) for part in parts]
        if all(a is b for a, b in zip(items, parts, strict=True)):
            return value
        args, keywords = others[: len(value.args)], others[len(value.args) :]
        return type(value)(func, *args, **dict(zip(value.keywords, keywords, strict=True)))
    if isinstance(value, (tuple, set)):
        items = [_with(item, new, depth - 1) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        made = getattr(type(value), "_make", type(value))  # of a named tuple
        return made(items) if type(value) in (tuple, set) or made is not type(value) else value
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in pairs:
        if (replaced := _with(item, new, depth - 1)) is not item:
            value[key] = replaced
    return value
