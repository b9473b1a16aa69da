"""The channels that a group keeps, how its readers rebuild the others, and what that is predicted to cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.moments import LARGEST, moments
from fxlrd.errors import Reason
from fxlrd.factor.interpolative import greedy, least_squares, lost, residual, select
from fxlrd.graph.channels import Consumer, Group, group_of
from fxlrd.graph.facts import FACTORS, provenance, shape, statistics
from fxlrd.graph.guards import is_stem, matches, stem_reason
from fxlrd.layers.compose import input_importance
from fxlrd.layers.fit import Moments
from fxlrd.layers.kinds import channel_axis, depthwise


class Reader(NamedTuple):
    """A consumer with the second moments G of what it reads and its importance A = Σ WᵀΓW over the kernel."""

    consumer: Consumer
    module: nn.Module
    second: Tensor
    weight: Tensor
    ridge: float


def mergeable(
    gm: fx.GraphModule,
    node: fx.Node,
    reasons: Mapping[str, Reason | None],
    skip: Sequence[str],
    stem: bool = False,
) -> Group | Reason:
    """Return the group of the channels that a layer's call makes, or why it is not to be merged.

    ``reasons`` are those of `fxlrd.graph.guards.why_not_replaceable`, with norms. A group is left alone if any of its
    layers matches ``skip``; so is the stem's group, unless ``stem``.
    """
    name = str(node.target)
    if depthwise(gm.get_submodule(name)):
        return Reason("depthwise", "a depthwise conv is cut with the layer that feeds it, which stays")
    if is_stem(gm, name, gm.get_submodule(name)) and not stem:
        return stem_reason(gm.get_submodule(name))
    whole = group_of(gm, node, reasons)
    if isinstance(whole, Reason):
        return whole
    for member in [*whole.producers, *(c.node for c in whole.consumers)]:
        if (pattern := matches(str(member.target), skip)) is not None:
            return Reason("skip", f"skip={pattern} keeps {member.target}")
        if (known := provenance(member)) is not None and known.role in FACTORS:
            return Reason("factor", f"{member.target} is a low-rank factor already", "merge before decomposing")
    return whole


def readers(gm: fx.GraphModule, whole: Group) -> list[Reader] | Reason:
    """Return the group's consumers with what calibration knows of them, or why that is not enough."""
    if whole.channels > LARGEST:
        text = f"calibrate measures no tensor of more than {LARGEST} channels; it makes {whole.channels}"
        return Reason("too-many-channels", text)
    found = []
    for consumer in whole.consumers:
        module = gm.get_submodule(str(consumer.node.target))
        known = _seen(gm, consumer, whole.channels)
        if known is None:
            return Reason(
                "no-moments", "its output's moments are not known", "run calibrate first, on calibration inputs"
            )
        saw = statistics(consumer.node)
        weight = input_importance(module, consumer.block, None if saw is None else saw.importance)
        found.append(Reader(consumer, module, known.second, weight, known.ridge))
    return found


def _seen(gm: fx.GraphModule, consumer: Consumer, count: int) -> Moments | None:
    """Return the moments of the ``count`` channels where the consumer reads them; none that an earlier cut outdated."""
    measured = statistics(consumer.node)
    if consumer.block == 1 and measured is not None and measured.input_moments is not None:
        return measured.input_moments if len(measured.input_moments.total) == count else None
    sizes = shape(consumer.source)
    assert sizes is not None
    axis = channel_axis(gm.get_submodule(str(consumer.node.target)), len(sizes))
    found = moments(consumer.source, axis, consumer.block)
    return found if found is not None and len(found.total) == count else None


def choose(found: Sequence[Reader], rank: int) -> tuple[Tensor, list[Tensor], list[float]]:
    """Return the channels to keep, each consumer's interpolation and its predicted relative error.

    All consumers have to read the same channels: each one proposes its best, and the proposal with the least
    sum of squared errors is taken.
    """
    proposals = []
    for proposer in found:
        kept = select(proposer.second, rank, proposer.weight)
        matrices = [least_squares(r.second, kept, r.ridge) for r in found]
        errors = [residual(r.second, kept, t, r.weight) for r, t in zip(found, matrices, strict=True)]
        proposals.append((kept, matrices, errors))
    return min(proposals, key=lambda each: sum(e * e for e in each[2]))


def curve(found: Sequence[Reader], ranks: Sequence[int]) -> list[float]:
    """Return the predicted error tr(A·R), summed over the consumers, of keeping each number of channels.

    With Γ known it is in units of the model's relative squared output error.
    """
    orders = [greedy(r.second, max(ranks), r.weight) for r in found]
    errors = []
    for rank in ranks:
        proposals = []
        for order in orders:
            kept = torch.tensor(sorted(order[:rank]), device=found[0].second.device)
            proposals.append(sum(lost(r.second, kept, least_squares(r.second, kept, r.ridge), r.weight) for r in found))
        errors.append(min(proposals))
    return errors
