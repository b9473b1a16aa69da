"""A row of the report for each layer of the original."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxlrd.graph import cost, facts
from fxlrd.graph.captured import captured
from fxlrd.graph.facts import FACTORS, Provenance, provenance
from fxlrd.graph.guards import NEVER_CALLED
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.forms import form, ranks_text
from fxlrd.layers.kinds import as_layer, op
from fxlrd.pipeline import Record
from fxlrd.timing.clock import Timing
from fxlrd.timing.layers import ORIGINAL

FOLDED = "it reads and makes the channels that its neighbours kept"
ADJUSTING = ("refit", "recalibrate")
UNSEEN = "no pass looks at it"


def layer_rows(
    before: fx.GraphModule, after: fx.GraphModule, ledger: tuple[Record, ...], dropped: bool = True
) -> list[dict[str, Any]]:
    """Return a row for every conv and linear layer of ``before``, in its order; the unreached come last.

    ``dropped`` says that layers which are never called are no part of the result.
    """
    reasons = {skip.name: str(skip.reason) for record in ledger for skip in record.skipped}
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
                "shape": list(as_layer(module).weight.shape),
                "decision": decision,
                "ranks": list(known.ranks) if factored and known is not None else None,
                "params": sum(cost.params(after.get_submodule(t)) for t in targets),
                "flops": sum(facts.flops(n) for n in here),
                "latency_ms": None if now is None else now * 1e3,
                "error": known.error if factored and known is not None else 0.0,
                "reason": notes.get(name) or (FOLDED if decision == "merged" else reasons.get(name, UNSEEN)),
                "params_before": cost.params(module),
                "flops_before": sum(facts.flops(n) for n in calls(before, name)),
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
                "params": 0 if dropped and unreached.reason.code == NEVER_CALLED.code else unreached.params,
                "flops": None,
                "latency_ms": None,
                "error": 0.0,
                "reason": str(unreached.reason),
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
