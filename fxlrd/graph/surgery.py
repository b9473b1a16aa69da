"""Surgery on FX graphs: non-destructive copies, replacement of a layer by its factors."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from fxlrd.errors import FxlrdError
from fxlrd.graph.facts import FACTORS, Provenance, inherited, output_moments, provenance, tensor_meta
from fxlrd.layers.kinds import LAYERS

_RESERVED = frozenset(dir(fx.GraphModule)) | frozenset(vars(fx.GraphModule({}, fx.Graph())))
"""Attributes that a GraphModule has of its own, on its class or on itself."""


def is_reserved(target: str) -> bool:
    """Whether a GraphModule cannot have a module or tensor of that name: it has an attribute of its own there."""
    return target.split(".")[0] in _RESERVED


def annotate(gm: fx.GraphModule) -> None:
    """Give each module call that has no provenance one that names it as original."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    for node in gm.graph.nodes:
        if node.op == "call_module" and provenance(node) is None:
            provenance.record(node, Provenance(str(node.target), original=modules[str(node.target)]))


def fork(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph module with a graph of its own that shares every leaf module with ``gm``.

    Replacing a module in the fork leaves ``gm`` as it was.
    """
    if not isinstance(gm, fx.GraphModule):
        raise FxlrdError(f"a {type(gm).__name__} is not captured yet: fxlrd.capture(model, example_inputs)")
    new = fx.GraphModule(gm, copy.deepcopy(gm.graph), class_name=type(gm).__name__)
    new.meta.update(gm.meta)
    set_container_mode(new, gm.training)
    for name in {p.name for n in new.graph.nodes if (p := provenance(n)) is not None and p.role in FACTORS}:
        parts = new.get_submodule(name)
        new.set_submodule(name, chained(parts).train(parts.training))
    return new


def chained(parts: nn.Module) -> nn.Module:
    """Return a layer's factors as a module that can be called as the layer: torch.fx makes bare containers."""
    return nn.Sequential(OrderedDict(parts.named_children())) if type(parts) is nn.Module else parts


def set_container_mode(gm: fx.GraphModule, training: bool) -> None:
    """Set the mode of the bare modules that torch.fx makes as containers, and of the graph module itself."""
    gm.training = training
    for module in gm.modules():
        if type(module) is nn.Module:
            module.training = training


def called(gm: fx.GraphModule) -> dict[str, nn.Module]:
    """Return the modules that the graph calls, by target, in graph order."""
    targets = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
    return {target: gm.get_submodule(target) for target in targets}


def calls(gm: fx.GraphModule, target: str) -> list[fx.Node]:
    """Return the nodes that call the module ``target``, in graph order."""
    return list(gm.graph.find_nodes(op="call_module", target=target))


def attribute(model: nn.Module, target: str) -> Any:
    """Return the module, tensor or other value that a dotted name stands for."""
    return functools.reduce(getattr, target.split("."), model)


def source(node: fx.Node) -> fx.Node | None:
    """Return the one tensor input of a layer's call, or None if it is called in another way."""
    arguments = [*node.args, *node.kwargs.values()]
    if len(arguments) == 1 and isinstance(arguments[0], fx.Node) and set(node.kwargs) <= {"input", "x"}:
        return arguments[0]
    return None


def layers(gm: fx.GraphModule) -> dict[str, nn.Module]:
    """Return the conv and linear modules that the graph calls, subclasses included, by target."""
    return {target: m for target, m in called(gm).items() if isinstance(m, LAYERS)}


def replace(
    gm: fx.GraphModule, target: str, module: nn.Sequential, ranks: tuple[int | None, ...], **details: Any
) -> None:
    """Replace every call of layer ``target`` by calls of the named children of ``module``, in order.

    The children become ``target.<child>``, each with the child's name as its role. ``details`` go into
    the provenance. The graph module is changed in place and not yet recompiled.
    """
    replaced = gm.get_submodule(target)
    gm.set_submodule(target, module)
    for node in calls(gm, target):
        old = provenance(node)
        value = source(node)
        assert value is not None, f"{target} is not replaceable"
        moments = output_moments(node)
        with gm.graph.inserting_before(node):
            for role, part in module.named_children():
                value = gm.graph.call_module(f"{target}.{role}", (value,))
                value.meta = inherited(node)
                provenance.record(
                    value,
                    Provenance(
                        old.name if old else target,
                        role,
                        ranks,
                        original=old.original if old else replaced,
                        **details,
                    ),
                )
                infer_shape(value, part)
        if moments is not None:  # those of the layer's output, which the last factor makes now
            output_moments.record(value, moments)
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)


def restore(gm: fx.GraphModule, name: str, latency: float | None = None) -> None:
    """Put the original layer ``name`` back in the place of its factors, at every call."""
    parts = [n for n in gm.graph.nodes if (p := provenance(n)) is not None and p.name == name]
    inside = set(parts)
    for last in [n for n in parts if not any(user in inside for user in n.users)]:
        chain = [last]
        while (before := source(chain[-1])) in inside and before is not None:
            chain.append(before)
        p = provenance(last)
        assert p is not None
        assert p.original is not None, f"{name}: the original layer is not known"
        gm.set_submodule(name, p.original)
        start = source(chain[-1])
        with gm.graph.inserting_before(last):
            node = gm.graph.call_module(name, (start,))
        node.meta = {k: v for k, v in last.meta.items() if k != "flops"}
        provenance.record(node, Provenance(name, original=p.original, latency=latency))
        last.replace_all_uses_with(node)
        for old in chain:
            gm.graph.erase_node(old)


def infer_shape(node: fx.Node, module: nn.Module) -> None:
    """Give the node of a layer's call its shape and dtype from those of its input, without computing."""
    read = tensor_meta(node.all_input_nodes[0])
    if read is None:
        return
    stand_in = torch.empty_strided(read.shape, read.stride, dtype=read.dtype, device="meta")
    weights = {name: t.to("meta") for name, t in module.state_dict().items()}
    with torch.no_grad():
        node.meta["tensor_meta"] = _extract_tensor_metadata(torch.func.functional_call(module, weights, (stand_in,)))
