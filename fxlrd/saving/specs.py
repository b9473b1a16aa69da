"""A layer, or the factors in its place, into a spec of a plan and back."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.facts import FACTORS
from fxlrd.graph.surgery import chained
from fxlrd.layers.kinds import OPTIONS, make, options
from fxlrd.layers.narrow import channels_left, narrowed
from fxlrd.layers.readable import is_container
from fxlrd.saving.descriptions import description
from fxlrd.saving.schema import KINDS, Factors, LayerSpec, ModuleDescription, Narrowed


def spec_of(name: str, module: nn.Module, was: ModuleDescription | None = None) -> LayerSpec | Factors | Narrowed:
    """Return class and options of the module ``name``, or those of the factors that it holds.

    ``was`` describes the module in whose place it is: one of the same class may have fewer channels.
    """
    module = chained(module)
    if was is not None and type(module) not in OPTIONS and type(module).__name__ == was.kind:
        counts = channels_left(module, was.shapes)
        if counts is not None:
            return Narrowed(*counts)
    if not is_container(module) or not set(module._modules) <= set(FACTORS):
        return _layer_spec(name, module)
    if extra := description(module).shapes:
        raise FxlrdError(f"save: {name}: {', '.join(extra)} beside its factors: load makes no layer with that")
    return Factors(tuple((role, _layer_spec(f"{name}.{role}", part)) for role, part in module.named_children()))


def _layer_spec(name: str, module: nn.Module) -> LayerSpec:
    if type(module) not in OPTIONS:
        raise FxlrdError(f"save: {name}: a {type(module).__name__} has taken the place of what was compressed")
    spec = LayerSpec(type(module).__name__, options(module))
    if description(_made(name, spec)) != description(module):
        raise FxlrdError(f"save: {name}: this {type(module).__name__} is no longer what its options say")
    return spec


def module_of(name: str, spec: LayerSpec | Factors | Narrowed, was: nn.Module) -> nn.Module:
    """Return the module ``name``, or its factors in order, without weights: on the meta device.

    ``was`` is the module in whose place it will be.
    """
    if isinstance(spec, LayerSpec):
        return _made(name, spec)
    if isinstance(spec, Narrowed):
        new = narrowed(was, torch.arange(min(spec.channels, spec.of)), spec.of)
        if new is None:
            raise FxlrdError(f"load: {name} has no {spec.of} channels: the plan is damaged")
        return new
    return nn.Sequential(OrderedDict((role, _made(f"{name}.{role}", part)) for role, part in spec.parts))


def _made(name: str, spec: LayerSpec) -> nn.Module:
    try:
        return make(KINDS[spec.kind], spec.options)
    except Exception as error:
        raise FxlrdError(f"load: {name} cannot be made: {one_line(error)}: the plan is damaged") from error
