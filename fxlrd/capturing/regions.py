"""Capture of a model that cannot be traced as a whole: its largest regions that can, side by side in one graph.

The model is run once on its example inputs, and watched: which modules are called, with what, and which layers have
their weights read by others. A submodule is a region if

    - every call gave each argument of its forward a tensor, so that its trace freezes nothing;
    - its trace is the same in training mode, it calls what has weights as often as was seen, and no one else does;
    - the trace gives what the submodule gave, on all that it was called with.

Where no such submodule is around a conv or linear, that layer is a region of its own. Once more the model is run with
each layer inside another module, as its factors will be: what asks for a layer's type or parts is found so, and those
layers are left alone. What passes make of the others goes back into a copy of the model (fxlrd/graph/regions.py), whose
forward stays the user's: no control flow is frozen, the traces serve to find and to check what is rewritten.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.capturing.watch import _has_weights, _same, _stand_in, _Watch, is_layer, kept_whole
from fxlrd.capturing.whole import check_weights, trace, train_path_differs
from fxlrd.errors import CaptureError, Reason
from fxlrd.graph import cost
from fxlrd.graph.captured import Regions, captured, propagate
from fxlrd.graph.cost import Cost
from fxlrd.graph.facts import record_times
from fxlrd.graph.guards import hooked
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.regions import Call, Slot, copies, record, structural_copy
from fxlrd.graph.run import evaluating
from fxlrd.graph.surgery import annotate, attribute

SHAPES = 4
"""Calls of one region that stand in the graph: one for each set of argument shapes, up to so many."""
UNLIKE = Reason(
    "unlike-alone", "it gives something else alone than in the model: is its forward wrapped, or under autocast?"
)
ASKED = Reason(
    "asked-for",
    "the model does something else once another module stands in its place: is its type or its weight asked for?",
)


def capture_regions(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Return the model's regions as one GraphModule, with shapes, FLOPs and provenance on its nodes.

    Its layers have the names that they have in the model. Its inputs are the model's own: what the regions are given
    is recorded while the model runs. The model itself is not changed. Raises FxlrdError for example inputs that
    the model fails on and weights that are not finite, CaptureError where no layer is called.
    """
    inputs = Inputs.of(example_inputs)
    check_weights(model)
    watch = _Watch(model, inputs)
    copy = structural_copy(model)
    found, calls = _regions(copy, inputs, watch)
    if not found:
        why = next((f"; {name}: {u.reason}" for name, u in watch.unreached().items()), "")
        raise CaptureError(f"{type(model).__name__}: no conv or linear layer in it could be captured{why}")
    gm, slots, example = _side_by_side(copy, found, calls)
    annotate(gm)
    unreached = {name: u for name, u in watch.unreached().items() if name not in _reached(gm)}
    modules = {n: gm.get_submodule(n) for n in _reached(gm)}
    regions = Regions(inputs, unreached, copy, modules, slots, example)
    captured.record(gm, regions)
    propagate(gm, inputs)  # with FLOPs, from which the share outside of the regions follows
    outside = Cost(cost.params(model) - cost.params(gm), max(0, watch.flops - cost.flops(gm)))
    captured.record(gm, replace(regions, outside=outside))
    return gm


def _regions(
    model: nn.Module, inputs: Inputs, watch: _Watch
) -> tuple[dict[str, fx.GraphModule | None], dict[str, list[Call]]]:
    """Return the regions that hold what was asked of them, and their calls."""
    refused: set[str] = set()
    while True:
        found = _search(model, watch, refused)
        calls = record(model, inputs, found)
        wrong = {name for name, gm in found.items() if not _reproduces(model, name, gm, calls.get(name, ()))}
        watch.reasons.update(dict.fromkeys([name for name in wrong if found[name] is None], UNLIKE))
        if not wrong:
            wrong = watch.asked(inputs, [n for name, gm in found.items() for n in _layer_names(gm, name)])
            watch.reasons.update(dict.fromkeys(wrong, ASKED))
        if not wrong:
            return found, calls
        refused |= wrong


def _search(model: nn.Module, watch: _Watch, refused: set[str]) -> dict[str, fx.GraphModule | None]:
    """Return the regions by name, in the order of the model's modules: their graphs, or None for single layers."""
    found: dict[str, fx.GraphModule | None] = {}
    done: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in done:
            return
        done.add(id(module))
        if is_layer(module):
            if name not in watch.reasons and watch.called(name) and watch.seen[name].alone:
                found[name] = None
            return
        if kept_whole(module) or not any(is_layer(m) for m in module.modules()):
            return
        gm = None if name in refused else _traced(name, module, watch)
        if gm is not None:
            found[name] = gm
            done.update(id(m) for m in module.modules())
            return
        for child, inner in module.named_children():
            visit(f"{name}.{child}" if name else child, inner)

    visit("", model)
    return found


def _traced(name: str, module: nn.Module, watch: _Watch) -> fx.GraphModule | None:
    """Return the graph of a submodule that may be a region, as far as can be told without running it."""
    if not name or not watch.called(name) or not watch.seen[name].plain or hooked(module):
        return None
    inside = [n for n in watch.modules if n.startswith(f"{name}.") and watch.called(n)]
    if sum(n in watch.layers for n in inside) < 2 or any(n in watch.reasons for n in inside):
        return None
    try:
        with evaluating(module):
            gm, _ = trace(module, {})
        if train_path_differs(module, {}, gm):
            return None
    except CaptureError:
        return None
    # What has weights is called by no one else, nor under another name: then a pass may rewrite all of its calls.
    counts = Counter(f"{name}.{n.target}" for n in gm.graph.nodes if n.op == "call_module")
    wanted = {n for n in {*counts, *inside} if _has_weights(module.get_submodule(n[len(name) + 1 :]))}
    if any(watch.called(n) != counts[n] * watch.called(name) for n in wanted):
        return None
    return gm


def _layer_names(gm: fx.GraphModule | None, name: str) -> list[str]:
    if gm is None:
        return [name]
    targets = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
    return [f"{name}.{t}" for t in targets if is_layer(gm.get_submodule(t))]


def _reproduces(model: nn.Module, name: str, gm: fx.GraphModule | None, calls: Iterable[Call]) -> bool:
    """Whether the graph, or the layer alone, gives what it gave in the model."""
    calls = list(calls)
    module = _stand_in(model.get_submodule(name)) if gm is None else gm
    try:
        with evaluating(module), torch.no_grad():
            return bool(calls) and all(_same(tensors(module(*copies(c.arguments))), tensors(c.output)) for c in calls)
    except Exception:  # a graph that fails where the module ran is no region, whatever the reason
        return False


def _side_by_side(
    model: nn.Module, found: dict[str, fx.GraphModule | None], calls: dict[str, list[Call]]
) -> tuple[fx.GraphModule, tuple[Slot, ...], tuple[Tensor, ...]]:
    """Return the regions' graphs as one, a slot for each call with shapes of its own, and what those were given."""
    slots: list[Slot] = []
    example: list[Tensor] = []
    for name in found:
        every = [tuple((v.shape, v.dtype) for v in call.arguments) for call in calls[name]]
        for shape in list(dict.fromkeys(every))[:SHAPES]:
            i = every.index(shape)
            slots.append(Slot(name, i, len(shape), every.count(shape)))
            example += calls[name][i].arguments
    graph = fx.Graph()
    given = [[graph.placeholder(_identifier(f"{s.name}_{s.call}_{i}")) for i in range(s.arguments)] for s in slots]
    modules: dict[str, Any] = {}
    outputs = []
    for slot, arguments in zip(slots, given, strict=True):
        known = len(graph.nodes)
        outputs.append(_copied(graph, model, slot.name, found[slot.name], arguments, modules))
        for node in list(graph.nodes)[known:]:
            record_times(node, slot.times)
    graph.output(tuple(outputs))
    return fx.GraphModule(modules, graph, class_name=type(model).__name__).eval(), tuple(slots), tuple(example)


def _copied(
    graph: fx.Graph,
    model: nn.Module,
    name: str,
    inner: fx.GraphModule | None,
    given: list[fx.Node],
    modules: dict[str, Any],
) -> Any:
    """Append a region to the graph and return what it gives; ``modules`` gets those that it calls."""
    if inner is None:
        modules.setdefault(name, _stand_in(model.get_submodule(name)))
        return graph.call_module(name, tuple(given))
    values: dict[fx.Node, fx.Node] = {}
    left = iter(given)
    for node in inner.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(left)
        elif node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            if node.op in ("call_module", "get_attr"):
                target = f"{name}.{node.target}"
                values[node].target = target
                value = attribute(inner, str(node.target))
                modules[target] = _stand_in(value) if isinstance(value, nn.Module) else value
    raise AssertionError("a graph has an output")


def _identifier(name: str) -> str:
    """Return a module's name as one of a forward's argument: modules may be called 0, or a-b."""
    return "in_" + re.sub(r"\W", "_", name)


def _reached(gm: fx.GraphModule) -> set[str]:
    return {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
