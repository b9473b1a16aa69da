"""Empty layers into the architecture, where a checkpoint says so."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from fxlrd.errors import FxlrdError
from fxlrd.graph.attentions import open_for
from fxlrd.graph.regions import set_modules
from fxlrd.saving.geometry import check_geometry
from fxlrd.saving.schema import Factors, LayerSpec, Narrowed
from fxlrd.saving.specs import module_of
from fxlrd.saving.tensors import registered

REMEDY = "give the architecture that was compressed"


def put_layers(
    folder: Path, layers: Mapping[str, LayerSpec | Factors | Narrowed], described: Collection[str], target: nn.Module
) -> dict[str, torch.device]:
    """Put empty layers into the architecture, and return the devices of those that they replace, by name."""
    closed = open_for(target, layers)
    modules = dict(target.named_modules(remove_duplicate=False))
    for name in layers:
        if not name or name not in modules:
            raise FxlrdError(f"load: {folder}: the model has no module {name[:80]!r}: {REMEDY}")
    check_geometry(folder, layers, modules)
    new = {name: module_of(name, spec, modules[name]) for name, spec in layers.items()}
    replaced = closed | set_modules(target, new, described)
    return {name: tensor.device for name, old in replaced.items() for tensor in registered(old).values()}
