"""The text form of passes: ``decompose{ratio=2,skip=fc|layer1.*},snap``.

Values are numbers, words and true or false; ``a|b`` is a tuple of names and ``32x24`` a tuple of ranks, of which ``-``
is one that the form does not have. A value is read by the annotation of the pass's field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from fxlrd.errors import FxlrdError, unknown
from fxlrd.passes import PASSES
from fxlrd.passes.contract import Pass
from fxlrd.timing.inductor import Compile


def options(step: Pass) -> dict[str, Any]:
    """Return the options that a pass reads, with their values.

    Those are its fields, or those of them that it names in ``reads``.
    """
    values = {f.name: getattr(step, f.name) for f in fields(step)}  # type: ignore[arg-type]
    return {name: values[name] for name in getattr(step, "reads", values)}


def text(step: Pass) -> str:
    """Return a pass in text form, with the options that are not at their defaults."""
    name = next((n for n, cls in PASSES.items() if type(step) is cls), type(step).__name__)
    values = {f.name: getattr(step, f.name) for f in _text_fields(type(step)).values()}
    defaults = {f.name: f.default for f in _text_fields(type(step)).values()}
    changed = [f"{k}={_value_text(v)}" for k, v in values.items() if defaults[k] is MISSING or v != defaults[k]]
    return f"{name}{{{','.join(changed)}}}" if changed else name


def parse(text: str) -> list[Pass]:
    """Return the passes of a text form. Raises FxlrdError for an unknown pass or option, with close matches."""
    if not isinstance(text, str):
        raise FxlrdError(f"passes in text form are a string such as decompose{{ratio=2}},snap, not {text!r}")
    return [_build(name, options) for name, options in _split(text)]


def _split(text: str) -> Sequence[tuple[str, str]]:
    """Split ``a{x=1},b`` into names and the text of their options."""
    parts: list[tuple[str, str]] = []
    position = 0
    pattern = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\{([^{}]*)\})?\s*(,|$)")
    while position < len(text) or not parts:
        match = pattern.match(text, position)
        if match is None or (match[3] == "," and match.end() == len(text)):
            raise FxlrdError(
                f"cannot read the passes at {text[position:] or text!r}: write them as decompose{{ratio=2}},snap"
            )
        parts.append((match[1], match[2] or ""))
        position = match.end()
    return parts


def _build(name: str, text: str) -> Pass:
    """Return the pass of a name and the text of its options."""
    if name not in PASSES:
        raise unknown("pass", name, PASSES)
    cls = PASSES[name]
    readable, types = _text_fields(cls), get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in readable:
            raise unknown(f"option of {name}", key, readable)
        if not equals or not value:
            raise FxlrdError(f"{name}: option {key} has no value: write {key}=…")
        if key in values:
            raise FxlrdError(f"{name}: option {key} is given twice")
        try:
            values[key] = _READERS.get(types[key], _ranks)(value)
        except (ValueError, KeyError):
            default = readable[key].default
            raise FxlrdError(f"{name}: {key}={value} is not a value for this option (default: {default})") from None
    step: Pass = cls(**values)
    return step


def _text_fields(cls: type) -> dict[str, Field[Any]]:
    """Return the fields of a pass by name, without data, such as calibration inputs, which has no text form."""
    return {f.name: f for f in fields(cls) if f.repr}


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        ranks = all(v is None or isinstance(v, int) for v in value)
        return "x".join("-" if v is None else str(v) for v in value) if ranks else "|".join(map(str, value))
    return str(value).removesuffix(".0")


def _ranks(text: str) -> int | tuple[int | None, ...]:
    ranks = tuple(None if part == "-" else int(part) for part in text.split("x"))
    if ranks == (None,):
        raise ValueError
    return ranks if len(ranks) > 1 or ranks[0] is None else ranks[0]


_READERS: Mapping[Any, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    Compile: lambda text: {"true": True, "false": False, "int8": "int8"}[text.lower()],
    int: int,
    float: float,
    float | None: float,
    str: str,
    tuple[str, ...]: lambda text: tuple(part.strip() for part in text.split("|")),
}
"""How a value is read, by the annotation of its field; any other annotation is that of ranks."""
