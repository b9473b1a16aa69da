"""What a budget limits: parameters, FLOPs or latency. Each measure says what a layer's forms and merges cost in it.

Parameters and FLOPs are computed. The latency of a form is its time relative to the original layer's, measured on this
device as `snap` does, times the seconds of the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import fx, nn

from fxlrd.allocation.choices import Choice, Curve, candidate_ranks, pareto
from fxlrd.allocation.factored import fit_of
from fxlrd.budget import Budget
from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph import cost
from fxlrd.graph.captured import captured, captured_or_bare, runnable
from fxlrd.graph.channels import Group
from fxlrd.graph.facts import shape, times
from fxlrd.graph.layer import Layer
from fxlrd.graph.surgery import calls, source
from fxlrd.layers.forms import Ranks, form, parameters, ranks_text
from fxlrd.layers.kinds import TRANSPOSED, as_layer, channel_axis, channels_per_group, depthwise, kernel_area
from fxlrd.timing.between import time_between
from fxlrd.timing.clock import Timing
from fxlrd.timing.groups import time_group
from fxlrd.timing.layers import ORIGINAL, placed, time_ranks
from fxlrd.timing.models import time_models
from fxlrd.timing.stopwatch import Stopwatch

_TIMED = 8
"""Forms of one layer that are timed, at most."""


class Measure(Protocol):
    """A measure of cost."""

    @property
    def timings(self) -> Mapping[str, Mapping[str, Timing]]:
        """What was timed so far, by layer and ranks; empty for a measure that is computed."""
        ...

    @property
    def widths(self) -> int:
        """The numbers of channels of a group that are priced, at most."""
        ...

    @property
    def vector(self) -> int:
        """How many channels are computed at once: fewer cost as much."""
        ...

    def multiple(self, module: nn.Module) -> int:
        """Return the multiple that the ranks of a layer's forms are to be of, all groups together."""
        ...

    def priced(self, layer: Layer, forms: Sequence[Choice], fitted: bool) -> list[Choice] | Reason:
        """Return a layer's forms, those worth pricing, with their costs; the original is last.

        ``fitted`` factors are fitted to calibration inputs. Returns a Reason where the cost cannot be determined.
        """
        ...

    def shares(self, gm: fx.GraphModule, group: Group, counts: Sequence[int]) -> dict[int, float]:
        """Return the share of what a group's channels cost that is left if it retains each number of them."""
        ...

    def between(self, gm: fx.GraphModule, group: Group) -> float:
        """Return what the modules between a group's layers cost, which lose channels with them."""
        ...

    def bias(self, module: nn.Module) -> float:
        """Return the part of a layer's cost that goes with the channels that it makes, whatever it reads."""
        ...

    def total(self, gm: fx.GraphModule, layers: float) -> float:
        """Return what the budget is a share of: what the model costs, what is outside of the graph included.

        ``layers`` is the cost of those that may be changed.
        """
        ...


class Computed:
    """What measures that are computed have in common."""

    @property
    def timings(self) -> Mapping[str, Mapping[str, Timing]]:
        """Return nothing: nothing is timed."""
        return {}

    @property
    def widths(self) -> int:
        """Many: each costs next to nothing."""
        return 48

    @property
    def vector(self) -> int:
        """One: each channel costs."""
        return 1

    def multiple(self, module: nn.Module) -> int:
        """Return 1: all ranks are worth a try."""
        return 1

    def shares(self, gm: fx.GraphModule, group: Group, counts: Sequence[int]) -> dict[int, float]:
        """Return the share of the channels."""
        return {count: count / group.channels for count in counts}

    def bias(self, module: nn.Module) -> float:
        """Return 0: what a layer costs goes with what it reads."""
        return 0.0


class Params(Computed):
    """Parameters, those of biases included."""

    def original(self, layer: Layer) -> float:
        """Return the number of parameters of the layer as it is."""
        return cost.params(layer.module)

    def priced(self, layer: Layer, forms: Sequence[Choice], fitted: bool) -> list[Choice] | Reason:
        """Return the forms with their numbers of parameters; fitted factors always have a bias."""
        module = as_layer(layer.module)
        _, c_out, groups = channels_per_group(module)
        added = c_out * groups if fitted or module.bias is not None else 0
        original = Choice(None, 0.0, self.original(layer))
        return [*_with_costs(forms, lambda ranks: parameters(module, ranks) + added), original]

    def between(self, gm: fx.GraphModule, group: Group) -> float:
        """Return the parameters that the modules between have for each channel."""
        modules = [gm.get_submodule(str(node.target)) for node in group.through]
        return sum(p.numel() for module in modules for p in module.parameters() if p.dim() and len(p) == group.channels)

    def bias(self, module: nn.Module) -> float:
        """Return the size of its bias."""
        bias = as_layer(module).bias
        return 0.0 if bias is None else bias.numel()

    def total(self, gm: fx.GraphModule, layers: float) -> float:
        """Return the model's number of parameters."""
        capture = captured_or_bare(gm)
        return cost.params(gm) + capture.added_params(gm) + capture.outside.params


class LayerParams(Params):
    """Parameters of the layers that may be changed, and of no other modules."""

    def between(self, gm: fx.GraphModule, group: Group) -> float:
        """Return 0: what is between layers does not count."""
        return 0.0

    def total(self, gm: fx.GraphModule, layers: float) -> float:
        """Return those of the layers."""
        return layers


class Flops(Computed):
    """FLOPs (2 × multiply-adds) for the example inputs."""

    def original(self, layer: Layer) -> float:
        """Return the FLOPs of all calls of the layer as it is."""
        return sum(flops(node, layer.module, None) for node in layer.calls)

    def priced(self, layer: Layer, forms: Sequence[Choice], fitted: bool) -> list[Choice] | Reason:
        """Return the forms with the FLOPs of all calls."""
        module = layer.module
        original = Choice(None, 0.0, self.original(layer))
        return [*_with_costs(forms, lambda ranks: sum(flops(node, module, ranks) for node in layer.calls)), original]

    def between(self, gm: fx.GraphModule, group: Group) -> float:
        """Return the FLOPs of the depthwise convs between."""
        modules = {str(node.target): gm.get_submodule(str(node.target)) for node in group.through}
        convs = {name: module for name, module in modules.items() if depthwise(module)}
        return sum(flops(node, module, None) for name, module in convs.items() for node in calls(gm, name))

    def total(self, gm: fx.GraphModule, layers: float) -> float:
        """Return the model's FLOPs. Raises FxlrdError if there are no shapes on the nodes."""
        total = cost.flops(gm) + captured_or_bare(gm).outside.flops
        if not total:
            raise FxlrdError("allocate: the model's FLOPs are not known: give example inputs")
        return total


@dataclass(frozen=True)
class Latency:
    """Seconds on this device. ``timings`` fills with those of the forms, by layer and ranks."""

    stopwatch: Stopwatch
    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)

    @property
    def widths(self) -> int:
        """Few: each is timed."""
        return 10

    @property
    def vector(self) -> int:
        """Sixteen in int8, as a vector of 512 bits holds sums of products; else one."""
        return 16 if self.stopwatch.under_inductor == "int8" else 1

    def multiple(self, module: nn.Module) -> int:
        """Return a hardware multiple: kernels work in vectors and tiles."""
        c_in, c_out, groups = channels_per_group(module)
        return max(16 if min(c_in, c_out) * groups >= 256 else 8, self.vector)

    def priced(self, layer: Layer, forms: Sequence[Choice], fitted: bool) -> list[Choice] | Reason:
        """Time the forms that no other beats in error and parameters, at most eight, and the original."""
        places = placed(layer.calls, layer.module)
        if isinstance(places, Reason):
            return places
        few = pareto(_with_costs(forms, lambda ranks: parameters(layer.module, ranks)), _TIMED)
        timings = time_ranks(places, [choice.ranks for choice in few if choice.ranks is not None], self.stopwatch)
        self.timings[layer.name] = timings
        seconds = timings[ORIGINAL].seconds
        return [
            *_with_costs(few, lambda ranks: seconds * timings[ranks_text(ranks)].ratio),
            Choice(None, 0.0, seconds),
        ]

    def between(self, gm: fx.GraphModule, group: Group) -> float:
        """Time the modules and functions between; 0 in int8, where they are part of the layers."""
        return 0.0 if self.stopwatch.under_inductor == "int8" else time_between(gm, group, self.stopwatch)

    def bias(self, module: nn.Module) -> float:
        """Return 0: a bias takes no time of its own."""
        return 0.0

    def shares(self, gm: fx.GraphModule, group: Group, counts: Sequence[int]) -> dict[int, float]:
        """Time the group's layers at each number of channels, and at all of them."""
        timings = time_group(gm, group, [group.channels, *counts], self.stopwatch)
        return {count: timings[str(count)].ratio / timings[str(group.channels)].ratio for count in counts}

    def total(self, gm: fx.GraphModule, layers: float) -> float:
        """Time the model, in seconds that compare with those of its layers. Raises FxlrdError if it is not captured."""
        capture = captured(gm)
        if capture is None:
            raise FxlrdError("allocate: a latency budget needs a captured model: fxlrd.capture(model, example_inputs)")
        return self.stopwatch.time_model(runnable(gm), capture.inputs, seconds=3.0).seconds

    def ratio(self, gm: fx.GraphModule, changed: fx.GraphModule) -> float:
        """Time the model as ``changed``, relative to what it was, side by side."""
        timings = time_models(
            {"before": runnable(gm), "after": runnable(changed)},
            captured_or_bare(gm).inputs,
            under_inductor=self.stopwatch.under_inductor,
            seconds=3.0,
            timer=self.stopwatch.timer,
        )
        return timings["after"].ratio


def measure_of(budget: Budget, stopwatch: Stopwatch) -> Measure:
    """Return the measure of a budget; ``stopwatch`` takes the times."""
    computed: dict[str, Measure] = {"params": Params(), "layers": LayerParams(), "flops": Flops()}
    return computed.get(budget.measure) or Latency(stopwatch)


def curve_of(layer: Layer) -> Curve:
    """Return the predicted errors of the layer's forms."""
    return Curve(layer.module, fit_of(layer))


def forms_of(layer: Layer, measure: Measure, curve: Curve | None) -> list[Choice] | Reason:
    """Return the layer's forms that no other beats in error and cost, cheapest first; the original is last.

    Without a curve the layer has its original form only. Returns a Reason where a cost cannot be determined.
    """
    candidates = [] if curve is None else candidate_ranks(layer.module, multiple=measure.multiple(layer.module))
    forms = [Choice(ranks, curve.error(ranks), 0.0) for ranks in candidates if curve is not None]
    priced = measure.priced(layer, forms, curve is not None and curve.fit is not None)
    if isinstance(priced, Reason):
        return priced
    *cheaper, original = priced
    return [*pareto(choice for choice in cheaper if choice.cost < original.cost), original]


def flops(node: fx.Node, module: nn.Module, ranks: Ranks | None) -> int:
    """Return the FLOPs of a layer's form (None: the original) in all calls that the node stands for.

    They are 2 × multiply-adds, for the shapes on the nodes.
    """
    weight = as_layer(module).weight
    made = times(node) * _positions(node, module)
    value = source(node)
    read = times(node) * _positions(value, module) if value is not None else made
    applied = read if isinstance(module, TRANSPOSED) else made  # where the kernel is
    if ranks is None:
        return 2 * applied * weight.numel()
    if form(module) == "svd":
        return 2 * applied * parameters(module, ranks)
    c_in, c_out, groups = channels_per_group(module)
    r1, r2 = ranks
    core = (r1 or c_in) * (r2 or c_out) * kernel_area(module)
    return 2 * groups * (read * c_in * (r1 or 0) + applied * core + made * c_out * (r2 or 0))


def _positions(node: fx.Node, module: nn.Module) -> int:
    """Return at how many positions, over the batch, the channels of the node's value are computed."""
    sizes = shape(node)
    if sizes is None:
        return 1
    axis = channel_axis(module, len(sizes))
    return math.prod(s for i, s in enumerate(sizes) if i != axis)


def _with_costs(forms: Iterable[Choice], cost_of: Callable[[Ranks], float]) -> list[Choice]:
    return [replace(choice, cost=cost_of(choice.ranks)) for choice in forms if choice.ranks is not None]
