"""Stock layers in a graph, in the place of modules that compute what they do.

Some do so with the very parameters of the module (`fxlrd.layers.stand_ins`); they are put in before a capture proves
itself. Others with a weight that is computed from these once, or behind a padding (`fxlrd.layers.folded`): gradients do
not reach the module's parameters then, so they are put in after the proof, and compared in value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxlrd.capturing.proof import Original
from fxlrd.errors import Reason
from fxlrd.graph.captured import feed, propagate_once
from fxlrd.graph.guards import MORE_INPUTS, added, owners, pads_itself, shared_parameter
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.padding import insert_padding
from fxlrd.graph.surgery import called, calls, fork, source
from fxlrd.layers.folded import Folded, fold
from fxlrd.layers.padding import Padding
from fxlrd.layers.stand_ins import stand_in


def put_stand_ins(gm: fx.GraphModule) -> dict[str, nn.Module]:
    """Put stock layers in the place of the modules that compute what these do; return the modules, by name."""
    names_of = owners(gm)
    replaced = {}
    for name, module in called(gm).items():
        layer = stand_in(module)
        if layer is not None and layer is not module and why_not_alike(gm, name, module, names_of) is None:
            gm.set_submodule(name, layer)
            replaced[name] = module
    return replaced


def why_not_alike(
    gm: fx.GraphModule, name: str, module: nn.Module, names_of: Mapping[int, Sequence[str]]
) -> Reason | None:
    """Return why no stock layer may stand in for a module that computes what one does."""
    if (reason := added(module)) is not None:
        return reason
    for key, parameter in module.named_parameters():
        others = [other for other in names_of[id(parameter)] if not other.startswith(f"{name}.")]
        if others:
            return shared_parameter(key, others[0])
    if any(str(node.target).startswith(f"{name}.") for node in gm.graph.find_nodes(op="get_attr")):
        return Reason("read-directly", "its weight is read directly as well")
    if any(source(node) is None for node in calls(gm, name)):
        return MORE_INPUTS
    return pads_itself(module)


@dataclass(frozen=True)
class Folding:
    """A graph with folded layers in it.

    Attributes:
        modules: the modules in whose place they are, by name.
        padded: the paddings before them, by the layer's name.
    """

    graph_module: fx.GraphModule
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    padded: Mapping[str, Padding] = field(default_factory=dict)


def fold_layers(gm: fx.GraphModule, original: Original, for_users_forward: bool) -> Folding:
    """Return the graph with folded layers; as it is if it would give other outputs with them.

    For layers that go back into the user's forward there is no padding before them.
    """
    folds = _folds(gm, for_users_forward)
    if not folds:
        return Folding(gm)
    folded = fork(gm)
    for name, each in folds.items():
        folded.set_submodule(name, each.layer)
        if each.padding is not None:
            insert_padding(folded, name, each.padding)
    folded.recompile()
    if original.difference_in_values(folded, _call, on_example=propagate_once, seed=1) is not None:
        return Folding(gm)
    modules = called(gm)
    padded = {name: each.padding for name, each in folds.items() if each.padding is not None}
    return Folding(folded, {name: modules[name] for name in folds}, padded)


def _folds(gm: fx.GraphModule, for_users_forward: bool) -> dict[str, Folded]:
    names_of = owners(gm)
    folds = {}
    for name, module in called(gm).items():
        folded = fold(module)
        if folded is None or (for_users_forward and folded.padding is not None):
            continue
        reason = why_not_alike(gm, name, module, names_of)
        if reason is None or reason.code == "pads-itself":
            folds[name] = folded
    return folds


def _call(gm: fx.GraphModule, inputs: Inputs) -> Any:
    return gm.forward(*feed(gm, inputs))
