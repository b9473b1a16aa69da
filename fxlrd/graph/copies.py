"""Copies of a model: with modules of their own, and with the model's tensors or tensors of their own.

The user's model is never run or traced, since that may leave something on it: features, caches, buffers, modes. A copy
is. It must be a model of its own: what the modules hold is copied, and functions that refer to modules of the model, as
hooks and lambdas do, refer to those of the copy.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from fxlrd.errors import FxlrdError, one_line

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType)
_ATOMIC = {type(None), bool, int, float, complex, str, bytes}
_DICTS = (dict, OrderedDict)
_SEQUENCES = (list, tuple, set, frozenset)
_DEPTH = 6
"""Containers and partial functions inside each other that are searched for functions, at most."""
_OWN_DICTS = ("_parameters", "_buffers", "_modules")


def structural_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model with modules of its own that hold the very same parameters and buffers."""
    return _copied(model, {id(t): t for t in chain(model.parameters(), model.buffers())})


def private_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model with modules and buffers of its own, and the very same parameters."""
    return _copied(model, {id(t): t for t in model.parameters()})


def independent_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model that shares nothing with it. Raises FxlrdError where something cannot be copied."""
    return _copied(model, {}, share=False)


def _copied(model: nn.Module, memo: dict[int, Any], share: bool = True) -> nn.Module:
    # A tensor with a gradient history that a forward stored on its module is no parameter, and deepcopy refuses it.
    stored = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    start = {id(t): t.detach().clone() for t in stored} | memo
    try:
        return _deep_copied(model, dict(start))
    except Exception as error:
        try:
            if share and (uncopied := _uncopyable(model, start)):
                return _deep_copied(model, start | uncopied)
        except Exception:
            pass
        raise FxlrdError(
            f"{type(model).__name__} cannot be copied ({one_line(error)}): does it hold a lock or an open file?"
        ) from error


def _deep_copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return what deepcopy does, with functions of its own; modules are copied at a tenth of the time it takes."""
    functions = _Functions(model)
    memo.update(functions.copies)
    modules = list(model.modules())
    classes = {cls for cls in {type(m) for m in modules} if _copied_by_attributes(cls)}
    plain = [m for m in modules if type(m) in classes]
    memo.update({id(m): object.__new__(type(m)) for m in plain})
    for module in reversed(plain):  # modules before those that hold them, which may look at them
        own = {name: value for name, value in vars(module).items() if name != "_compiled_call_impl"}
        vars(memo[id(module)]).update({name: _copied_value(value, memo) for name, value in own.items()})
    result: nn.Module = copy.deepcopy(model, memo)
    functions.fill(memo)
    if functions.copies:
        functions.install(result)
    return result


def _copied_by_attributes(cls: type[nn.Module]) -> bool:
    """Whether to copy instances of the class is to copy their attributes: it says nothing else of copies."""
    stock = all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in _COPYING)
    return stock and not hasattr(cls, "__deepcopy__") and not copyreg._slotnames(cls)  # type: ignore[attr-defined]


_COPYING = ("__reduce_ex__", "__reduce__", "__getstate__")


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMIC:
        return value
    if (copied := memo.get(id(value))) is not None:
        return copied
    if kind in _DICTS:
        memo[id(value)] = new = kind()
        new.update({key: _copied_value(item, memo) for key, item in value.items()})
        return new
    if kind in (tuple, set) and all(type(item) in _ATOMIC for item in value):
        return kind(value)
    return copy.deepcopy(value, memo)


def _uncopyable(model: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """Return the attributes of modules that cannot be copied, by identity: locks, files, handles.

    An iterator is none: who shares it also advances it.
    """
    known = {id(m): m for m in model.modules()}
    shared: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in _OWN_DICTS or isinstance(value, (*_PLAIN, Iterator)):
                continue
            try:
                copy.deepcopy(value, {**memo, **known, **shared})
            except Exception:
                shared[id(value)] = value
    return shared


class _Functions:
    """Copies of the functions that a model's modules hold and whose closures refer to modules of the model.

    deepcopy takes functions over as they are: a hook or a lambda of the copy would call the original's modules.

    Attributes:
        copies: by the identity of a function, a copy of it, whose closure is empty until `fill`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {id(m) for m in model.modules()}
        self._searched: set[int] = set()
        self._cells: dict[int, tuple[types.CellType, types.CellType]] = {}
        self.copies: dict[int, Any] = {}
        for module in model.modules():
            for name, value in vars(module).items():
                empty = type(value) in _DICTS and not value
                if not empty and type(value) not in _ATOMIC and name not in _OWN_DICTS:
                    self._search(value, _DEPTH)

    def fill(self, memo: dict[int, Any]) -> None:
        """Put into the closures of the copies what those of the originals hold, copied as far as it is the model's."""
        for cell, new in self._cells.values():
            for contents in _contents([cell]):
                new.cell_contents = copy.deepcopy(contents, memo) if self._refers(contents, _DEPTH) else contents

    def install(self, model: nn.Module) -> None:
        """Put the copies in the place of functions that deepcopy took over, as Python 3.14's does whatever its memo."""
        for module in model.modules():
            for holder in (vars(module), *vars(module).values()):
                if isinstance(holder, dict):
                    for key in [k for k, v in holder.items() if id(v) in self.copies]:
                        holder[key] = self.copies[id(holder[key])]

    def _search(self, value: Any, depth: int) -> None:
        if isinstance(value, (*_PLAIN, Tensor, nn.Module)) or not depth or id(value) in self._searched:
            return
        self._searched.add(id(value))
        if isinstance(value, types.FunctionType):
            self._copy(value, depth)
        for part in _parts(value):
            if type(part) not in _ATOMIC:
                self._search(part, depth - 1)

    def _copy(self, function: types.FunctionType, depth: int) -> None:
        cells = function.__closure__ or ()
        if id(function) in self.copies or not any(self._refers(c, depth) for c in _contents(cells)):
            return
        closure = tuple(self._cells.setdefault(id(cell), (cell, types.CellType()))[1] for cell in cells)
        code, names, name = function.__code__, function.__globals__, function.__name__
        new = types.FunctionType(code, names, name, function.__defaults__, closure)
        new.__kwdefaults__, new.__qualname__ = function.__kwdefaults__, function.__qualname__
        new.__dict__.update(function.__dict__)
        self.copies[id(function)] = new
        for contents in _contents(cells):
            self._search(contents, depth - 1)

    def _refers(self, value: Any, depth: int) -> bool:
        """Whether the value is, or holds, a module of the model."""
        if isinstance(value, nn.Module):
            return id(value) in self._modules
        if isinstance(value, (*_PLAIN, Tensor)) or not depth:
            return False
        inside = _contents(value.__closure__ or ()) if isinstance(value, types.FunctionType) else _parts(value)
        return any(self._refers(part, depth - 1) for part in inside)


def _parts(value: Any) -> Iterable[Any]:
    """Return what a container, a bound method, a partial function or an object with attributes holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, _SEQUENCES):
        return list(value)
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    return list(getattr(value, "__dict__", {}).values())


def _contents(cells: Iterable[types.CellType]) -> list[Any]:
    """Return what closures hold; a cell is empty while its variable is not assigned."""
    empty = types.CellType()
    return [cell.cell_contents for cell in cells if cell != empty]
