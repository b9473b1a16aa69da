"""The report as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from fxlrd.escaping import printable, visible
from fxlrd.layers.forms import ranks_text
from fxlrd.report.numbers import change, error, giga, ms, speed_text

if TYPE_CHECKING:
    from fxlrd.pipeline import Record

_STYLE = "simple"


def report_text(report: Mapping[str, Any]) -> str:
    """Return headline, passes and layers, one table under the other, and the warnings."""
    report = printable(report)
    parts = [headline(report), passes_table(report["passes"]), layers_table(report["layers"])]
    parts += [f"warning: {text}" for text in report["warnings"]]
    return "\n\n".join(parts)


def summary(report: Mapping[str, Any]) -> str:
    """Return the model's name, the `outcome` and the error of the outputs, on one line."""
    relative = output_error(report)
    return f"{visible(report['model'])}: {outcome(report)}" + (f", output error {error(relative)}" if relative else "")


def outcome(report: Mapping[str, Any]) -> str:
    """Return the result of the compression in a few words: speed, parameters, FLOPs."""
    parts = []
    if (measured := speed(report)) is not None:
        times, spread = measured
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
            parts.append(f"{abs(share):.1f} % {'fewer' if share < 0 else 'more'} {word}")
    return ", ".join(parts) or "nothing changed"


def speed(report: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return how many times as fast as the original the model is, and the spread of that; None if not measured."""
    settings = report["settings"]
    return (settings["speedup"], settings["speedup_spread"]) if "speedup" in settings else None


def output_error(report: Mapping[str, Any]) -> float | None:
    """Return the relative error of the outputs on the example inputs; None if it is not known or not verified."""
    if "output_error" in report["settings"]:
        measured: float | None = report["settings"]["output_error"]
        return measured
    errors = [row["relative_error"] for row in report["passes"]]
    return errors[-1] if errors else None


def headline(report: Mapping[str, Any]) -> str:
    """Return the figures before and after."""
    before, after = report["before"], report["after"]
    rows = [
        [
            "parameters",
            f"{before['params']:,}",
            f"{after['params']:,}",
            change(before["params"], after["params"]),
        ],
        ["FLOPs", giga(before["flops"]), giga(after["flops"]), change(before["flops"], after["flops"])],
    ]
    if before["depth"] is not None:
        rows.append(["depth (layers)", before["depth"], after["depth"], ""])
    if before["latency_ms"] is not None:
        measured = speed(report)
        note = speed_text(*measured) if measured is not None else ""
        rows.append(["latency", ms(before["latency_ms"]), ms(after["latency_ms"]), note])
    if "output_error" in report["settings"]:
        relative = report["settings"]["output_error"]
        note = "of the whole model, relative" if relative is not None else "not known: outputs of other shapes, or none"
        rows.append(["output error", "", error(relative), note])
    title = f"{report['model']} on {report['device']}\n{report['settings']['inputs']}, {report['settings']['mode']}"
    return (
        title
        + "\n\n"
        + tabulate(rows, headers=["", "before", "after", "change"], tablefmt=_STYLE, disable_numparse=True)
    )


def passes_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the passes, one a line, and their notes."""
    cells = [
        [
            row["text"],
            "-" if not row["sites"] else "exact" if row["exact"] else "approximate",
            len(row["sites"]),
            len(row["skipped"]),
            error(row["relative_error"]),
            error(row["max_abs_error"]),
            f"{row['seconds']:.1f} s",
        ]
        for row in rows
    ]
    headers = ["pass", "kind", "sites", "left alone", "relative error", "largest error", "time"]
    text = tabulate(cells, headers=headers, tablefmt=_STYLE, disable_numparse=True)
    notes = [f"{row['name']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join([text, "", *notes]) if notes else text


def layers_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the layers, one a line."""
    cells = [
        [
            row["name"],
            row["op"],
            "×".join(map(str, row["shape"])),
            row["decision"],
            ranks_text(tuple(row["ranks"])) if row["ranks"] else "",
            f"{row['params_before']:,}",
            f"{row['params']:,}",
            error(row["error"]) if row["ranks"] else "",
            error(row["channel_error"]) if row["ranks"] else "",
            row["reason"],
        ]
        for row in rows
    ]
    headers = ["layer", "op", "weight", "decision", "ranks", "params", "now", "error", "worst channel", "reason"]
    align = ("left",) * 5 + ("right",) * 4 + ("left",)
    return tabulate(cells, headers=headers, tablefmt=_STYLE, disable_numparse=True, colalign=align)


def ranks_table(ledger: Sequence[Record], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return each layer's rank by ratio and as snapped, and the times relative to the original layer's."""
    by_ratio = {s.name: ranks_text(s.ranks) for r in ledger if r.name == "decompose" for s in r.sites if s.ranks}
    snapped = {s.name: s for r in ledger if r.name == "snap" for s in r.sites}
    cells = []
    for row in rows:
        if (first := by_ratio.get(row["name"])) is None:
            continue
        site = snapped.get(row["name"])
        now = ranks_text(tuple(row["ranks"])) if row["ranks"] else "ORG"
        times = {key: f"{t.ratio:.2f} ± {t.spread:.2f}" for key, t in site.timings.items()} if site else {}
        milliseconds = f"{row['latency_ms']:.2f}" if row["latency_ms"] is not None else ""
        cells.append(
            [
                row["name"],
                "×".join(map(str, row["shape"])),
                first,
                now,
                times.get(first, ""),
                times.get(now, ""),
                milliseconds,
            ]
        )
    headers = ["layer", "weight", "rank by ratio", "snapped", "time at first", "time now", "ms now"]
    return tabulate(printable(cells), headers=headers, tablefmt=_STYLE, disable_numparse=True)
