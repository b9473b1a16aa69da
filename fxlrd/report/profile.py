"""Where a model's time goes, and which of its layers are worth decomposing: profile(model, example_inputs).

Each conv and linear layer is timed in place, as `snap` does: on an input of the shape, dtype and layout that it gets in
the model, with the timing cache. Beside it stands its low-rank form at one ratio, with arbitrary weights: at the ranks
of the ratio and at the hardware multiples below them, the fastest counts. What a layer could save is

    saves = its time · (1 − time of the form / time of the layer)

or nothing where the form is not faster by more than the noise. A layer is *worth* decomposing where that is at least a
tenth of its own time, and a thousandth of the model's: small layers count, since a deep model has many. The measured
rate of each layer is set against that of a large matrix multiply in the same dtype on as many threads, the fastest of a
few sizes: a layer far below is bound by memory, by overhead or by its shape, and fewer FLOPs may not make it faster.

What is left of the model's time is all the rest: norms, activations, pooling, and overhead. Layers are timed alone, so
that the sum may be off by some percent: in the model inputs may be in the cache, and Inductor fuses over layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate
from torch import fx, nn

from fxlrd.capturing.model import capture_any
from fxlrd.errors import Reason
from fxlrd.graph import cost, facts
from fxlrd.graph.captured import captured_or_bare, runnable
from fxlrd.graph.facts import times
from fxlrd.graph.guards import check_names, is_stem, matches, skip_reason, stem_reason, why_not_replaceable
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.forms import Ranks, ranks_by_ratio, ranks_text
from fxlrd.layers.kinds import as_layer, channels_per_group, op
from fxlrd.progress import Progress, quiet
from fxlrd.ranks import check_ratio
from fxlrd.report.numbers import giga
from fxlrd.timing.cache import Setting, Stopwatch
from fxlrd.timing.clock import Timer, Timing, compare
from fxlrd.timing.layers import ORIGINAL, placed, time_ranks
from fxlrd.timing.models import device_of, time_models
from fxlrd.timing.peak import peak_rate
from fxlrd.timing.search import grid

WORTH, FELT = 0.1, 0.001
"""A layer is worth decomposing where that saves these shares of its own and of the model's time."""
_COLUMNS = (
    "name", "op", "shape", "input", "layout", "calls", "params", "flops", "latency_ms", "share", "rate", "of_peak",
    "ranks", "ratio", "saves_ms", "worth", "reason",
)  # fmt: skip
_SIZES = (512, 1024, 2048)
_FLOOR = 0.75


@dataclass(frozen=True)
class Profile:
    """Where a model's time goes.

    ``total`` has params, flops, latency_ms (of the model, whole), layers_ms (the sum of its layers) and saves_ms;
    ``peak`` is the rate of a matrix multiply in FLOP/s. ``layers``, sorted by time, has a dict for each, with name,
    op, shape (of the weight), input (its shape), layout, calls, params, flops, latency_ms, share (of the model's
    time), rate (FLOP/s), of_peak, ranks and ratio (of times) of the form, saves_ms, worth and reason. What is not
    known is None.
    """

    model: str
    device: str
    settings: dict[str, Any]
    total: dict[str, Any]
    peak: float
    layers: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as plain data, fit for JSON."""
        names = ("model", "device", "settings", "total", "peak", "layers")
        return {name: getattr(self, name) for name in names}

    def to_table(self) -> str:
        """Return the profile as text."""
        return _table(self)


def profile(
    model: nn.Module,
    example_inputs: Any,
    *,
    ratio: float = 2.0,
    skip: Sequence[str] = (),
    compile: bool = False,
    seconds: float = 1.0,
    cache: bool = True,
    progress: Progress = quiet,
    timer: Timer = compare,
) -> Profile:
    """Time a model's layers in place, and their low-rank forms at ``ratio``.

    The arguments are as in `compress`; ``seconds`` bounds the timing of one layer signature, and without ``cache`` the
    timings on disk are neither read nor written. The model is not changed. Raises FxlrdError as `compress` does.
    """
    check_ratio(ratio)
    inputs = Inputs.of(example_inputs)
    gm = capture_any(model, inputs)
    check_names(gm, skip)
    device = device_of(model, inputs)
    stopwatch = Stopwatch(compile, seconds, cache, timer)
    whole = _time_model(model, gm, inputs, compile, timer)
    reasons = why_not_replaceable(gm)
    rows = []
    for name, module in progress(list(layers(gm).items()), "profile"):
        ranks = _ranks(gm, name, module, ratio, skip, reasons[name])
        rows.append(_row(gm, name, module, ranks, stopwatch))
    dtypes = {str(as_layer(m).weight.dtype): as_layer(m).weight.dtype for m in layers(gm).values()}
    peak = max((peak_rate(d, device, stopwatch) for d in dtypes.values()), default=0.0)
    total_ms = whole.seconds * 1e3
    for row in rows:
        _judge(row, total_ms, peak)
    rows.sort(key=lambda row: -(row["latency_ms"] or 0.0))
    capture = captured_or_bare(gm)
    for name, unreached in capture.unreached.items():
        rows.append(
            dict.fromkeys(_COLUMNS)
            | {"name": name, "op": unreached.op, "shape": list(unreached.shape), "calls": 0}
            | {"params": unreached.params, "saves_ms": 0.0, "worth": False, "reason": str(unreached.reason)}
        )
    total = {
        "params": cost.params(model),
        "flops": cost.flops(gm) + capture.outside.flops,
        "latency_ms": total_ms,
        "layers_ms": sum(row["latency_ms"] or 0.0 for row in rows),
        "saves_ms": sum(row["saves_ms"] for row in rows if row["worth"]),
    }
    setting = Setting.current(device, compile)
    settings = {
        "inputs": inputs.describe(),
        "ratio": ratio,
        "compile": compile,
        "threads": setting.threads,
        "torch": setting.torch_version,
    }
    return Profile(type(model).__name__, setting.device, settings, total, peak, rows)


def _time_model(model: nn.Module, gm: fx.GraphModule, inputs: Inputs, under_inductor: bool, timer: Timer) -> Timing:
    run = runnable(gm) if under_inductor else model
    return time_models({"model": run}, inputs, under_inductor=under_inductor, seconds=2.0, timer=timer)["model"]


def _ranks(
    gm: fx.GraphModule, name: str, module: nn.Module, ratio: float, skip: Sequence[str], guard: Reason | None
) -> list[Ranks] | Reason:
    """Return the ranks to time a layer's form at, or why it has none."""
    if guard is not None:
        return guard
    if (pattern := matches(name, skip)) is not None:
        return skip_reason(pattern)
    if is_stem(gm, name, module):
        return stem_reason(module)
    ranks = ranks_by_ratio(module, ratio)
    if isinstance(ranks, Reason):
        return ranks
    lowest: Ranks = tuple(None if r is None else math.ceil(_FLOOR * r) for r in ranks)
    return grid(ranks, lowest, channels_per_group(module)[2])


def _row(
    gm: fx.GraphModule,
    name: str,
    module: nn.Module,
    ranks: list[Ranks] | Reason,
    stopwatch: Stopwatch,
) -> dict[str, Any]:
    """Time a layer at each of its calls, and its forms."""
    found: list[tuple[int, dict[str, Timing]]] = []
    reason = ranks if isinstance(ranks, Reason) else None
    candidates = [] if isinstance(ranks, Reason) else ranks
    shape = layout = None
    nodes = calls(gm, name)
    for node in nodes:
        where = placed(node, module)
        if isinstance(where, Reason):
            reason = where
            continue
        shape, layout = shape or list(where.shape), layout or where.layout
        found.append((times(node), time_ranks(where, candidates, stopwatch)))
    latency = sum(count * t[ORIGINAL].seconds for count, t in found) * 1e3 if found else None
    row: dict[str, Any] = dict.fromkeys(_COLUMNS) | {
        "name": name,
        "op": op(module),
        "shape": list(as_layer(module).weight.shape),
        "input": shape,
        "layout": layout,
        "calls": sum(times(node) for node in nodes),
        "params": cost.params(module),
        "flops": sum(facts.flops(node) for node in nodes),
        "latency_ms": latency,
        "saves_ms": 0.0,
        "worth": False,
        "reason": None if reason is None else str(reason),
    }
    if found and candidates and latency:
        best = min(candidates, key=lambda r: sum(n * t[ORIGINAL].seconds * t[ranks_text(r)].ratio for n, t in found))
        spent = sum(n * t[ORIGINAL].seconds * t[ranks_text(best)].ratio for n, t in found) * 1e3
        row["ranks"], row["ratio"] = list(best), spent / latency
        if all(t[ranks_text(best)].faster() for _, t in found):
            row["saves_ms"] = latency - spent
    return row


def _judge(row: dict[str, Any], total_ms: float, peak: float) -> None:
    """Say what share of the time a layer has, how fast it runs, and whether it is worth decomposing."""
    if not row["latency_ms"]:
        return
    row["share"] = row["latency_ms"] / total_ms
    row["rate"] = row["flops"] / (row["latency_ms"] / 1e3)
    row["of_peak"] = row["rate"] / peak if peak else None
    if row["ratio"] is None:
        return
    if not row["saves_ms"]:
        row["reason"] = "its form is not faster" + ("" if row["ratio"] >= 1 else " by more than the noise")
    elif row["saves_ms"] < WORTH * row["latency_ms"]:
        row["reason"] = f"saves less than {WORTH:.0%} of its time"
    elif row["saves_ms"] < FELT * total_ms:
        row["reason"] = f"saves less than {FELT:.1%} of the model's time"
    else:
        row["worth"] = True


def _table(found: Profile) -> str:
    total, settings = found.total, found.settings
    cells = [
        [
            row["name"] + (f" (×{row['calls']})" if row["calls"] > 1 else ""),
            row["op"],
            "×".join(map(str, row["shape"])),
            f"{row['params']:,}",
            "" if row["flops"] is None else giga(row["flops"]),
            _figure(row["latency_ms"], "{:.3g} ms"),
            _figure(row["share"], "{:.1%}"),
            _figure(row["of_peak"], "{:.0%}"),
            "" if row["ranks"] is None else ranks_text(tuple(row["ranks"])),
            _figure(row["ratio"], "{:.2f}×"),
            f"{row['saves_ms']:.3g} ms" if row["saves_ms"] else "",
            "yes" if row["worth"] else f"no: {row['reason']}",
        ]
        for row in found.layers
    ]
    rest = total["latency_ms"] - total["layers_ms"]
    whole = [
        ["all layers", "", "", "", "", total["layers_ms"]],
        ["the rest", "", "", "", "", rest],
        ["the model", "", "", f"{total['params']:,}", giga(total["flops"]), total["latency_ms"]],
    ]
    for row in whole:
        cells.append([*row[:5], f"{row[5]:.3g} ms", f"{row[5] / total['latency_ms']:.1%}", *[""] * 5])
    headers = ["layer", "op", "weight", "params", "FLOPs", "time", "share", "of peak"]
    headers += ["rank", "form's time", "saves", "worth it"]
    left, right = "left", "right"
    align = (left, left, left, right, right, right, right, right, left, right, right, left)
    text = tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True, colalign=align)
    layout = next((row["layout"] for row in found.layers if row["layout"]), "contiguous")
    mode = f"{'Inductor' if settings['compile'] else 'eager'}, {settings['threads']} threads, torch {settings['torch']}"
    worth = sum(row["worth"] for row in found.layers)
    peak = f"{found.peak / 1e9:.0f} GFLOP/s, the fastest of a few matrix multiplies here"
    if not found.peak:
        peak = "not measured, as there are no layers to set against it"
    return "\n".join(
        [
            f"{found.model} on {found.device}",
            f"{settings['inputs']}, {layout}, {mode}",
            f"peak: {peak}",
            "",
            text,
            "",
            f"worth decomposing: {worth} of {len(found.layers)} layers; at ratio {settings['ratio']:g} their forms "
            f"save {total['saves_ms'] / total['latency_ms']:.0%} of the model's time.",
            f"Judged by timing each layer and its form in place; worth it where the form takes {WORTH:.0%} less time.",
        ]
    )


def _figure(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)
