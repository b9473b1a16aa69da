"""The channels that a group retains, how its readers rebuild the others, and what that is predicted to cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from fxlrd.allocation.measures import Measure
from fxlrd.calibration.moments import LARGEST, moments
from fxlrd.errors import Reason
from fxlrd.factor.elimination import Elimination, Reading, eliminate
from fxlrd.factor.failures import check_finite, failure
from fxlrd.factor.interpolative import Interpolation, interpolate
from fxlrd.factor.products import gram, half
from fxlrd.graph.channels import Consumer, Group, group_of
from fxlrd.graph.facts import FACTORS, provenance, shape, statistics
from fxlrd.graph.guards import is_stem, matches, stem_reason, why_not_replaceable
from fxlrd.graph.layer import statistics_of
from fxlrd.graph.surgery import calls
from fxlrd.layers.compose import takes_shift, weight_by_channel
from fxlrd.layers.fit import Moments
from fxlrd.layers.kinds import as_layer, channel_axis, depthwise
from fxlrd.progress import Progress

_FEW = 16
"""Numbers of channels offered for a group, at most, where merges share layers: then the plan is found by search."""


@dataclass(frozen=True)
class Reader:
    """A consumer with the moments of what it reads and Γ of what it makes, where that was measured.

    Squared errors are weighted by ``scale``. What follows from these is computed when it is asked for: it is as
    large as they are.
    """

    consumer: Consumer
    module: nn.Module
    moments: Moments
    importance: Tensor | None
    scale: float = 1.0

    @property
    def shifts(self) -> bool:
        """Whether its bias can take a constant: then it has the covariance for G."""
        return takes_shift(self.module)

    @property
    def second(self) -> Tensor:
        """G, the second moments of what it reads."""
        return self.moments.covariance if self.shifts else self.moments.second

    @property
    def mean(self) -> Tensor | None:
        """The mean of what it reads, if its bias can take a constant."""
        return self.moments.mean if self.shifts else None

    @property
    def ridge(self) -> float:
        """How much G is to be regularised."""
        return self.moments.ridge

    @property
    def weight(self) -> Tensor:
        """F with FᵀF = Σ WᵀΓW over the kernel, the importance of the channels that it reads."""
        weight = weight_by_channel(self.module, self.consumer.block, self.importance)
        return weight if self.scale == 1.0 else weight * math.sqrt(self.scale)

    @property
    def matters(self) -> bool:
        """Whether WᵀΓW is anything but zero, by one product with it."""
        weight = as_layer(self.module).weight.detach().double().flatten(1)
        one = weight @ torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        return bool((one if self.importance is None else self.importance.double() @ one).any())


def comparable(reader: Reader) -> Reader:
    """Return a reader whose errors are in the unit of a layer's forms: without Γ relative to what it makes."""
    if reader.importance is not None:
        return reader
    weight = reader.weight
    made = float((weight @ reader.moments.second * weight).sum())
    return replace(reader, scale=1 / made) if made > 0 else reader


class Option(NamedTuple):
    """What it means for a group to retain some number of channels.

    ``error`` is the predicted relative squared error of the model's output; ``share`` is what is left of its layers'
    cost.
    """

    error: float
    share: float


def _unknown(count: int) -> Tensor:
    raise AssertionError("the order of the channels was not computed")


@dataclass(frozen=True)
class Merging:
    """A channel group, and its options by the number of channels that it retains.

    Attributes:
        group: the layers.
        options: what each number of channels means.
        between: what the modules between its layers cost, which lose channels too.
        retained: gives the channels, ascending, for their number.
    """

    group: Group
    options: Mapping[int, Option]
    between: float = 0.0
    retained: Callable[[int], Tensor] = field(default=_unknown, repr=False, compare=False)

    @cached_property
    def made_by(self) -> frozenset[str]:
        """The layers that make the channels."""
        return frozenset(str(producer.node.target) for producer in self.group.producers)

    @cached_property
    def read_by(self) -> frozenset[str]:
        """The layers that read the channels."""
        return frozenset(str(consumer.node.target) for consumer in self.group.consumers)

    @cached_property
    def cut(self) -> list[str]:
        """The layers that retaining fewer channels cuts."""
        return self.group.cut


def mergeable(
    gm: fx.GraphModule,
    node: fx.Node,
    reasons: Mapping[str, Reason | None],
    skip: Sequence[str],
    stem: bool = False,
    sums: bool = False,
) -> Group | Reason:
    """Return the group of the channels that a layer's call makes, or why it is not to be merged.

    ``reasons`` are those of `fxlrd.graph.guards.why_not_replaceable`, with norms. A group is left alone if any of its
    layers matches ``skip``; so is that of a stem's own call, unless ``stem``, and what several layers add up, unless
    ``sums``.
    """
    name = str(node.target)
    if depthwise(gm.get_submodule(name)):
        return Reason("depthwise", "a depthwise conv is cut with the layer that feeds it, which stays")
    if is_stem(gm, name, gm.get_submodule(name)) and not stem:
        return stem_reason(gm.get_submodule(name))
    group = group_of(gm, node, reasons, sums)
    if isinstance(group, Reason):
        return group
    for member in (*group.layers, *group.through):
        if (pattern := matches(str(member.target), skip)) is not None:
            return Reason("skip", f"skip={pattern} keeps {member.target}")
    for member in group.layers:
        if (origin := provenance(member)) is not None and origin.role in FACTORS:
            return Reason("factor", f"{member.target} is a low-rank factor already", "merge before decomposing")
    return group


def readers(gm: fx.GraphModule, group: Group) -> list[Reader] | Reason:
    """Return the group's consumers with what calibration measured of them, or why that is not enough."""
    if group.channels > LARGEST:
        text = f"calibrate measures no tensor of more than {LARGEST} channels; it makes {group.channels}"
        return Reason("too-many-channels", text)
    result = []
    for consumer in group.consumers:
        module = gm.get_submodule(str(consumer.node.target))
        inputs = _moments_read(gm, consumer, group.channels)
        if inputs is None:
            return Reason(
                "no-moments", "its output's moments are not known", "run calibrate first, on calibration inputs"
            )
        measured = statistics_of(calls(gm, str(consumer.node.target)))
        result.append(Reader(consumer, module, inputs, None if measured is None else measured.importance))
    return result


def _moments_read(gm: fx.GraphModule, consumer: Consumer, count: int) -> Moments | None:
    """Return the moments of the ``count`` channels where the consumer reads them; none that an earlier cut outdated."""
    measured = statistics_of(calls(gm, str(consumer.node.target)))
    if consumer.block == 1 and measured is not None and measured.input_moments is not None:
        return measured.input_moments if len(measured.input_moments.total) == count else None
    sizes = shape(consumer.source)
    assert sizes is not None
    axis = channel_axis(gm.get_submodule(str(consumer.node.target)), len(sizes))
    inputs = moments(consumer.source, axis, consumer.block)
    return inputs if inputs is not None and len(inputs.total) == count else None


def chosen(read: Sequence[Reader], rank: int) -> Tensor:
    """Return the channels to retain (ascending)."""
    return eliminated([comparable(reader) for reader in read], rank).retained(rank)


def interpolations(read: Sequence[Reader], retained: Tensor) -> list[Interpolation]:
    """Return how each reader rebuilds the other channels from those retained."""
    return [interpolate(r.second, retained, r.weight, r.ridge, r.mean) for r in read]


def eliminated(read: Sequence[Reader], fewest: int) -> Elimination:
    """Drop channels until ``fewest`` are left: the errors are those of `Elimination`, summed over the readers.

    With Γ they are in units of the model's relative squared output error. Readers of equal moments count as one.
    """
    readings: list[Reading] = []
    for r in read:
        given = r.second
        for i, (second, weight, ridge) in enumerate(readings):
            if ridge == r.ridge and torch.equal(second, given):
                weight = torch.cat([weight, r.weight])
                readings[i] = Reading(second, weight if len(weight) <= 2 * len(second) else half(gram(weight)), ridge)
                break
        else:
            readings.append(Reading(given, r.weight, r.ridge))
    return eliminate(readings, fewest)


def mergings(
    gm: fx.GraphModule, names: Sequence[str], measure: Measure, skip: Sequence[str], progress: Progress
) -> dict[str, Merging | Reason]:
    """Return the groups that may be merged, by the name of their first producer, with what that costs.

    A group whose algebra fails has the reason. ``names`` are the layers that may be cut. Groups with a reader of which
    calibration has measured nothing are left out.
    """
    groups = _measured_groups(gm, names, skip)
    cut = [layer for group in groups.values() for layer in group.cut]
    most = measure.widths if len(set(cut)) == len(cut) else min(measure.widths, _FEW)
    result: dict[str, Merging | Reason] = {}
    for name in progress(list(groups), "allocate: merges"):
        try:
            merging = _merging(gm, groups[name], measure, most)
        except Exception as error:
            if (reason := failure(error)) is None:
                raise
            result[name] = reason
            continue
        if merging is not None:
            result[name] = merging
    return result


def _merging(gm: fx.GraphModule, group: Group, measure: Measure, most: int) -> Merging | None:
    """Return a group with at most ``most`` options; None where it is too narrow for any."""
    read, counts = readers(gm, group), _counts(group.channels, most, measure.vector)
    if not counts or isinstance(read, Reason):
        return None
    elimination = eliminated([comparable(reader) for reader in read], min(counts))
    shares = measure.shares(gm, group, counts)
    check_finite(elimination.errors)
    options = {count: Option(elimination.error(count), shares[count]) for count in counts}
    return Merging(group, options, measure.between(gm, group), elimination.retained)


def _measured_groups(gm: fx.GraphModule, names: Sequence[str], skip: Sequence[str]) -> dict[str, Group]:
    """Return the groups of which calibration says what a merge costs."""
    reasons = why_not_replaceable(gm, norms=True)
    groups: dict[str, Group] = {}
    done: set[fx.Node] = set()
    for name in names:
        node = calls(gm, name)[0]
        if node in done:
            continue
        group = mergeable(gm, node, reasons, skip, sums=True)
        if isinstance(group, Reason):
            continue
        read = readers(gm, group)
        if isinstance(read, Reason):
            continue
        done.update(producer.node for producer in group.producers)
        measured = all(statistics(reader.consumer.node) is not None for reader in read)
        reaches_output = any(reader.matters for reader in read)
        if measured and reaches_output and set(group.cut) <= set(names):
            groups[name] = group
    return groups


def _counts(channels: int, most: int, vector: int) -> list[int]:
    """Return the numbers of channels that a group may retain, ascending: hardware multiples, at most ``most``.

    They are multiples of the ``vector``, if there are any.
    """
    step = 16 if channels >= 256 else 8 if channels >= 64 else 4
    step = max(step, vector) if channels > vector else step
    counts = list(range(step, channels, step))
    stride = max(1, math.ceil(len(counts) / most))
    return counts[::-1][::stride][::-1]
