"""A plan for the model: the ranks of each layer and the number of channels that each group retains.

`allocate` leaves it on the graph module, `decompose` and `merge` carry it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from fxlrd.graph.captured import refresh_shapes
from fxlrd.graph.channels import Group
from fxlrd.graph.facts import Fact
from fxlrd.graph.surgery import fork, layers, replace
from fxlrd.layers.build import skeleton
from fxlrd.layers.compose import keep_channels
from fxlrd.layers.forms import Ranks
from fxlrd.layers.kinds import as_layer, channels_per_group, kernel_area
from fxlrd.layers.weights import resized


@dataclass(frozen=True)
class Plan:
    """What `allocate` chose.

    Attributes:
        ranks: by layer; a layer that is missing stays as it is.
        retained: the number of channels that a merged group retains, by the group's first producer.
        predicted: the relative error of the model's output, where all layers' effects on it were measured.
        channels: which channels those are (ascending), where they are known.
    """

    ranks: Mapping[str, Ranks] = field(default_factory=dict)
    retained: Mapping[str, int] = field(default_factory=dict)
    predicted: float | None = field(default=None, compare=False)
    channels: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)


planned = Fact("plan", Plan)
"""The plan that `allocate` has left on a graph module."""


def sketch(gm: fx.GraphModule, plan: Plan, groups: Mapping[str, Group]) -> fx.GraphModule:
    """Return the model that the plan gives, with arbitrary weights: for timing.

    ``groups`` has those that the plan merges, by the same names. Weights average their inputs, so that activations
    neither vanish nor overflow.
    """
    gm = fork(gm)
    changed = {}
    for first, count in plan.retained.items():
        group = groups[first]
        for producer in group.producers:
            name = str(producer.node.target)
            weight = as_layer(gm.get_submodule(name)).weight
            changed[name] = _swap(gm, name, weight.new_empty(count * producer.parts, *weight.shape[1:]))
        for node in group.through:
            module = gm.get_submodule(str(node.target))
            gm.set_submodule(str(node.target), keep_channels(module, torch.arange(count), group.channels).eval())
        for consumer in group.consumers:
            name = str(consumer.node.target)
            weight = as_layer(gm.get_submodule(name)).weight
            shape = (len(weight), count * consumer.block, *weight.shape[2:])
            changed[name] = _swap(gm, name, weight.new_empty(shape))
    for name, module in layers(gm).items():
        if name in plan.ranks:
            parts = skeleton(module, plan.ranks[name])
            replace(gm, name, parts, plan.ranks[name])
            changed.update({f"{name}.{role}": part for role, part in parts.named_children()})
    with torch.no_grad():
        for module in changed.values():
            as_layer(module).weight.fill_(1 / (channels_per_group(module)[0] * kernel_area(module)))
    gm.graph.lint()
    gm.recompile()
    refresh_shapes(gm)
    return gm


def _swap(gm: fx.GraphModule, name: str, weight: Tensor) -> nn.Module:
    module = gm.get_submodule(name)
    bias = None if as_layer(module).bias is None else weight.new_zeros(len(weight))
    new = resized(module, weight, bias).eval()
    gm.set_submodule(name, new)
    return new
