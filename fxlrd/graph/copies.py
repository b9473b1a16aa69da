"""Copies of a model: with modules of their own, and with the model's tensors or tensors of their own.

The user's model is never run or traced, since that may leave something on it: features, caches, buffers, modes. A copy
is. It must be a model of its own: what the modules hold is copied, and functions that refer to the modules or to what
they hold, as hooks and lambdas do, refer to those of the copy.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from itertools import chain
from typing import Any

from torch import Tensor, nn

from fxlrd.errors import FxlrdError, one_line

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType)
_ATOMIC = {type(None), bool, int, float, complex, str, bytes}
_DICTS = (dict, OrderedDict)
_SEQUENCES = (list, tuple, set, frozenset)
_MUTABLE = (dict, list, set, bytearray, deque, Tensor)
_IMMUTABLE = (*_PLAIN, tuple, frozenset, Enum, types.FunctionType, types.MethodType, functools.partial)
_WEAK = (weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType)
_DEPTH = 6
"""Containers and partial functions inside each other that are searched for functions, at most."""
_OWN_DICTS = ("_parameters", "_buffers", "_modules")


def structural_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model with modules of its own that hold the very same parameters and buffers."""
    return _copied(model, {id(t): t for t in chain(model.parameters(), model.buffers())})


def private_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model with modules and buffers of its own, and the very same parameters."""
    return _copied(model, {id(t): t for t in model.parameters()})


def aliasing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model with buffers and parameters of its own, of which the latter have the same memory.

    Gradients of theirs do not reach the model's parameters; what is written into them does.
    """
    plain = [p for p in model.parameters() if type(p) is nn.Parameter]
    return _copied(model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in plain}, share=False)


def independent_copy(model: nn.Module, moved: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Return a copy of the model that shares nothing with it but the tensors ``moved``, given by identity.

    Raises FxlrdError where something cannot be copied.
    """
    return _copied(model, dict(moved or {}), share=False)


def _copied(model: nn.Module, memo: dict[int, Any], share: bool = True) -> nn.Module:
    held = _held(model, memo)
    # A tensor with a gradient history that a forward stored on its module is no parameter, and deepcopy refuses it.
    stored = [value for value in held.values() if isinstance(value, Tensor) and not value.is_leaf]
    start = {id(t): t.detach().clone() for t in stored} | memo
    try:
        return _deep_copied(model, dict(start), held)
    except Exception as error:
        try:
            if share and (uncopied := _uncopyable(model, start)):
                shared = start | uncopied
                return _deep_copied(model, dict(shared), _held(model, shared))
        except Exception:
            pass
        raise FxlrdError(
            f"{type(model).__name__} cannot be copied ({one_line(error)}): does it hold a lock or an open file?"
        ) from error


def _deep_copied(model: nn.Module, memo: dict[int, Any], held: Mapping[int, Any]) -> nn.Module:
    """Return what deepcopy does, with functions of its own; modules are copied at a tenth of the time it takes."""
    modules = list(model.modules())
    functions = _Functions(modules, held)
    memo.update(functions.copies)
    classes = {cls for cls in {type(m) for m in modules} if _copied_by_attributes(cls)}
    plain = [m for m in modules if type(m) in classes]
    memo.update({id(m): object.__new__(type(m)) for m in plain})
    functions.point(memo)
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
        memo[id(value)] = atoms = kind(value)
        return atoms
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
    """Copies of the functions, the weak references and the methods set on objects that refer to what is the model's.

    deepcopy takes them over as they are: a hook or a lambda of the copy would call the original's modules, and write
    into the original's dicts. The model's are its modules and the mutable values that they hold, which deepcopy copies.

    Attributes:
        copies: by the identity of one of these, a copy of it. Closures are empty until `fill`.
    """

    def __init__(self, modules: Iterable[nn.Module], held: Mapping[int, Any]) -> None:
        self._own = {id(m) for m in modules} | {i for i, value in held.items() if _is_mutable(value)}
        self._cells: dict[int, tuple[types.CellType, types.CellType]] = {}
        self._functions: list[types.FunctionType] = []
        self._references: dict[int, Any] = {}
        self.copies: dict[int, Any] = {}
        for value in held.values():
            if type(value) in _WEAK or isinstance(value, (types.FunctionType, types.MethodType)):
                self._search(value)

    def point(self, memo: dict[int, Any]) -> None:
        """Let copies of weak references and of methods refer to what is copied by now."""
        for reference in self._references.values():
            target = memo.get(id(_referent(reference)))
            if target is not None and id(reference) not in self.copies:
                self.copies[id(reference)] = memo[id(reference)] = self._pointing(reference, target)

    def _pointing(self, reference: Any, target: Any) -> Any:
        if isinstance(reference, types.MethodType):
            return types.MethodType(self.copies[id(reference.__func__)], target)
        new = weakref.ref if type(reference) is weakref.ReferenceType else weakref.proxy
        return new(target, functools.partial(_keep, target))

    def fill(self, memo: dict[int, Any]) -> None:
        """Put what the originals have into the closures and defaults of the copies; what is the model's is copied."""
        self.point(memo)

        def copied(value: Any) -> Any:
            return copy.deepcopy(value, memo) if self._refers(value) else value

        for cell, new in self._cells.values():
            for contents in _contents([cell]):
                new.cell_contents = copied(contents)
        for function in self._functions:
            twin = self.copies[id(function)]
            if function.__defaults__:
                twin.__defaults__ = tuple(copied(value) for value in function.__defaults__)
            if function.__kwdefaults__:
                twin.__kwdefaults__ = {name: copied(value) for name, value in function.__kwdefaults__.items()}

    def install(self, model: nn.Module) -> None:
        """Put the copies in the place of what deepcopy took over, as Python 3.14's does whatever its memo."""
        for module in model.modules():
            for holder in (vars(module), *vars(module).values()):
                if isinstance(holder, dict):
                    for key in [k for k, v in holder.items() if id(v) in self.copies]:
                        holder[key] = self.copies[id(holder[key])]

    def _search(self, value: Any) -> None:
        """Copy the functions, and note the weak references, among a value and what it holds that refer to the model."""
        for found in _reached([value], _references).values():
            function = found.__func__ if isinstance(found, types.MethodType) else found
            if not (type(found) in _WEAK or isinstance(function, types.FunctionType)) or not self._refers(function):
                continue
            if found is not function or type(found) in _WEAK:
                self._references[id(found)] = found
            if isinstance(function, types.FunctionType) and id(function) not in self.copies:
                self._copy(function)

    def _copy(self, function: types.FunctionType) -> None:
        cells = function.__closure__
        closure = cells and tuple(self._cells.setdefault(id(c), (c, types.CellType()))[1] for c in cells)
        new = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        new.__qualname__ = function.__qualname__
        new.__dict__.update(function.__dict__)
        self.copies[id(function)] = new
        self._functions.append(function)

    def _refers(self, value: Any) -> bool:
        """Whether the value is, or refers to, something of the model's."""
        return type(value) not in _ATOMIC and not self._own.isdisjoint(_reached([value], _references))


def _held(model: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """Return by identity what the modules hold and a copy will not share: containers, objects, tensors, functions.

    ``memo`` has what a copy has in the place of a value; that may be the value itself.
    """
    modules = list(model.modules())
    known = {id(m) for m in modules} | {i for i, value in memo.items() if id(value) == i}
    held = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    held += [value for m in modules for name, value in vars(m).items() if name not in _OWN_DICTS]
    return _reached(held, _parts, known)


def _reached(values: Iterable[Any], parts: Callable[[Any], Iterable[Any]], known: Iterable[int] = ()) -> dict[int, Any]:
    """Return by identity the values and their parts, those of the parts, and so on; none of the ``known``."""
    seen, reached = set(known), {}
    for _ in range(_DEPTH):
        level = {id(v): v for v in values if type(v) not in _ATOMIC and id(v) not in seen}
        if not level:
            break
        seen.update(level)
        reached.update(level)
        values = [part for v in level.values() for part in parts(v)]
    return reached


def modules_behind(function: Any, depth: int = _DEPTH) -> Iterator[nn.Module]:
    """Yield the modules that a function refers to: by its closure, as a method, or as a partial function."""
    if isinstance(function, nn.Module):
        yield function
    elif depth > 0:
        parts: list[Any] = []
        if isinstance(function, types.MethodType):
            parts = [function.__self__, function.__func__]
        elif isinstance(function, functools.partial):
            parts = [function.func, *function.args, *function.keywords.values()]
        elif isinstance(function, types.FunctionType):
            parts = list(_contents(function.__closure__ or ()))
        for part in parts:
            yield from modules_behind(part, depth - 1)


def _is_mutable(value: Any) -> bool:
    """Whether the value can change, so that a copy of it is another one; objects of a class made in Python can."""
    if isinstance(value, _MUTABLE):
        return True
    if type(value) in _WEAK or isinstance(value, _IMMUTABLE):
        return False
    return hasattr(value, "__dict__") or hasattr(type(value), "__slots__")


def _parts(value: Any) -> Iterable[Any]:
    """Return what a copy of the value holds copies of: of a container, a method, a partial function, an object."""
    if type(value) in _DICTS:
        return list(value.values()) if value else ()
    if type(value) in _WEAK or isinstance(value, (*_PLAIN, Tensor, types.FunctionType)):
        return ()
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, _SEQUENCES):
        return list(value)
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    slots = [name for name in copyreg._slotnames(type(value)) if hasattr(value, name)]  # type: ignore[attr-defined]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name) for name in slots)]


def _references(value: Any) -> Iterable[Any]:
    """Return what a value refers to; a function does by its closure and its defaults. Modules are not looked into."""
    if type(value) in _WEAK:
        return (_referent(value),)
    if isinstance(value, types.FunctionType):
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return (*_contents(value.__closure__ or ()), *defaults)
    return () if isinstance(value, nn.Module) else _parts(value)


def _referent(reference: Any) -> Any:
    """Return what a weak reference or proxy refers to, or None; of a method, what it is bound to."""
    if isinstance(reference, types.MethodType):
        return reference.__self__
    if type(reference) is weakref.ReferenceType:
        return reference()
    try:
        return reference.__repr__.__self__
    except ReferenceError:
        return None


def _keep(target: Any, reference: Any) -> None:
    """Do nothing, as the callback of a weak reference. It keeps the target: a graph has parts of a copy only."""


def _contents(cells: Iterable[types.CellType]) -> list[Any]:
    """Return what closures hold; a cell is empty while its variable is not assigned."""
    empty = types.CellType()
    return [cell.cell_contents for cell in cells if cell != empty]
