"""The points of a frontier as text, and as the cells of its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from fxlrd.escaping import printable, visible
from fxlrd.report.numbers import error, giga, ms, speed_text


def summary(frontier: Mapping[str, Any]) -> str:
    """Return the model's name and the budgets that are met, on one line."""
    budgets = ", ".join(point["budget"] for point in frontier["points"])
    return f"{visible(frontier['model'])}: {budgets}"


def text(frontier: Mapping[str, Any]) -> str:
    """Return the setting, the table, and what budgets are out of reach."""
    frontier = printable(frontier)
    settings = frontier["settings"]
    title = f"{frontier['model']} on {frontier['device']}\n{settings['inputs']}, {settings['mode']}"
    notes = [f"error: relative, of the outputs on {frontier['error_on']}"]
    notes += [f"{budget}: {reason}" for budget, reason in frontier["missed"].items()]
    return "\n\n".join([title, table(frontier), "\n".join(notes)])


def table(frontier: Mapping[str, Any], style: str = "simple") -> str:
    """Return the figures of the points, one a line, those of the original first."""
    headings, rows = cells(frontier)
    align = ("left", *["right"] * (len(headings) - 1))
    return tabulate(rows, headers=headings, tablefmt=style, disable_numparse=True, colalign=align)


def cells(frontier: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and, for the original and each point, the cells under them; what no point has is left out."""
    rows = [_original(frontier), *frontier["points"]]
    columns = {
        "budget": [row["budget"] for row in rows],
        "latency": [_known(ms, row["latency_ms"]) for row in rows],
        "speed": [_speed(row) for row in rows],
        "error": [_known(error, row["error"]) for row in rows],
        "accuracy": [_known(lambda value: f"{value:.4g}", row["accuracy"]) for row in rows],
        "loss": [_loss(row, frontier["original"]) for row in rows],
        "parameters": [f"{row['params']:,}" for row in rows],
        "FLOPs": [giga(row["flops"]) for row in rows],
    }
    shown = {heading: column for heading, column in columns.items() if any(column)}
    return list(shown), [list(row) for row in zip(*shown.values(), strict=True)]


def chart_points(frontier: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the charts need, the original first."""
    names = ("latency_ms", "params", "flops", "accuracy", "error")
    first = {"name": "original", "speed": 1.0, "speed_spread": 0.0, **_original(frontier), "error": 0.0}
    return [first] + [
        {"name": point["budget"], "speed": point["speedup"], "speed_spread": point["speedup_spread"]}
        | {name: point[name] for name in names}
        for point in frontier["points"]
    ]


def axes(frontier: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the charts can show the points against: its key in `chart_points`, and its name."""
    timed = [("speed", "speed"), ("latency_ms", "latency")] if frontier["original"]["latency_ms"] is not None else []
    return [*timed, ("params", "parameters"), ("flops", "FLOPs")]


def _original(frontier: Mapping[str, Any]) -> dict[str, Any]:
    return {"budget": "original", "speedup": None, "error": None, **frontier["original"]}


def _known(format_: Any, value: float | None) -> str:
    return "" if value is None else str(format_(value))


def _speed(row: Mapping[str, Any]) -> str:
    return "" if row["speedup"] is None else speed_text(row["speedup"], row["speedup_spread"])


def _loss(row: Mapping[str, Any], original: Mapping[str, Any]) -> str:
    if row["accuracy"] is None or row["budget"] == "original":
        return ""
    return f"{original['accuracy'] - row['accuracy']:.2g}"
