"""merge, mode interpolative: layers retain some of their channels, and those that read them rebuild the others.

    producer ─ BN ─ ReLU ─ (depthwise, pooling, flatten …) ─ consumer

A producer with weight W makes C channels, operations that treat each channel alone follow, consumers with weights V
and biases b read them. Retain r channels S and interpolate all from them, x ≈ T·x[S] + t with T (C×r), where the
consumers read (fxlrd/factor/interpolative.py). To select channels commutes with everything between, so that

    W' = W[S]  (r rows),    V' = V·T  (r columns),    b' = b + V·t

compute exactly what producer → select S → interpolate → consumer would. Whatever is between has its parameters cut to
S too. A squeeze-excitation is one more consumer and one more producer; along a residual stream all that is added to it
retains S, where a plan or ``ranks`` names one of these producers. t is 0 for a consumer without a bias, and for a
conv that pads with zeros, which is not the same constant at the border.

Approximate: S and T are chosen by the error that the moments left by `calibrate` predict for what the consumers make
(fxlrd/factor/elimination.py); each site says how large that is. Where `allocate` has left a plan, that says how many
channels each group retains. Otherwise the compression ratio α does: where a k×k conv reads or makes the channels, r
follows from it by the paper's eq. (7); elsewhere (depthwise, linear, 1×1) r = C/α.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from fxlrd.allocation.merges import Reader, chosen, interpolations, mergeable, readers
from fxlrd.allocation.plan import planned
from fxlrd.errors import FxlrdError, Reason
from fxlrd.factor.failures import check_finite
from fxlrd.graph.channels import Group, Producer
from fxlrd.graph.facts import provenance, retained_channels, statistics
from fxlrd.graph.guards import why_not_replaceable
from fxlrd.graph.layer import origin
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.compose import fold_inputs, keep_channels, keep_outputs
from fxlrd.layers.kinds import depthwise
from fxlrd.passes._merging import Targets, original_shape, put_merged
from fxlrd.passes.contract import UNNAMED, Site, Skip
from fxlrd.passes.driver import Run
from fxlrd.ranks import tucker2_rank
from fxlrd.timing.clock import Timer
from fxlrd.timing.groups import time_group
from fxlrd.timing.inductor import Compile
from fxlrd.timing.search import best_share, grid
from fxlrd.timing.stopwatch import Stopwatch

PLANNED = Reason("original-planned", "allocate keeps all its channels")
NONE_CHOSEN: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Cut:
    """A group of channels of which ``rank`` are retained, and its consumers with what calibration measured of them.

    ``retained`` says which ones, where a plan does.
    """

    group: Group
    readers: Sequence[Reader]
    rank: int
    retained: Tensor | None = None


@dataclass(frozen=True)
class Interpolate(Targets):
    """The rewrite, with the options of `Merge` that it reads."""

    snap: bool
    floor: float
    compile: Compile
    seconds: float
    timer: Timer = field(repr=False)

    def rewrite(self, run: Run) -> None:
        """Cut every group of channels of the run's graph that the options do not leave alone."""
        plan = planned(run.gm) if self.ranks is None else None
        if plan is None:
            self._cut_groups(run)
            return
        replace(self, ranks=dict(plan.retained), snap=False)._cut_groups(run, plan.channels)
        run.skipped = [replace(s, reason=PLANNED) if s.reason == UNNAMED else s for s in run.skipped]

    def _cut_groups(self, run: Run, channels: Mapping[str, Tensor] = NONE_CHOSEN) -> None:
        self.check_named(run.gm)
        guards = why_not_replaceable(run.gm, norms=True)
        done: set[fx.Node] = set()
        run.each(layers(run.gm), lambda name: self._visit(run.gm, calls(run.gm, name)[0], guards, done, channels))
        cut = {origin(node) for node in done}
        run.skipped = [skip for skip in run.skipped if skip.name not in cut]  # visited before the one that is named

    def _visit(
        self,
        gm: fx.GraphModule,
        node: fx.Node,
        guards: Mapping[str, Reason | None],
        done: set[fx.Node],
        channels: Mapping[str, Tensor],
    ) -> Site | Skip | None:
        """Cut the channels that a layer makes, unless that is ``done`` with those of another producer."""
        if node in done or _cut_with_its_producer(gm, node):
            return None
        cut = self._cut(gm, node, guards)
        if isinstance(cut, Reason):
            return self.refusal(node, cut)
        error = _apply(gm, replace(cut, retained=channels.get(str(node.target))))
        done.update((*(producer.node for producer in cut.group.producers), *cut.group.through))
        consumers = ", ".join(str(consumer.node.target) for consumer in cut.group.consumers)
        count = f"{cut.rank} of {cut.group.channels} channels kept"
        return Site(origin(node), False, f"{count}, the others interpolated in {consumers} (error {error:.2g})")

    def _cut(self, gm: fx.GraphModule, node: fx.Node, guards: Mapping[str, Reason | None]) -> Cut | Reason:
        """Return the cut of the channels that a layer makes, or why it is left alone."""
        name = str(node.target)
        if (reason := self.left_alone(name)) is not None and not depthwise(gm.get_submodule(name)):
            return reason
        named = self.ranks if isinstance(self.ranks, Mapping) else None
        group = mergeable(gm, node, guards, self.skip, stem=named is not None, sums=named is not None and name in named)
        if isinstance(group, Reason):
            return group
        rank = self._rank(gm, name, group)
        self._check_agreed(name, group, rank)
        if rank < 1:
            return Reason("no-channels", f"ratio={self.ratio:g} leaves none of its {group.channels} channels")
        if rank >= group.channels:
            if group.channels < (before := original_shape(gm, node)[0] // group.producers[0].parts):
                text = f"it is merged already: {group.channels} of its {before} channels were kept"
                return Reason("merged", text)
            return Reason("no-saving", f"keeping {rank} of {group.channels} channels saves nothing")
        measured = readers(gm, group)
        if isinstance(measured, Reason):
            return measured
        return Cut(group, measured, self._snapped(gm, group, rank) if self.snap else rank)

    def _check_agreed(self, name: str, group: Group, rank: int) -> None:
        """Raise FxlrdError where ``ranks`` names another layer of the group's producers with another number."""
        for producer in group.producers:
            other = str(producer.node.target)
            if isinstance(self.ranks, Mapping) and self.ranks.get(other, rank) != rank:
                text = f"{name} and {other} make the same channels: ranks= asks for {rank} and {self.ranks[other]}"
                raise FxlrdError(f"merge: {text}; name one of them")

    def _rank(self, gm: fx.GraphModule, name: str, group: Group) -> int:
        """Return the number of channels that ``ranks`` or else ``ratio`` asks for."""
        if (rank := self.explicit_rank(name)) is not None:
            return rank
        for node in (*(consumer.node for consumer in group.consumers), *(p.node for p in group.producers)):
            c_out, c_in, *kernel = original_shape(gm, node)
            if math.prod(kernel) > 1:
                return tucker2_rank(c_in, c_out, kernel, self.ratio)
        producer = group.producers[0]
        return math.floor(original_shape(gm, producer.node)[0] / producer.parts / self.ratio)

    def _snapped(self, gm: fx.GraphModule, group: Group, rank: int) -> int:
        """Return r or the hardware multiple below it that pays, by timing the group's layers."""
        candidates = grid((rank,), (math.ceil(self.floor * rank),), 1)
        if len(candidates) == 1:
            return rank
        stopwatch = Stopwatch(self.compile, self.seconds, timer=self.timer)
        timings = time_group(gm, group, [r for (r,) in candidates if r], stopwatch)
        (best,) = best_share(candidates, timings, lambda ranks: float(ranks[0] or 0), trade=0.5)
        return best or rank


def _cut_with_its_producer(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a depthwise conv whose channels went with those of the layer that feeds it."""
    recorded = provenance(node)
    return recorded is not None and recorded.role == "merged" and depthwise(gm.get_submodule(str(node.target)))


def _apply(gm: fx.GraphModule, cut: Cut) -> float:
    """Cut a group and return the largest predicted relative error of what a consumer makes."""
    retained = chosen(cut.readers, cut.rank) if cut.retained is None else cut.retained
    rebuilt = interpolations(cut.readers, retained)
    largest = max(error for _, _, error in rebuilt)
    check_finite(*(each.matrix for each in rebuilt))
    folded = [
        fold_inputs(reader.module, matrix, reader.consumer.block, shift)
        for reader, (matrix, shift, _) in zip(cut.readers, rebuilt, strict=True)
    ]
    for reader, layer, (_, _, error) in zip(cut.readers, folded, rebuilt, strict=True):
        put_merged(gm, reader.consumer.node, layer, (cut.rank, None), error)
    for node in cut.group.through:
        put_merged(gm, node, keep_channels(gm.get_submodule(str(node.target)), retained, cut.group.channels))
    for producer in cut.group.producers:
        _cut_producer(gm, producer, producer.rows(retained, cut.group.channels), largest)
    return largest


def _cut_producer(gm: fx.GraphModule, producer: Producer, rows: Tensor, error: float) -> None:
    """Let a layer make only its outputs ``rows``."""
    target = str(producer.node.target)
    put_merged(gm, producer.node, keep_outputs(gm.get_submodule(target), rows), (None, len(rows)), error)
    for node in calls(gm, target):
        earlier = retained_channels(node)
        retained_channels.record(node, rows if earlier is None else earlier[rows])
        measured = statistics(node)
        if measured is not None and measured.importance is not None:
            statistics.record(node, replace(measured, importance=measured.importance[rows][:, rows]))
