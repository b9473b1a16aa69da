"""A profile as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from fxlrd.escaping import printable
from fxlrd.layers.forms import ranks_text
from fxlrd.report.numbers import MODES, giga

_COLUMNS = {
    "layer": "left", "op": "left", "weight": "left", "params": "right", "FLOPs": "right", "time": "right",
    "share": "right", "of peak": "right", "rank": "left", "form's time": "right", "saves": "right", "worth it": "left",
}  # fmt: skip


def profile_text(profile: Mapping[str, Any], worth: float, bound: float) -> str:
    """Return a profile, given as plain data, as text.

    ``worth`` is the share of its time that a layer must save to be worth decomposing. Figures that cannot be true are
    marked with a question mark: a rate above ``bound`` times the peak, and the rest of the model's time if its layers
    take more than ``bound`` times that.
    """
    profile = printable(profile)
    total, settings, layers = profile["total"], profile["settings"], profile["layers"]
    layout = next((row["layout"] for row in layers if row["layout"]), "contiguous")
    mode = f"{MODES[settings['compile']]}, {settings['threads']} threads, torch {settings['torch']}"
    peak = "not measured, as there are no layers to set against it"
    if profile["peak"]:
        peak = f"{profile['peak'] / 1e9:.0f} GFLOP/s, the fastest of a few matrix multiplies here"
    cells = [_layer_cells(row, bound) for row in layers] + _total_cells(total, bound)
    align = tuple(_COLUMNS.values())
    lines = [
        f"{profile['model']} on {profile['device']}",
        f"{settings['inputs']}, {layout}, {mode}",
        f"peak: {peak}",
        "",
        tabulate(cells, headers=[*_COLUMNS], tablefmt="simple", disable_numparse=True, colalign=align),
        "",
        f"worth decomposing: {sum(row['worth'] for row in layers)} of {len(layers)} layers; at ratio "
        f"{settings['ratio']:g} their forms save {total['saves_ms'] / total['latency_ms']:.0%} of the model's time.",
        f"Judged by timing each layer and its form in place; worth it where the form takes {worth:.0%} less time.",
    ]
    return "\n".join([*lines, *(f"warning: {doubt}" for doubt in profile["warnings"])])


def _layer_cells(row: Mapping[str, Any], bound: float) -> list[str]:
    above = row["of_peak"] is not None and row["of_peak"] > bound
    return [
        row["name"] + (f" (×{row['calls']})" if row["calls"] > 1 else ""),
        row["op"],
        "×".join(map(str, row["shape"])),
        f"{row['params']:,}",
        "" if row["flops"] is None else giga(row["flops"]),
        _figure(row["latency_ms"], "{:.3g} ms"),
        _figure(row["share"], "{:.1%}"),
        _figure(row["of_peak"], "{:.0%}") + (" ?" if above else ""),
        "" if row["ranks"] is None else ranks_text(tuple(row["ranks"])),
        _figure(row["ratio"], "{:.2f}×"),
        f"{row['saves_ms']:.3g} ms" if row["saves_ms"] else "",
        "yes" if row["worth"] else f"no: {row['reason']}",
    ]


def _total_cells(total: Mapping[str, Any], bound: float) -> list[list[str]]:
    """Return the rows of all layers together, of the rest and of the model."""
    model, layers = total["latency_ms"], total["layers_ms"]
    rest = [f"{model - layers:.3g} ms", f"{(model - layers) / model:.1%}"] if layers <= bound * model else ["?", "?"]
    rows = [
        ["all layers", "", "", "", "", f"{layers:.3g} ms", f"{layers / model:.1%}"],
        ["the rest", "", "", "", "", *rest],
        ["the model", "", "", f"{total['params']:,}", giga(total["flops"]), f"{model:.3g} ms", "100.0%"],
    ]
    return [[*row, *[""] * 5] for row in rows]


def _figure(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)
