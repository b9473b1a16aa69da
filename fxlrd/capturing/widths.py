"""Which channels the code of a model counts on: it would fail, or compute something else, if there were fewer.

A trace of a region does not run in its model; the user's forward does, around whatever layers are put there. So it is
tried, with half of the channels of every group. The model with narrower layers must do what the model does whose
consumers have zeros for the channels that are missing: that holds exactly, up to rounding. It is tried on other inputs
than the example, on one row of that and on more, and in training mode with gradients: a forward may take other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx, nn

from fxlrd.capturing.proof import Original, same
from fxlrd.graph.channels import Group, group_of
from fxlrd.graph.copies import aliasing_copy, independent_copy, structural_copy
from fxlrd.graph.guards import why_not_replaceable
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.regions import set_modules
from fxlrd.graph.run import called_on, run, training_unasked
from fxlrd.graph.surgery import calls, layers
from fxlrd.graph.writes import guarding_weights
from fxlrd.layers.compose import keep_channels, keep_inputs, keep_outputs
from fxlrd.layers.kinds import as_layer
from fxlrd.layers.weights import resized

Way = Callable[[Original, Mapping[str, nn.Module]], list[Tensor]]
"""Calls a model with other modules, by name, and returns what it made."""
_TIMES = 4
"""Copies of the example's rows that make a larger batch."""
_MANY = 2**24
"""Numbers that a model makes from which on a larger batch has one row more, or it would take long and much memory."""
_FEW = 2
"""Rows that a model is trained with: BatchNorm does not take fewer."""
_TRIALS = 24
"""Trials of a model, at most: where outputs hang on choices between near-equals, as boxes do, all might fail."""


def fixed_widths(original: Original, gm: fx.GraphModule) -> frozenset[str]:
    """Return the layers of the regions ``gm`` whose number of outputs the code of the model counts on."""
    inner = groups_of(gm)
    makers = {producer.node for group in inner for producer in group.producers}
    streams = [group for group in groups_of(gm, sums=True) if makers.isdisjoint(p.node for p in group.producers)]
    failing = [*_failing(original, gm, inner), *_failing(original, gm, streams)]
    return frozenset(str(producer.node.target) for group in failing for producer in group.producers)


def groups_of(gm: fx.GraphModule, sums: bool = False) -> list[Group]:
    """Return the groups of channels of a graph, each once; with ``sums``, those of residual streams too."""
    reasons = why_not_replaceable(gm, norms=True)
    groups: list[Group] = []
    producers: set[str] = set()
    for name in layers(gm):
        group = None if name in producers else group_of(gm, calls(gm, name)[0], reasons, sums)
        if not isinstance(group, Group):
            continue
        names = {str(producer.node.target) for producer in group.producers}
        if names.isdisjoint(producers):  # a depthwise conv has the group of the layer that feeds it
            groups.append(group)
            producers |= names
    return groups


def _failing(original: Original, gm: fx.GraphModule, groups: Sequence[Group]) -> list[Group]:
    """Return the groups that cannot be cut, by halving; those that are in doubt after so many trials too."""
    failing: list[Group] = []
    waiting, trials = [[*groups]] if groups else [], 0
    while waiting:
        some = waiting.pop()
        trials += 1
        if trials > _TRIALS:
            failing += some
        elif not _narrows(original, gm, some):
            half = len(some) // 2
            failing += some if not half else []
            waiting += [some[:half], some[half:]] if half else []
    return failing


def _narrows(original: Original, gm: fx.GraphModule, groups: Sequence[Group]) -> bool:
    """Whether the model does with narrower layers what it does with zeros in their place."""
    halves = [(group, _half(group, seed=i)) for i, group in enumerate(groups)]
    sizes = original.inputs.first_rows(), _larger(original)
    ways: list[Way] = [_as_called, *(partial(_on, inputs=each) for each in sizes if each is not None)]
    zeros, narrow = _Changes(gm), _Changes(gm)
    for group, retained in halves:
        zeros.zero(group, retained)
    expected = [_outcome(way, original, zeros.modules) for way in ways]
    shapes = _outcome(_shapes_in_training, original, zeros.modules)
    zeros.modules = {}  # each have up to half of all weights
    for group, retained in halves:
        narrow.cut(group, retained)
    if not all(_alike(*each, original, narrow.modules) for each in zip(ways, expected, strict=True)):
        return False
    return _alike(_in_training, shapes, original, narrow.modules) or _never_trains(original, gm, halves)


def _never_trains(original: Original, gm: fx.GraphModule, halves: Sequence[tuple[Group, Tensor]]) -> bool:
    """Whether the model fails in a backward pass anyway, so that training says nothing of narrower layers."""
    zeros = _Changes(gm)
    for group, retained in halves:
        zeros.zero(group, retained)
    return _outcome(_in_training, original, zeros.modules) is None


def _larger(original: Original) -> Inputs | None:
    many = sum(t.numel() for t in original.behaviour.outputs) > _MANY
    return original.inputs.enlarged(more=1) if many else original.inputs.enlarged(_TIMES)


def _half(group: Group, seed: int) -> Tensor:
    """Return half of the group's channels (ascending), at random."""
    order = torch.randperm(group.channels, generator=torch.Generator().manual_seed(seed))
    return order[: (group.channels + 1) // 2].sort().values


def _outcome(way: Way, original: Original, modules: Mapping[str, nn.Module]) -> list[Tensor] | None:
    """Return what the model makes with other modules; None if it does not run in this way."""
    try:
        return way(original, modules)
    except Exception:
        return None


def _alike(way: Way, expected: list[Tensor] | None, original: Original, narrow: Mapping[str, nn.Module]) -> bool:
    """Whether the model with narrow modules gives what is expected in a way of calling it that it can be called in."""
    if expected is None:
        return way is not _as_called
    outputs = _outcome(way, original, narrow)  # None: whatever the model's code says of fewer channels
    return outputs is not None and same(outputs, expected)


def _as_called(original: Original, modules: Mapping[str, nn.Module]) -> list[Tensor]:
    return _on(original, modules, original.other)


def _on(original: Original, modules: Mapping[str, nn.Module], inputs: Inputs) -> list[Tensor]:
    return tensors(run(_with(structural_copy(original.model), modules), inputs))


def _shapes_in_training(original: Original, modules: Mapping[str, nn.Module]) -> list[Tensor]:
    """Return the shapes of the outputs in training mode: values depend on what dropout draws."""
    return _training(original, modules, backward=_no_backward)


def _in_training(original: Original, modules: Mapping[str, nn.Module]) -> list[Tensor]:
    """`_shapes_in_training`, after a backward pass."""
    return _training(original, modules, backward=torch.autograd.backward)


def _no_backward(_: Sequence[Tensor]) -> None:
    """Do nothing."""


def _training(
    original: Original, modules: Mapping[str, nn.Module], backward: Callable[[Sequence[Tensor]], None]
) -> list[Tensor]:
    model, inputs = _with(aliasing_copy(original.model), modules), original.inputs.first_rows(_FEW) or original.inputs
    try:
        with guarding_weights(model) as guard:
            return _trained(model, inputs, backward)
    except Exception:
        if guard.written is None:
            raise
    return _trained(_with(independent_copy(original.model), modules), inputs, backward)


def _trained(model: nn.Module, inputs: Inputs, backward: Callable[[Sequence[Tensor]], None]) -> list[Tensor]:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_leaf:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # together they are as large as the model
    with training_unasked(model):
        outputs = tensors(called_on(model, inputs))
        sums = [t.sum() for t in outputs if t.requires_grad]
        if sums:
            backward(sums)
    return [torch.tensor(t.shape) for t in outputs]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _with(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    set_modules(model, modules)
    return model


class _Changes:
    """Modules that take the place of a graph's, by name; groups may share some."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.modules: dict[str, nn.Module] = {}

    def zero(self, group: Group, retained: Tensor) -> None:
        for consumer in group.consumers:
            module = as_layer(self._now(consumer.node))
            mask = module.weight.new_zeros(group.channels)
            mask[retained] = 1
            by_channel = module.weight.detach().unflatten(1, (-1, consumer.block))
            weight = by_channel * mask.view(-1, *[1] * (by_channel.dim() - 2))
            self._put(consumer.node, resized(module, weight.flatten(1, 2), module.bias))

    def cut(self, group: Group, retained: Tensor) -> None:
        retained = retained.to(self._device(group))
        for consumer in group.consumers:
            self._put(consumer.node, keep_inputs(self._now(consumer.node), retained, consumer.block))
        for node in group.through:
            self._put(node, keep_channels(self._now(node), retained, group.channels))
        for producer in group.producers:
            rows = producer.rows(retained, group.channels)
            self._put(producer.node, keep_outputs(self._now(producer.node), rows))

    def _now(self, node: fx.Node) -> nn.Module:
        name = str(node.target)
        return self.modules.get(name) or self.gm.get_submodule(name)

    def _put(self, node: fx.Node, module: nn.Module) -> None:
        self.modules[str(node.target)] = module

    def _device(self, group: Group) -> torch.device:
        return next(self._now(group.producers[0].node).parameters()).device
