"""The text form of passes: ``decompose{ratio=2,skip=fc|layer1.*},snap``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from fxlrd.errors import FxlrdError, unknown
from fxlrd.passes import PASSES
from fxlrd.passes.contract import Pass


def _options(p: Pass) -> dict[str, Any]:
    return {f.name: getattr(p, f.name) for f in fields(p)}  # type: ignore[arg-type]


def _text(p: Pass) -> str:
    """Return a pass in text form, with the options that are not at their defaults."""
    name = next((n for n, cls in PASSES.items() if type(p) is cls), type(p).__name__)
    given = {
        f.name: getattr(p, f.name)
        for f in fields(p)  # type: ignore[arg-type]
        if f.repr and (f.default is MISSING or getattr(p, f.name) != f.default)
    }
    options = ",".join(f"{k}={_value_text(v)}" for k, v in given.items())
    return f"{name}{{{options}}}" if options else name


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        ranks = all(v is None or isinstance(v, int) for v in value)
        return "x".join("-" if v is None else str(v) for v in value) if ranks else "|".join(map(str, value))
    return str(value).removesuffix(".0")


def _split(text: str) -> Sequence[tuple[str, str]]:
    """Split ``a{x=1},b`` into names and the text of their options."""
    found: list[tuple[str, str]] = []
    position = 0
    pattern = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\{([^{}]*)\})?\s*(,|$)")
    while position < len(text) or not found:
        match = pattern.match(text, position)
        if match is None or (match[3] == "," and match.end() == len(text)):
            raise FxlrdError(
                f"cannot read the passes at {text[position:] or text!r}: write them as decompose{{ratio=2}},snap"
            )
        found.append((match[1], match[2] or ""))
        position = match.end()
    return found


def _build(name: str, text: str) -> Pass:
    cls = PASSES[name]
    known = {f.name: f for f in fields(cls) if f.repr}  # data, such as calibration inputs, has no text form
    options = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known:
            raise unknown(f"option of {name}", key, known)
        if not equals or not value:
            raise FxlrdError(f"{name}: option {key} has no value: write {key}=…")
        if key in options:
            raise FxlrdError(f"{name}: option {key} is given twice")
        options[key] = _value(name, key, value, known[key].default)
    result: Pass = cls(**options)
    return result


def _value(name: str, key: str, text: str, default: Any) -> Any:
    """Read an option's value in the type of its default; None stands for ranks."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, (int, float)):
            return type(default)(text)
        if isinstance(default, tuple):
            return tuple(part.strip() for part in text.split("|"))
        if default is None:
            parts = [None if part == "-" else int(part) for part in text.split("x")]
            if parts == [None]:
                raise ValueError
            return parts[0] if len(parts) == 1 else tuple(parts)
    except (ValueError, KeyError):
        raise FxlrdError(f"{name}: {key}={text} is not a value for this option (default: {default})") from None
    return text
