"""A model of transformers before its weights are read, and after: with the layers of a plan in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxlrd.errors import FxlrdError
from fxlrd.saving.architecture import remember
from fxlrd.saving.descriptions import descriptions
from fxlrd.saving.pretrained import PretrainedPlan, save_all_of
from fxlrd.saving.replacing import put_layers
from fxlrd.saving.schema import ModuleDescription, Origin

_READ = "_is_hf_initialized"
"""Attribute of tensors that transformers has read: initialisation passes them by."""


@dataclass
class Prepared:
    """What a model without weights was before the plan's layers were put into it, and those parts that got no weights.

    Attributes:
        folder: where its weights are read.
        was: its modules.
        layers: the names of the modules in the plan's layers, by identity.
        anew: the names of those that transformers has initialised since.
    """

    folder: Path
    was: dict[str, ModuleDescription]
    layers: dict[int, str]
    anew: list[str]


def prepare(folder: Path, plan: PretrainedPlan, model: Any) -> Prepared:
    """Put the plan's layers, empty, into a model without weights."""
    for name in plan.absent:  # made with an argument beside its config, such as add_pooling_layer=False
        if name in model._modules:
            setattr(model, name, None)
    was = descriptions(model)
    put_layers(folder, plan.layers, plan.described, model)
    parts = [(name, model.get_submodule(name)) for name in plan.layers]
    layers = {id(part): f"{name}.{own}".rstrip(".") for name, module in parts for own, part in module.named_modules()}
    prepared = Prepared(folder, was, layers, [])
    for module in model.modules():
        if hasattr(module, "_init_weights"):
            module._init_weights = functools.partial(_initialise, module._init_weights, prepared)
    return prepared


def finish(model: nn.Module, plan: PretrainedPlan, prepared: Prepared) -> None:
    """Let a model that `prepare` was called with, and whose weights were read since, be saved as it was.

    Raises FxlrdError where some of the plan's layers were initialised instead.
    """
    for module in model.modules():
        vars(module).pop("_init_weights", None)
    if prepared.anew:
        raise FxlrdError(
            f"from_pretrained: {prepared.folder} has not the tensors of {prepared.anew[0][:80]}: save the model again"
        )
    remember(model, Origin(prepared.was, plan.gone, None, None, plan.described))
    save_all_of(model)


def _initialise(initialise: Callable[[nn.Module], None], prepared: Prepared, module: nn.Module) -> None:
    """Initialise a module: what its tensors in no file need. Those of a block may be read by their names, as in T5."""
    own = module.parameters(recurse=False)
    if id(module) in prepared.layers and not all(getattr(p, _READ, False) for p in own):
        prepared.anew.append(prepared.layers[id(module)])
    try:
        initialise(module)
    except (AttributeError, FxlrdError):
        if prepared.layers.keys().isdisjoint(map(id, module.modules())):
            raise
