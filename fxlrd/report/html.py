"""The report as one page: HTML with its style, script and data inside, and nothing fetched.

Tables are written here, so that they are complete without a script; the script sorts and filters them, and draws the
charts from the data that the page carries. The policy in the page's head allows this style and this script by their
hashes and forbids all else, the network included.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fxlrd.layers.forms import ranks_text
from fxlrd.report.sides import arranged, block_name
from fxlrd.report.table import change, error, giga, ms

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_JOINT = re.compile(r"([._:])(?=[^\s])")
_FOLDER = "report/page"
_TIMES = "×"


def page(
    report: Mapping[str, Any],
    diff: Mapping[str, Any] | None = None,
    variants: Sequence[Mapping[str, Any]] = (),
    lead: str = "",
) -> str:
    """Return the page of a report (`Report.to_dict`), with the graph's ``diff`` (`Diff.to_dict`) if there is one.

    ``variants`` are models to compare, the first of them the original: dicts of name, accuracy and recalibrated
    (0…1), params, flops, latency_ms, speed and speed_spread; the report is then that of one of them. ``lead`` says what
    the page is about, where the figures do not.
    """
    rows = report["layers"]
    steps = [_step(row) for row in report["passes"]]
    data = {"layers": [_chart_row(row) for row in rows], "variants": list(variants)}
    return _render(
        "report.html",
        data,
        report=report,
        lead=lead or _lead(report),
        facts=_facts(report),
        steps=steps,
        notes=[row for row in report["passes"] if row["note"]],
        layers=[_layer_row(number, row) for number, row in enumerate(rows, 1)],
        has_flops=any(row["flops_before"] for row in rows),
        has_times=any(row["latency_ms_before"] is not None for row in rows),
        has_curves=any(len(row["timings"]) > 1 for row in rows),
        has_errors=any(row["ranks"] and row["error"] is not None for row in rows),
        decisions=sorted(Counter(row["decision"] for row in rows).items()),
        variants=[_variant(row, variants[0]) for row in variants],
        graph=None if diff is None else arranged(diff),
    )


def diff_page(diff: Any, title: str = "") -> str:
    """Return a page of a graph diff alone: a `Diff`, or its `to_dict`."""
    data = diff if isinstance(diff, Mapping) else diff.to_dict()
    models = dict.fromkeys(data[side]["model"] for side in ("before", "after"))
    figures = [
        _moved(label, data["before"][key], data["after"][key], text)
        for key, label, text in (("params", "Parameters", count), ("flops", "FLOPs", giga), ("nodes", "Nodes", str))
        if data["before"][key] is not None and data["after"][key] is not None
    ]
    return _render("diff.html", {}, title=title or " and ".join(models), facts=figures, graph=arranged(data))


def _render(name: str, data: Any, **context: Any) -> str:
    from markupsafe import Markup

    environment = _environment()
    loader = environment.loader
    assert loader is not None
    style, script = (loader.get_source(environment, file)[0] for file in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(name).render(
        style=Markup(style), script=Markup(script), policy=policy, data=_finite(data), **context
    )


@lru_cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fxlrd", _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(text: str) -> Markup:
    """Return a dotted name that a narrow column may break between its parts."""
    from markupsafe import Markup, escape

    return Markup(_JOINT.sub(r"\1<wbr>", str(escape(text))))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _finite(value: Any) -> Any:
    """Return plain data with None for numbers that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


# -- the headline


def output_error(report: Mapping[str, Any]) -> float | None:
    """Return how far the outputs moved on the example inputs, relative; None where nothing was verified."""
    if (moved := report["settings"].get("output_error")) is not None:
        return float(moved)
    errors = [row["relative_error"] for row in report["passes"]]
    return errors[-1] if errors else None


def _speed(report: Mapping[str, Any]) -> tuple[float, float] | None:
    settings = report["settings"]
    return (settings["speedup"], settings["speedup_spread"]) if "speedup" in settings else None


def _lead(report: Mapping[str, Any]) -> str:
    """Return the outcome in one sentence."""
    parts = []
    if (speed := _speed(report)) is not None:
        times, spread = speed
        if times - spread > 1:
            parts.append(f"{times:.2f}× as fast as the original")
        elif times + spread < 1:
            parts.append(f"slower than the original: {times:.2f}× its speed")
        else:
            parts.append("as fast as the original, within the noise of the measurement")
    for key, word in (("params", "parameters"), ("flops", "FLOPs")):
        before, after = report["before"][key], report["after"][key]
        if before and after != before:
            share = 100 * (after - before) / before
            parts.append(f"{abs(share):.1f}\u202f% {'fewer' if share < 0 else 'more'} {word}")
    text = ", ".join(parts) or "nothing changed"
    return text[0].upper() + text[1:] + "."


def _facts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures before and after, with the share that is left."""
    before, after = report["before"], report["after"]
    facts = []
    if before["latency_ms"] is not None:
        speed = _speed(report)
        text = f"{speed[0]:.2f}× ±\u202f{speed[1]:.2f}" if speed is not None else ""
        facts.append(_moved("Latency", before["latency_ms"], after["latency_ms"], ms, text))
    if before.get("accuracy") is not None:
        points = f"{100 * (after['accuracy'] - before['accuracy']):+.1f} points"
        facts.append(_fact("Accuracy", percent(before["accuracy"]), percent(after["accuracy"]), points))
    for key, label, shown in (("params", "Parameters", count), ("flops", "FLOPs", giga)):
        facts.append(_moved(label, before[key], after[key], shown))
    if before["depth"] is not None:
        facts.append(_fact("Depth, layers", str(before["depth"]), str(after["depth"]), ""))
    if (moved := output_error(report)) is not None:
        facts.append(_fact("Output error", "", error(moved), "relative, on the example inputs"))
    return facts


def _fact(label: str, before: str, after: str, note: str) -> dict[str, Any]:
    return {"label": label, "before": before, "after": after, "note": note, "share": None}


def _moved(label: str, before: float, after: float, text: Callable[[Any], str], note: str = "") -> dict[str, Any]:
    """Return a fact with the share of it that is left, and that in words where there is no ``note``."""
    share = round(100 * after / before, 1) if before else None
    return {**_fact(label, text(before), text(after), note or change(before, after)), "share": share}


def count(value: float) -> str:
    """Return a number of parameters in M or k where there are many."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 10 * size or (value >= size and unit != "k"):
            return f"{value / size:.2f} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value:,}"


def percent(share: float) -> str:
    """Return an accuracy in percent."""
    return f"{100 * share:.1f} %"


# -- the tables


def _step(row: Mapping[str, Any]) -> dict[str, Any]:
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


def _layer_row(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layer's cells: what is shown, and where that differs what it sorts by."""
    off = row["error"] if row["ranks"] else None
    return {
        "number": number,
        "name": row["name"],
        "op": row["op"],
        "shape": _TIMES.join(map(str, row["shape"])),
        "decision": row["decision"],
        "ranks": ranks_text(tuple(row["ranks"])).replace("x", _TIMES) if row["ranks"] else "",
        "rank": next((r for r in row["ranks"] or () if r is not None), ""),
        "weights": math.prod(row["shape"]),
        "params": [_number(row["params_before"]), _number(row["params"])],
        "flops": [_scaled(row["flops_before"]), _scaled(row["flops"])],
        "times": [_time(row["latency_ms_before"]), _time(row["latency_ms"])],
        "error": {"text": error(off), "value": _plain(off)} if off is not None else {"text": "", "value": ""},
        "reason": row["reason"],
    }


def _plain(value: float) -> Any:
    return value if math.isfinite(value) else ""


def _number(value: int | None) -> dict[str, Any]:
    return {"text": "" if value is None else f"{value:,}", "value": "" if value is None else value}


def _scaled(value: int | None) -> dict[str, Any]:
    return {"text": "" if value is None else f"{value / 1e6:,.1f}", "value": "" if value is None else value}


def _time(value: float | None) -> dict[str, Any]:
    return {"text": "" if value is None else f"{value:.3f}", "value": "" if value is None else round(value, 6)}


def _variant(row: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    original = row is first
    speed, spread = row["speed"], row["speed_spread"]
    return {
        "name": row["name"],
        "accuracy": percent(row["accuracy"]),
        "recalibrated": percent(row["recalibrated"]),
        "points": "" if original else f"{100 * (row['recalibrated'] - first['recalibrated']):+.1f}",
        "params": f"{row['params']:,}",
        "flops": giga(row["flops"]),
        "latency": ms(row["latency_ms"]),
        "speed": "" if original else f"{speed:.2f}× ±\u202f{spread:.2f}",
    }


# -- the charts' data


def _chart_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the charts need of a layer."""
    chosen = ranks_text(tuple(row["ranks"])) if row["ranks"] else "original"
    return {
        "name": row["name"],
        "block": block_name(row["name"]),
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
    """Return the first rank in ranks_text's form: where the chart puts it."""
    return next((int(part) for part in ranks.split("x") if part.isdigit()), None)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
