"""Modules into a model, under their names and wherever else its modules hold those that were there.

A forward may go over a plain list of layers that are registered as well (Mask2Former's prediction heads): a layer that
is replaced under its name alone would go on computing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_OWN = frozenset(vars(nn.Module()))
_DEPTH = 3


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of those of these names, also in lists, tuples, dicts and attributes that hold those.

    Lists and dicts are changed in place.

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
    if depth == 0 or not isinstance(value, (list, tuple, dict)):
        return value
    if isinstance(value, tuple):
        items = [_with(item, new, depth - 1) for item in value]
        same = all(a is b for a, b in zip(items, value, strict=True))
        return value if same or type(value) is not tuple else tuple(items)
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in pairs:
        if (replaced := _with(item, new, depth - 1)) is not item:
            value[key] = replaced
    return value
