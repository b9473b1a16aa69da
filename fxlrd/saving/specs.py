"""A layer, or the factors in its place, into a spec of a plan and back."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.facts import FACTORS
from fxlrd.graph.surgery import chained
from fxlrd.layers.described import DescribedFactors
from fxlrd.layers.kinds import OPTIONS, make, options
from fxlrd.saving.descriptions import description
from fxlrd.saving.schema import KINDS, Factors, LayerSpec


def spec_of(name: str, module: nn.Module) -> LayerSpec | Factors:
    """Return class and options of the module ``name``, or those of the factors that it holds."""
    module = chained(module)
    if type(module) not in (nn.Sequential, DescribedFactors) or not set(module._modules) <= set(FACTORS):
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


def module_of(name: str, spec: LayerSpec | Factors) -> nn.Module:
    """Return the module ``name``, or its factors in order, without weights: on the meta device."""
    if isinstance(spec, LayerSpec):
        return _made(name, spec)
    return nn.Sequential(OrderedDict((role, _made(f"{name}.{role}", part)) for role, part in spec.parts))


def _made(name: str, spec: LayerSpec) -> nn.Module:
    try:
        return make(KINDS[spec.kind], spec.options)
    except Exception as error:
        raise FxlrdError(f"load: {name} cannot be made: {one_line(error)}: the plan is damaged") from error
