"""What a page shows of a report: the headline's figures, the tables' cells and the charts' data.

Everything is plain data made from `Report.to_dict`; the templates place it, and the script draws the charts from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fxlrd.layers.forms import ranks_text
from fxlrd.report.numbers import change, count, error, giga, ms, percent, speed_text
from fxlrd.report.sides import part_of_model
from fxlrd.report.table import output_error, speed

_TIMES = "×"


def facts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the headline's figures before and after, each with the share that remains."""
    before, after = report["before"], report["after"]
    rows = []
    if before["latency_ms"] is not None:
        measured = speed(report)
        note = speed_text(*measured) if measured is not None else ""
        rows.append(moved("Latency", before["latency_ms"], after["latency_ms"], ms, note))
    if before.get("accuracy") is not None:
        points = f"{100 * (after['accuracy'] - before['accuracy']):+.1f} points"
        rows.append(_fact("Accuracy", percent(before["accuracy"]), percent(after["accuracy"]), points))
    for key, label, text in (("params", "Parameters", count), ("flops", "FLOPs", giga)):
        rows.append(moved(label, before[key], after[key], text))
    if before["depth"] is not None:
        rows.append(_fact("Depth, layers", str(before["depth"]), str(after["depth"]), ""))
    if (relative := output_error(report)) is not None:
        rows.append(_fact("Output error", "", error(relative), "relative, on the example inputs"))
    return rows


def _fact(label: str, before: str, after: str, note: str) -> dict[str, Any]:
    return {"label": label, "before": before, "after": after, "note": note, "share": None}


def moved(label: str, before: float, after: float, text: Callable[[Any], str], note: str = "") -> dict[str, Any]:
    """Return a figure before and after with the percentage that remains; the default note is the change in percent."""
    share = round(100 * after / before, 1) if before else None
    return {**_fact(label, text(before), text(after), note or change(before, after)), "share": share}


def step(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells of a pass."""
    return {
        "text": row["text"],
        "kind": "" if not row["sites"] else "exact" if row["exact"] else "approximate",
        "sites": len(row["sites"]),
        "skipped": len(row["skipped"]),
        "relative": error(row["relative_error"]),
        "step": error(row["step_error"]),
        "largest": error(row["max_abs_error"]),
        "params": count(row["params"]),
        "flops": giga(row["flops"]),
        "seconds": f"{row['seconds']:.1f} s",
    }


def layer_row(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells of a layer: the text of each and, where it sorts by something else, that value."""
    form_error = row["error"] if row["ranks"] else None
    return {
        "number": number,
        "name": row["name"],
        "op": row["op"],
        "shape": _TIMES.join(map(str, row["shape"])),
        "decision": row["decision"],
        "ranks": ranks_text(tuple(row["ranks"])).replace("x", _TIMES) if row["ranks"] else "",
        "rank": next((r for r in row["ranks"] or () if r is not None), ""),
        "weights": math.prod(row["shape"]),
        "params": [_integer(row["params_before"]), _integer(row["params"])],
        "flops": [_mega(row["flops_before"]), _mega(row["flops"])],
        "times": [_time(row["latency_ms_before"]), _time(row["latency_ms"])],
        "error": _error(form_error),
        "reason": row["reason"],
    }


def _error(value: float | None) -> dict[str, Any]:
    if value is None:
        return {"text": "", "value": ""}
    return {"text": error(value), "value": value if math.isfinite(value) else ""}


def _integer(value: int | None) -> dict[str, Any]:
    return {"text": "" if value is None else f"{value:,}", "value": "" if value is None else value}


def _mega(value: int | None) -> dict[str, Any]:
    return {"text": "" if value is None else f"{value / 1e6:,.1f}", "value": "" if value is None else value}


def _time(value: float | None) -> dict[str, Any]:
    return {"text": "" if value is None else f"{value:.3f}", "value": "" if value is None else round(value, 6)}


def variant(row: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells of one model of a comparison; the ``original`` has no figures relative to itself."""
    own = row is original
    return {
        "name": row["name"],
        "accuracy": percent(row["accuracy"]),
        "recalibrated": percent(row["recalibrated"]),
        "points": "" if own else f"{100 * (row['recalibrated'] - original['recalibrated']):+.1f}",
        "params": f"{row['params']:,}",
        "flops": giga(row["flops"]),
        "latency": ms(row["latency_ms"]),
        "speed": "" if own else speed_text(row["speed"], row["speed_spread"]),
    }


def chart_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the charts need of a layer."""
    chosen = ranks_text(tuple(row["ranks"])) if row["ranks"] else "original"
    return {
        "name": row["name"],
        "part": part_of_model(row["name"]),
        "op": row["op"],
        "decision": row["decision"],
        "ranks": chosen if row["ranks"] else "",
        "params": [row["params_before"], row["params"]],
        "flops": [row["flops_before"], row["flops"]],
        "latency": [row["latency_ms_before"], row["latency_ms"]],
        "error": row["error"] if row["ranks"] else None,
        "chosen": chosen if row["decision"] in ("svd", "tucker2", "original", "skipped") else "",
        "timings": [
            [ranks, _first_rank(ranks), _digits(t["ms"]), _digits(t["ratio"]), _digits(t["spread"])]
            for ranks, t in row["timings"].items()
        ],
    }


def _first_rank(ranks: str) -> int | None:
    """Return the first rank of a text such as 32x24 or -x24: its position in the chart."""
    return next((int(part) for part in ranks.split("x") if part.isdigit()), None)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
