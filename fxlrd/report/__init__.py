"""What a compression did: figures before and after, layer by layer, pass by pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxlrd import cost
from fxlrd.files import write_out
from fxlrd.graph import FACTORS, NEVER_CALLED, Provenance, calls, captured, layers, provenance
from fxlrd.latency import Timing
from fxlrd.layer_latency import ORIGINAL
from fxlrd.layers import form, layer, op, ranks_text
from fxlrd.pipeline import Record
from fxlrd.report import table


@dataclass(frozen=True)
class Report:
    """The figures of one compression.

    ``before`` and ``after`` have params, flops (for the example inputs, 2 × multiply-adds), depth and
    latency_ms (None if not measured). ``layers`` has a dict for every conv and linear layer of the original,
    ``passes`` one for each pass, as `to_dict` gives them. ``diff`` is the graph before against that after, as plain
    data (`fxlrd.diff`).
    """

    model: str
    device: str
    settings: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    layers: list[dict[str, Any]]
    passes: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    ledger: tuple[Record, ...] = field(default=(), repr=False)
    diff: dict[str, Any] | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, fit for JSON."""
        names = ("model", "device", "settings", "before", "after", "layers", "passes", "warnings")
        return {name: getattr(self, name) for name in names}

    def to_table(self) -> str:
        """Return the report as text: the headline, the passes, the layers."""
        return table.whole(self.to_dict())

    def to_html(self, path: str | Path) -> None:
        """Write the report as one page that needs nothing else: no server, no network."""
        from fxlrd.report.html import page

        write_out(Path(path), page(self.to_dict(), self.diff))

    def ranks_table(self) -> str:
        """Return the paper's Table 2 of this model: ranks by ratio and as snapped, with the times behind them."""
        return table.ranks(self.ledger, self.layers)


FOLDED = "it reads and makes the channels that its neighbours kept"
ADJUSTING = ("refit", "recalibrate")
UNSEEN = "no pass looks at it"


def figures(gm: fx.GraphModule, latency: Timing | None = None, params: int = 0, flops: int = 0) -> dict[str, Any]:
    """Return params, flops, depth and latency_ms of a propagated graph module, and of what is outside of it.

    The depth of regions alone is not that of the model: None.
    """
    known = captured(gm)
    whole = known is None or known.around is None
    return {
        "params": cost.params(gm) + params,
        "flops": cost.flops(gm) + flops,
        "depth": cost.depth(gm) if whole else None,
        "latency_ms": None if latency is None else latency.seconds * 1e3,
    }


def layer_rows(
    before: fx.GraphModule, after: fx.GraphModule, ledger: tuple[Record, ...], dropped: bool = True
) -> list[dict[str, Any]]:
    """Return a row for every conv and linear layer of ``before``, in its order; the unreached come last.

    ``dropped`` says that layers which are never called are no part of the result.
    """
    reasons = {skip.name: skip.reason for record in ledger for skip in record.skipped}
    notes: dict[str, str] = {}
    for record in ledger:
        for site in record.sites:
            # What made the layer what it is comes first; later fine-tuning of it is added.
            added = record.name in ADJUSTING and site.name in notes
            notes[site.name] = f"{notes[site.name]}, {site.note}" if added else site.note
    measured: dict[str, dict[str, Timing]] = {}
    for record in ledger:
        for name, timings in record.timings.items():
            measured.setdefault(name, {}).update(timings)
    touched = {site.name for record in ledger for site in record.sites}
    nodes: dict[str, list[fx.Node]] = {}
    for node in after.graph.nodes:
        if (known := provenance(node)) is not None:
            nodes.setdefault(known.name, []).append(node)
    rows = []
    for name, module in layers(before).items():
        here = nodes.get(name, [])
        known = provenance(here[0]) if here else None
        factored = known is not None and known.role != "original"
        roles = {p.role for n in here if (p := provenance(n)) is not None}
        decision = "branched" if "branch" in roles else _decision(known, module, name in touched)
        targets = dict.fromkeys(str(n.target) for n in here)
        timings = measured.get(name, {})
        now = _timed(known, decision, timings)
        rows.append(
            {
                "name": name,
                "op": op(module),
                "shape": list(layer(module).weight.shape),
                "decision": decision,
                "ranks": list(known.ranks) if factored and known is not None else None,
                "params": sum(cost.params(after.get_submodule(t)) for t in targets),
                "flops": sum(int(n.meta.get("flops", 0)) for n in here),
                "latency_ms": None if now is None else now * 1e3,
                "error": known.error if factored and known is not None else 0.0,
                "reason": notes.get(name) or (FOLDED if decision == "merged" else reasons.get(name, UNSEEN)),
                "params_before": cost.params(module),
                "flops_before": sum(int(n.meta.get("flops", 0)) for n in calls(before, name)),
                "latency_ms_before": timings[ORIGINAL].seconds * 1e3 if ORIGINAL in timings else None,
                "timings": {
                    ranks: {"ms": t.seconds * 1e3, "ratio": t.ratio, "spread": t.spread} for ranks, t in timings.items()
                },
            }
        )
    known_whole = captured(before)
    for name, unreached in known_whole.unreached.items() if known_whole is not None else ():
        rows.append(
            {
                "name": name,
                "op": unreached.op,
                "shape": list(unreached.shape),
                "decision": "skipped",
                "ranks": None,
                "params": 0 if dropped and unreached.reason == NEVER_CALLED else unreached.params,
                "flops": None,
                "latency_ms": None,
                "error": 0.0,
                "reason": unreached.reason,
                "params_before": unreached.params,
                "flops_before": None,
                "latency_ms_before": None,
                "timings": {},
            }
        )
    return rows


def _timed(known: Provenance | None, decision: str, timings: dict[str, Timing]) -> float | None:
    """Return the measured seconds of a layer as it is now, if they are known."""
    if known is None or known.latency is not None:
        return None if known is None else known.latency
    if decision in ("svd", "tucker2"):
        timed = ranks_text(known.ranks)
    elif decision in ("original", "skipped"):
        timed = ORIGINAL
    else:  # a merged layer's channels and a branched core's groups are not what was timed
        return None
    return timings[timed].seconds if timed in timings else None


def _decision(known: Provenance | None, module: nn.Module, touched: bool) -> str:
    """Return what became of a layer; ``known`` is None where no node is left of it."""
    if known is None or known.role == "merged":
        return "merged"
    if known.role in FACTORS:
        return form(module)
    return "original" if touched else "skipped"
