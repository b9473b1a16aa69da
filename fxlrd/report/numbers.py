"""Numbers as text, the same in tables, pages and diffs, and as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MODES = {False: "eager", True: "Inductor", "int8": "Inductor in int8"}
"""How a model is timed, by ``compile``."""


def change(before: float, after: float) -> str:
    """Return the relative change in percent; an empty string if ``before`` is 0."""
    return f"{100 * (after - before) / before:+.1f} %" if before else ""


def count(value: float) -> str:
    """Return a number of parameters, in k, M or G from 10 thousand on."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 10 * size or (value >= size and unit != "k"):
            return f"{value / size:.2f} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value:,}"


def error(value: float | None) -> str:
    """Return an error with three digits; a dash if there is none."""
    return "-" if value is None else f"{value:.3g}"


def giga(flops: float) -> str:
    """Return FLOPs in G, or in M below 0.1 G."""
    return f"{flops / 1e9:.2f} G" if flops >= 1e8 else f"{flops / 1e6:.2f} M"


def ms(value: float) -> str:
    """Return milliseconds."""
    return f"{value:.2f} ms"


def percent(share: float) -> str:
    """Return a share (0…1) in percent."""
    return f"{100 * share:.1f} %"


def speed_text(times: float, spread: float) -> str:
    """Return a speed relative to the original's, with the half-width of its 95 % interval."""
    return f"{times:.2f}× ± {spread:.2f}"


def finite(value: Any) -> Any:
    """Return plain data in which NaN and infinity, which JSON cannot express, are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
