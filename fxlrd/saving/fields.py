"""JSON into typed data: a field's annotation is its check.

    parse(tuple[str, ...], ["norm", 7], "architecture.gone")
    FxlrdError: architecture.gone[1]: expected a string, found 7

Annotations may be str, int, float, bool, None, Any, Literal, tuple, Mapping[str, …], unions of these, `Record` classes,
and ``Annotated[…, Check(…)]`` for what a type does not say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fxlrd.errors import FxlrdError

R = TypeVar("R", bound="Record")
_TEXTS = {Any: "anything", str: "a string", int: "an integer", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Check:
    """A condition on a value that has its type already; ``expected`` is what an error says was expected."""

    expected: str
    holds: Callable[[Any], Any]


class Record:
    """A frozen dataclass that is an object in JSON, its fields the keys."""

    @classmethod
    def from_json(cls: type[R], value: Any, path: str = "") -> R:
        """Return the record that a JSON value is. Raises FxlrdError, which names the JSON path, for another value."""
        return cls(**parse_fields(field_types(cls), value, path))

    def to_json(self) -> Any:
        """Return the record as plain data for JSON."""
        return {field.name: to_json(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


def _field_types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


field_types: Callable[[type], dict[str, Any]] = lru_cache(_field_types)
"""Return the types of a dataclass's fields, by name."""


def to_json(value: Any) -> Any:
    """Return a field's value as plain data for JSON."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, (tuple, list)) else value


def parse_fields(types: Mapping[str, Any], value: Any, path: str) -> dict[str, Any]:
    """Return the values of a JSON object that has exactly these keys, each of its type."""
    if type(value) is not dict:
        raise invalid(path, f"an object of {', '.join(types)}", value)
    prefix = f"{path}." if path else ""
    for name, kind in types.items():
        if name not in value:
            raise FxlrdError(f"{prefix}{name}: expected {expected(kind)}, found nothing")
    for name in value:
        if name not in types:
            raise invalid(at(path, name), "nothing", value[name])
    return {name: parse(kind, value[name], f"{prefix}{name}") for name, kind in types.items()}


def parse(kind: Any, value: Any, path: str) -> Any:
    """Return a JSON value as the type ``kind``, lists as tuples. Raises FxlrdError for a value of another type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if hasattr(kind, "from_json"):
        return kind.from_json(value, path)
    if not _accepts(kind, value):
        raise invalid(path, expected(kind), value)
    if origin is Annotated:
        base, check = arguments
        parsed = parse(base, value, path)
        if not check.holds(parsed):
            raise invalid(path, check.expected, value)
        return parsed
    if origin in (Union, UnionType):
        return parse(next(member for member in arguments if _accepts(member, value)), value, path)
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return tuple(parse(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is get_origin(Mapping[str, Any]):
        return {name: parse(arguments[1], item, at(path, name)) for name, item in value.items()}
    return value


def _accepts(kind: Any, value: Any) -> bool:
    """Whether a value's JSON type is that of ``kind``; what is inside it may still be of another."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _accepts(arguments[0], value)
    if origin in (Union, UnionType):
        return any(_accepts(member, value) for member in arguments)
    if origin is Literal:
        return type(value) is str and value in arguments
    if origin is tuple:
        return type(value) is list and (arguments[-1] is ... or len(value) == len(arguments))
    if isinstance(origin, type):
        return issubclass(origin, Mapping) and type(value) is dict
    if isinstance(kind, type) and issubclass(kind, Record):
        return type(value) is dict and value.keys() == field_types(kind).keys()
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


def expected(kind: Any) -> str:
    """Return what an error says was expected of a value of this type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return str(arguments[1].expected)
    if origin in (Union, UnionType):
        return " or ".join(expected(member) for member in arguments)
    if origin is Literal:
        return " or ".join(map(json.dumps, arguments))
    if origin is tuple:
        return "a list" if arguments[-1] is ... else f"a list of {len(arguments)}"
    if isinstance(kind, type) and issubclass(kind, Record):
        return f"an object of {', '.join(field_types(kind))}"
    return "null" if kind is NoneType else _TEXTS.get(kind, "an object")


def at(path: str, key: str) -> str:
    """Return the path of an object's value under a key that the user's model or the file's writer chose."""
    return f"{path}[{key[:80]!r}]"


def invalid(path: str, wanted: str, value: Any) -> FxlrdError:
    """Return the error for a value of another type than the one that was ``wanted`` at a JSON path."""
    return FxlrdError(f"{path or 'the plan'}: expected {wanted}, found {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object of {', '.join(repr(key[:20]) for key in list(value)[:5])}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return json.dumps(value[:60]) if isinstance(value, str) else json.dumps(value)[:60]
