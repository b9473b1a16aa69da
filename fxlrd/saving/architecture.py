"""What a compressed model was made from: determined by `compress`, carried by the model until it is saved.

A checkpoint describes the original model, so that it can be loaded without the original's weights. What became of the
original's modules is not part of that: it is read from the compressed model when that is saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import fx, nn

from fxlrd.capturing.tracing import constants
from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.captured import captured
from fxlrd.graph.compare import difference, rounding
from fxlrd.graph.copies import structural_copy
from fxlrd.graph.facts import FACTORS
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.padding import remove_padding
from fxlrd.graph.regions import install_layers
from fxlrd.graph.run import run
from fxlrd.graph.surgery import called, fork
from fxlrd.layers.absorbed import IDENTITIES
from fxlrd.layers.described import DescribedFactors
from fxlrd.layers.kinds import LAYERS
from fxlrd.saving.descriptions import descriptions
from fxlrd.saving.padding import pads_of
from fxlrd.saving.schema import Origin

_KEY = "_fxlrd"


def remember(model: nn.Module, origin: Origin) -> None:
    """Leave on a model what it was made from: as plain data, so that it unpickles where fxlrd is not installed."""
    data = json.loads(json.dumps(origin.to_json()))
    if isinstance(model, fx.GraphModule):
        model.meta[_KEY] = data  # survives deepcopy; the attribute survives pickle
    setattr(model, _KEY, data)


def recall(model: nn.Module) -> Origin | None:
    """Return what a model was made from, or None for one that `compress` or `load` did not make."""
    data = model.meta.get(_KEY) if isinstance(model, fx.GraphModule) else None
    try:
        return Origin.from_json(vars(model).get(_KEY) if data is None else data)
    except FxlrdError:
        return None


def original_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights in the original of a compressed model, by module; for another model, none."""
    origin = recall(model)
    if origin is None:
        return {}
    # The weight of a Conv1D, GPT-2's, is transposed.
    modules = {name: module for name, module in origin.modules.items() if module.kind != "Conv1D"}
    return {name: shape for name, module in modules.items() if (shape := module.shapes.get("weight"))}


def origin_of(
    model: nn.Module,
    original: nn.Module,
    replaced: Mapping[str, nn.Module],
    arguments: Mapping[str, Any] | None = None,
) -> Origin:
    """Return what ``model`` was made from: ``original``, in which other modules took the place of ``replaced``.

    Where the original was compressed already, that is what the original was made from.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    gone = {n for n, m in replaced.items() if type(modules[n]) in IDENTITIES and type(m) not in IDENTITIES}
    described = {name for name in replaced if isinstance(modules[name], DescribedFactors)}
    before = recall(original)
    if before is None:
        first_names = dict(model.named_modules())  # one name of each module, as graphs have it
        modules_before = descriptions(model, {name: m for name, m in replaced.items() if name in first_names})
        return Origin(modules_before, tuple(sorted(gone)), arguments, None, tuple(sorted(described)))
    gone -= {name for name in gone if _is_factor(name, before)}
    if before.arguments is not None or arguments is not None:
        arguments = {**(before.arguments or {}), **(arguments or {})}
    gone, described = {*before.gone, *gone}, {*before.described, *described}
    return replace(before, gone=tuple(sorted(gone)), arguments=arguments, described=tuple(sorted(described)))


def _is_factor(name: str, origin: Origin) -> bool:
    layer, _, role = name.rpartition(".")
    return role in FACTORS and layer in origin.modules


def origin_of_graph(model: nn.Module, original: fx.GraphModule, gm: fx.GraphModule) -> Origin:
    """Return what the graph ``gm`` was made from: ``model``, captured as ``original``.

    The new layers are put into a copy of the user's model. If that computes what the graph does, with no tensor that
    the graph does not have, the user's own class loads the checkpoint. Otherwise (it asks a layer for its type, or
    calls what the graph dropped) they are put into the graph as it was captured, and that loads it.
    """
    capture = captured(original)
    assert capture is not None
    inputs = capture.inputs
    was = called(original)
    model = wrapped(model)
    try:
        target = structural_copy(model)
        replaced = install_layers(target, gm, was, capture.described)
        in_graph = {id(t) for t in chain(gm.parameters(), gm.buffers())}
        dropped = any(id(t) not in in_graph for t in chain(target.parameters(), target.buffers()))
        now = called(gm)
        padded = {n: pads_of(p) for n, p in capture.padded.items() if now.get(n) is not capture.alike[n]}
        if not dropped and not padded and _same_outputs(target, gm, inputs):
            return origin_of(target, model, replaced)
        origin = origin_of(target, model, replaced, constants(model, inputs))
        origin = replace(origin, padded={**origin.padded, **padded})
        graph = fork(original)
        for name in capture.padded.keys() - padded.keys():
            graph.set_submodule(name, capture.alike[name])
            remove_padding(graph, name)
        graph.recompile()
        install_layers(graph, gm, was)
        if _same_outputs(graph, gm, inputs):
            return origin
        return replace(origin, refused="a pass changed the graph in more than its layers, which no names tell")
    except FxlrdError as error:
        return Origin({}, (), None, source=None, refused=one_line(error))


def wrapped(model: nn.Module) -> nn.Module:
    """Return the model; a bare layer in a Sequential, as it is captured."""
    return nn.Sequential(model).train(model.training) if isinstance(model, LAYERS) else model


def _same_outputs(model: nn.Module, gm: fx.GraphModule, inputs: Inputs) -> bool:
    """Whether outputs are bit-equal or, on a device where two runs of one graph differ, equal up to rounding."""
    try:
        outputs, wanted = tensors(run(model, inputs)), tensors(run(gm, inputs))
        error = difference(outputs, wanted, "saving")
        if error.max_abs == 0:
            return True
        again = difference(tensors(run(gm, inputs)), wanted, "saving")
        return again.max_abs > 0 and error.relative <= rounding(wanted)
    except FxlrdError:
        return False
