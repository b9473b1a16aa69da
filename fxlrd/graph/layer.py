"""The layers of a graph, which the passes loop over: convs and linears, and what they were decomposed into."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

from fxlrd.errors import Reason
from fxlrd.graph.facts import FACTORS, Provenance, provenance, statistics
from fxlrd.graph.guards import FACTOR, is_factor, is_stem, matches, skip_reason, stem_reason, why_not_replaceable
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.fit import Statistics

NOT_REACHED = Reason("not-reached", "no calibration input reached it", "calibrate on more inputs")


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of the graph.

    Attributes:
        name: the name of its module in the graph module.
        module: a conv or linear; for a decomposed layer the container of its factors.
        calls: the nodes that call it, or its factors, in the order of the graph.
        origin: its name in the captured model, under which passes report it.
        provenance: that of its first call.
        statistics: what calibration measured of it, over all calls.
        left_alone: why no pass may replace its module, or None.
        is_stem: whether it is the model's first conv, see `is_stem`.
    """

    name: str
    module: nn.Module
    calls: tuple[fx.Node, ...]
    origin: str
    provenance: Provenance | None
    statistics: Statistics | None
    left_alone: Reason | None = None
    is_stem: bool = False

    @property
    def role(self) -> str:
        """The role that its provenance names: original, merged, or that of a factor."""
        return self.provenance.role if self.provenance is not None else "original"

    def why_left_alone(self, skip: Sequence[str] = ()) -> Reason | None:
        """Return the first reason to leave the layer as it is, or None.

        In this order: it is a factor already, it must not be replaced, a name or glob in ``skip`` fits it, it is the
        stem. Only the last can be overruled, by naming the layer.
        """
        if self.left_alone is not None:
            return self.left_alone
        if (pattern := matches(self.name, skip)) is not None:
            return skip_reason(pattern)
        return stem_reason(self.module) if self.is_stem else None


def layers_of(gm: fx.GraphModule) -> list[Layer]:
    """Return the convs and linears that the graph calls, factors included, in the order of the graph."""
    reasons = why_not_replaceable(gm)
    found = []
    for name, module in layers(gm).items():
        nodes = calls(gm, name)
        p = provenance(nodes[0])
        measured = statistics_of(nodes)
        left_alone = FACTOR if p is not None and p.role in FACTORS else reasons[name]
        if left_alone is None and measured is not None:
            left_alone = measured.failure or (None if measured.reached else NOT_REACHED)
        stem = is_stem(gm, name, module)
        found.append(Layer(name, module, tuple(nodes), origin(nodes[0]), p, measured, left_alone, stem))
    return found


def decomposed_layers(gm: fx.GraphModule) -> list[Layer]:
    """Return the layers that are decomposed, by these passes or in a model that was already compressed.

    They are in the order of the graph, those of an earlier compression last. The factors of these have no provenance
    that names the layer: they count as original.
    """
    factors: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        p = provenance(node)
        if p is not None and p.role in FACTORS:
            factors.setdefault(p.name, []).append(node)
    for name in layers(gm):
        if is_factor(gm, name):
            factors.setdefault(name.rpartition(".")[0], []).extend(calls(gm, name))
    return [
        Layer(name, gm.get_submodule(name), tuple(nodes), name, provenance(nodes[0]), statistics_of(nodes))
        for name, nodes in factors.items()
    ]


def origin(node: fx.Node) -> str:
    """Return the name in the captured model of what a module call stands for."""
    p = provenance(node)
    return p.name if p is not None else str(node.target)


def statistics_of(nodes: Iterable[fx.Node]) -> Statistics | None:
    """Return what calibration measured of a layer over all its calls; ``nodes`` are those, or those of its factors.

    The factors of a layer share one `Statistics`, which counts once.
    """
    found = list({id(each): each for n in nodes if (each := statistics(n)) is not None}.values())
    return functools.reduce(operator.add, found) if found else None
