"""The report as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from fxlrd.layers.forms import ranks_text

if TYPE_CHECKING:
    from fxlrd.pipeline import Record

_STYLE = "simple"


def whole(report: Mapping[str, Any]) -> str:
    """Return headline, passes and layers, one table under the other, and the warnings."""
    parts = [headline(report), passes(report["passes"]), layers(report["layers"])]
    parts += [f"warning: {text}" for text in report["warnings"]]
    return "\n\n".join(parts)


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
        speed = f"{report['settings']['speedup']:.2f}× ± {report['settings']['speedup_spread']:.2f}"
        rows.append(["latency", ms(before["latency_ms"]), ms(after["latency_ms"]), speed])
    if (moved := report["settings"].get("output_error")) is not None:
        rows.append(["output error", "", error(moved), "of the whole model, relative"])
    title = f"{report['model']} on {report['device']}\n{report['settings']['inputs']}, {report['settings']['mode']}"
    return (
        title
        + "\n\n"
        + tabulate(rows, headers=["", "before", "after", "change"], tablefmt=_STYLE, disable_numparse=True)
    )


def passes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the ledger."""
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


def layers(rows: Sequence[Mapping[str, Any]]) -> str:
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
            row["reason"],
        ]
        for row in rows
    ]
    headers = ["layer", "op", "weight", "decision", "ranks", "params", "now", "error", "reason"]
    right = ("left",) * 5 + ("right",) * 3 + ("left",)
    return tabulate(cells, headers=headers, tablefmt=_STYLE, disable_numparse=True, colalign=right)


def ranks(ledger: Sequence[Record], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return each layer's rank by ratio and as snapped, and the times relative to the original layer's."""
    by_ratio = {s.name: s.note.rpartition(" ")[2] for r in ledger if r.name == "decompose" for s in r.sites}
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
    return tabulate(cells, headers=headers, tablefmt=_STYLE, disable_numparse=True)


def change(before: float, after: float) -> str:
    """Return the relative change in percent."""
    return f"{100 * (after - before) / before:+.1f} %" if before else ""


def giga(flops: float) -> str:
    """Return FLOPs in G, or M where they are few."""
    return f"{flops / 1e9:.2f} G" if flops >= 1e8 else f"{flops / 1e6:.2f} M"


def ms(value: float) -> str:
    """Return milliseconds."""
    return f"{value:.2f} ms"


def error(value: float | None) -> str:
    """Return an error in three digits; a dash where none was measured."""
    return "-" if value is None else f"{value:.3g}"
