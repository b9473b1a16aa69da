"""The rows of a report: what became of each layer of the original, and what each pass did.

The fields of a row are the keys of the report's JSON, in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from fxlrd.graph import cost, facts
from fxlrd.graph.captured import Unreached, captured_or_bare
from fxlrd.graph.facts import FACTORS, Provenance, provenance
from fxlrd.graph.guards import NEVER_CALLED
from fxlrd.graph.layer import Layer, layers_of
from fxlrd.layers.forms import form, ranks_text
from fxlrd.layers.kinds import as_layer, op
from fxlrd.pipeline import Record
from fxlrd.timing.clock import Timing
from fxlrd.timing.layers import ORIGINAL

FOLDED = "it reads and makes the channels that its neighbours kept"
UNVISITED = "no pass looks at it"
_ADJUSTING = ("refit", "recalibrate")
"""Passes that adjust a layer's weights: their notes follow that of the pass that gave the layer its form."""


@dataclass(frozen=True)
class TimingRow:
    """A timed form of a layer: milliseconds of one call, relative to the original layer, and the spread of that."""

    ms: float
    ratio: float
    spread: float

    @classmethod
    def of(cls, timing: Timing) -> TimingRow:
        """Return the row of a timing."""
        return cls(timing.seconds * 1e3, timing.ratio, timing.spread)


@dataclass(frozen=True)
class LayerRow:
    """What became of one conv or linear layer of the original, or of a weight that no layer holds.

    Attributes:
        name: the layer's name in the user's model.
        op: its type, such as Conv2d; of a weight that no layer holds, the type of the module around it.
        shape: of its weight in the original.
        decision: original, svd, tucker2, merged, branched or skipped.
        ranks: of its low-rank form, or the channels that a merged layer reads and makes, None in the place of a mode
            that is not cut; None if it has no such form.
        params: of the modules that now make its output.
        flops: of these (2 × multiply-adds); None if the layer is no part of the graph.
        latency_ms: of one call in its present form, where a pass measured it, else None.
        error: relative error of the form: of the weight, or of the output if it was fitted to data.
        channel_error: that of the output channel of which it is the largest; None where it is not determined.
        reason: what was done to it, or why it was left alone.
        params_before: of the original layer.
        flops_before: of the original layer; None if it is no part of the graph.
        latency_ms_before: of the original layer, where a pass measured it, else None.
        timings: the measured forms, by ranks ("original", "32x32").
    """

    name: str
    op: str
    shape: list[int]
    decision: str
    ranks: list[int | None] | None
    params: int
    flops: int | None
    latency_ms: float | None
    error: float | None
    channel_error: float | None
    reason: str
    params_before: int
    flops_before: int | None
    latency_ms_before: float | None
    timings: dict[str, TimingRow]

    @classmethod
    def of(cls, layer: Layer, after: Successors, history: LayerHistory) -> LayerRow:
        """Return the row of a layer of the original graph, ``after`` being what took its place."""
        origin = after.provenances[0] if after.provenances else None
        factored = origin is not None and origin.role != "original"
        decision = _decision(layer.module, after.provenances, history.rewritten)
        seconds = _seconds(origin, decision, history.timings)
        original = history.timings.get(ORIGINAL)
        return cls(
            name=layer.name,
            op=op(layer.module),
            shape=list(as_layer(layer.module).weight.shape),
            decision=decision,
            ranks=list(origin.ranks) if factored and origin is not None else None,
            params=after.params,
            flops=after.flops,
            latency_ms=None if seconds is None else seconds * 1e3,
            error=origin.error if factored and origin is not None else 0.0,
            channel_error=origin.channel_error if factored and origin is not None else None,
            reason=history.note or (FOLDED if decision == "merged" else history.skip_reason),
            params_before=cost.params(layer.module),
            flops_before=sum(facts.flops(node) for node in layer.calls),
            latency_ms_before=None if original is None else original.seconds * 1e3,
            timings={ranks: TimingRow.of(timing) for ranks, timing in history.timings.items()},
        )

    @classmethod
    def unreached(cls, name: str, unreached: Unreached, dropped: bool) -> LayerRow:
        """Return the row of a layer that no node stands for. ``dropped``: it is no part of the result."""
        return cls(
            name=name,
            op=unreached.op,
            shape=list(unreached.shape),
            decision="skipped",
            ranks=None,
            params=0 if dropped else unreached.params,
            flops=None,
            latency_ms=None,
            error=0.0,
            channel_error=None,
            reason=str(unreached.reason),
            params_before=unreached.params,
            flops_before=None,
            latency_ms_before=None,
            timings={},
        )


@dataclass(frozen=True)
class SiteRow:
    """A layer that a pass rewrote, and what was done."""

    name: str
    note: str


@dataclass(frozen=True)
class SkipRow:
    """A layer that a pass left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class PassRow:
    """What a pass did: a `fxlrd.pipeline.Record` without its timings, which the layers' rows have."""

    name: str
    text: str
    exact: bool
    sites: list[SiteRow]
    skipped: list[SkipRow]
    max_abs_error: float | None
    relative_error: float | None
    step_error: float | None
    seconds: float
    params: int
    flops: int
    depth: int
    note: str

    @classmethod
    def of(cls, record: Record) -> PassRow:
        """Return the row of a line of the ledger."""
        return cls(
            name=record.name,
            text=record.text,
            exact=record.exact,
            sites=[SiteRow(site.name, site.note) for site in record.sites],
            skipped=[SkipRow(skip.name, str(skip.reason)) for skip in record.skipped],
            max_abs_error=record.max_abs_error,
            relative_error=record.relative_error,
            step_error=record.step_error,
            seconds=record.seconds,
            params=record.params,
            flops=record.flops,
            depth=record.depth,
            note=record.note,
        )


@dataclass
class LayerHistory:
    """What the ledger says of one layer: the notes of the passes that rewrote it, why the last one did not, timings."""

    rewritten: bool = False
    note: str = ""
    skip_reason: str = UNVISITED
    timings: dict[str, Timing] = field(default_factory=dict)


def histories(ledger: Iterable[Record]) -> dict[str, LayerHistory]:
    """Return what the ledger says of each layer that it names."""
    by_name: dict[str, LayerHistory] = {}
    for record in ledger:
        for site in record.sites:
            history = by_name.setdefault(site.name, LayerHistory())
            follows = record.name in _ADJUSTING and history.rewritten
            history.note = f"{history.note}, {site.note}" if follows else site.note
            history.rewritten = True
        for skip in record.skipped:
            by_name.setdefault(skip.name, LayerHistory()).skip_reason = str(skip.reason)
        for name, timings in record.timings.items():
            by_name.setdefault(name, LayerHistory()).timings.update(timings)
    return by_name


@dataclass(frozen=True)
class Successors:
    """What makes a layer's output in the graph after: the provenances of its nodes, in order, and their cost."""

    provenances: Sequence[Provenance] = ()
    params: int = 0
    flops: int = 0


def successors(gm: fx.GraphModule) -> dict[str, Successors]:
    """Return what took the place of each layer, by the layer's name in the original."""
    nodes: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if (origin := provenance(node)) is not None:
            nodes.setdefault(origin.name, []).append(node)
    return {name: _successors(gm, own) for name, own in nodes.items()}


def _successors(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> Successors:
    targets = dict.fromkeys(str(node.target) for node in nodes)
    return Successors(
        [origin for node in nodes if (origin := provenance(node)) is not None],
        sum(cost.params(gm.get_submodule(target)) for target in targets),
        sum(facts.flops(node) for node in nodes),
    )


def layer_rows(
    before: fx.GraphModule, after: fx.GraphModule, ledger: Iterable[Record], dropped: bool
) -> list[LayerRow]:
    """Return a row for every conv and linear layer: those of ``before`` in its order, then those it does not reach.

    ``dropped``: layers that are never called are no part of the result.
    """
    by_name, history = successors(after), histories(ledger)
    rows = [
        LayerRow.of(layer, by_name.get(layer.name, Successors()), history.get(layer.name, LayerHistory()))
        for layer in layers_of(before)
    ]
    for name, unreached in captured_or_bare(before).unreached.items():
        rows.append(LayerRow.unreached(name, unreached, dropped and unreached.reason.code == NEVER_CALLED.code))
    return rows


def _decision(module: nn.Module, provenances: Sequence[Provenance], rewritten: bool) -> str:
    if any(origin.role == "branch" for origin in provenances):
        return "branched"
    if not provenances or provenances[0].role == "merged":
        return "merged"
    if provenances[0].role in FACTORS:
        return form(module)
    return "original" if rewritten else "skipped"


def _seconds(origin: Provenance | None, decision: str, timings: Mapping[str, Timing]) -> float | None:
    """Return the measured time of a layer in its present form; None if that was not timed."""
    if origin is None:
        return None
    if origin.latency is not None:
        return origin.latency
    if decision in ("svd", "tucker2"):
        timing = timings.get(ranks_text(origin.ranks))
    elif decision in ("original", "skipped"):
        timing = timings.get(ORIGINAL)
    else:  # neither a merged layer's channels nor a branched core's groups were timed by ranks
        timing = None
    return None if timing is None else timing.seconds
