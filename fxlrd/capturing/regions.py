"""Capture of a model that cannot be traced as a whole: its largest traceable regions, side by side in one graph.

A copy of the model runs once on the example inputs. `fxlrd.capturing.watch` records which modules are called, with
what, and which layers have their weights read by other code. A submodule is a region if

    - every call gave a tensor for each argument of its forward, so that its trace freezes nothing;
    - its trace is the same in training mode, and what has weights in it is called by this trace alone;
    - the trace reproduces the recorded outputs, for all recorded calls.

Outside of such submodules each conv or linear layer is a region of its own. The model then runs once more with each
layer inside another module, as its factors will be. Layers whose type or parts the model asks for change its outputs
there, and are left alone. What passes make of the other layers goes back into a copy of the model that keeps the user's
forward (`fxlrd.graph.regions`): no control flow is frozen, the traces serve to find and to check what is rewritten.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxlrd.capturing.joining import joined
from fxlrd.capturing.multiplied import without_layer
from fxlrd.capturing.proof import Original, same
from fxlrd.capturing.reads import has_weights
from fxlrd.capturing.stems import not_stems
from fxlrd.capturing.tracing import check_names, trace, train_path_differs
from fxlrd.capturing.watch import (
    Observation,
    asked_for,
    blocked_modules,
    is_opaque,
    named_layers,
    observe,
    unreached,
)
from fxlrd.capturing.whole import original_of
from fxlrd.capturing.widths import fixed_widths
from fxlrd.errors import CaptureError, Reason
from fxlrd.freed import give_back_freed
from fxlrd.graph import cost
from fxlrd.graph.captured import Regions, added_params, captured, propagate_values
from fxlrd.graph.code import let_write
from fxlrd.graph.copies import structural_copy
from fxlrd.graph.cost import Cost
from fxlrd.graph.facts import record_times
from fxlrd.graph.guards import hooked
from fxlrd.graph.inputs import tensors
from fxlrd.graph.regions import Call, Slot, calls_between, copies
from fxlrd.graph.run import evaluating, isolated, set_mode
from fxlrd.graph.surgery import annotate, attribute, called
from fxlrd.layers.folded import is_layer, stock_layer

SHAPES = 4
"""The number of calls of one region, each with argument shapes of its own, that the graph has at most."""
UNLIKE = Reason(
    "unlike-alone", "it gives something else alone than in the model: is its forward wrapped, or under autocast?"
)
ASKED = Reason(
    "asked-for",
    "the model does something else once another module stands in its place: is its type or its weight asked for?",
)


@dataclass(frozen=True)
class Region:
    """A submodule of the model with its trace, or without one for a region that is a single layer.

    With ``ends`` it is what flows from layer ``name`` to layer ``ends``, which the graph calls by their full names.
    """

    name: str
    graph: fx.GraphModule | None = None
    ends: str = ""

    def target(self, inside: str) -> str:
        """Return the name in the model of what the graph calls ``inside``."""
        return inside if self.ends else f"{self.name}.{inside}"

    def layer_names(self) -> list[str]:
        """Return the names of its layers in the model."""
        if self.graph is None:
            return [self.name]
        return [self.target(name) for name, module in called(self.graph).items() if is_layer(module)]

    def calls(self, recorded: Mapping[str, list[Call]]) -> list[Call]:
        """Return its calls, of those that were recorded of all modules."""
        return calls_between(self.name, self.ends, recorded)

    def reproduces(self, model: nn.Module, calls: Sequence[Call]) -> bool:
        """Whether the graph, or the layer alone, gives the recorded output for every recorded call."""
        module = stock_layer(model.get_submodule(self.name)) if self.graph is None else self.graph
        try:
            with evaluating(module), isolated(module, seed=2), torch.no_grad():
                outputs = [tensors(module(*copies(call.arguments))) for call in calls]
        except Exception:  # a graph that fails where the module ran is no region, whatever the cause
            return False
        return bool(calls) and all(
            same(found, tensors(call.output)) for found, call in zip(outputs, calls, strict=True)
        )


def capture_regions(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Return the model's regions as one GraphModule, with shapes, FLOPs and provenance on its nodes.

    Its layers have the names that they have in the model. Its inputs are the model's own: the arguments of the regions
    are recorded while the model runs. The model itself is neither run nor changed. Raises FxlrdError for example inputs
    that the model fails on and for weights that are not finite, CaptureError where no layer can be captured.
    """
    return capture_regions_of(original_of(model, example_inputs))


def capture_regions_of(original: Original) -> fx.GraphModule:
    """`capture_regions` of a model of which is known what it does."""
    model = original.model
    observation = observe(original)
    blocked = blocked_modules(model, observation)
    regions, calls = _proven_regions(original, observation, blocked)
    left_out = unreached(named_layers(model), observation, blocked)
    if not regions:
        reason = next((f"; {name}: {entry.reason}" for name, entry in left_out.items()), "")
        raise CaptureError(f"{type(model).__name__}: no conv or linear layer in it could be captured{reason}")
    slots = _slots(regions, calls)
    gm = _side_by_side(structural_copy(model), regions, slots)
    annotate(gm)
    example = tuple(argument for slot in slots for argument in calls[slot.name][slot.call].arguments)
    propagate_values(gm, copies(example))
    modules = called(gm)
    alike = {name: user for name, m in modules.items() if is_layer(user := model.get_submodule(name)) and m is not user}
    params = cost.params(gm) + added_params(gm, modules, alike)
    outside = Cost(cost.params(model) - params, max(0, original.flops - cost.flops(gm)))
    not_in_graph = {name: entry for name, entry in left_out.items() if name not in modules}
    not_in_graph |= without_layer(model, original.multiplied, original.closed)
    record = Regions(original.inputs, not_in_graph, original.users, modules, slots, example, outside, alike=alike)
    record = replace(record, fixed_widths=fixed_widths(original, gm), described=observation.described)
    record = replace(record, not_stems=not_stems(original, gm))
    captured.record(gm, replace(record, warnings=_fast_path_warnings(original.users, modules)))
    del calls
    give_back_freed()  # what calls of the regions have been recorded is more than all weights
    return gm


def _fast_path_warnings(model: nn.Module, modules: Iterable[str]) -> tuple[str, ...]:
    packing = [n for n, m in model.named_modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    affected = [name for name in packing if any(target.startswith(f"{name}." if name else "") for target in modules)]
    if not affected:
        return ()
    return (
        f"fast paths are off where layers inside are replaced, in {', '.join(n or 'the model' for n in affected)} "
        "(TransformerEncoder): with src_key_padding_mask, outputs at padded positions are no longer zeros",
    )


def _proven_regions(
    original: Original, observation: Observation, blocked: dict[str, Reason]
) -> tuple[list[Region], dict[str, list[Call]]]:
    """Return the regions that reproduce their calls and whose layers can be replaced, and the calls for the example.

    Layers that fail get their reason in ``blocked``; a submodule that fails is searched for smaller regions.
    """
    refused: set[str] = set()
    while True:
        regions = _candidates(original.model, observation, blocked, refused)
        calls, more = original.recorded([region.name for region in regions])
        failing = [r for r in regions if not r.reproduces(original.model, [*r.calls(calls), *r.calls(more)])]
        if failing:
            blocked.update({region.name: UNLIKE for region in failing if region.graph is None})
            refused.update(region.name for region in failing)
            continue
        names = [name for region in regions for name in region.layer_names()]
        asked = asked_for(original, names, observation.described)
        if not asked:
            return _with_joined(original, regions, blocked, calls, more), calls
        blocked.update(dict.fromkeys(asked, ASKED))


def _with_joined(
    original: Original,
    regions: list[Region],
    blocked: Mapping[str, Reason],
    *recorded: Mapping[str, list[Call]],
) -> list[Region]:
    """Return the regions, with one in the place of single layers between which nothing but channels flow."""
    alone = [region.name for region in regions if region.graph is None]
    at: dict[str, Region] = {}
    inside: set[str] = set()
    for piece in joined(original, alone, blocked):
        region = Region(piece.starts[0], piece.graph, piece.ends)
        if region.reproduces(original.model, [c for each in recorded for c in region.calls(each)]):
            at[region.name] = region
            inside.update(piece.layers)
    return [at.get(r.name, r) for r in regions if r.name in at or r.name not in inside]


def _candidates(
    model: nn.Module, observation: Observation, blocked: Mapping[str, Reason], refused: set[str]
) -> list[Region]:
    """Return the largest submodules that may be regions, in the order of the model's modules."""
    regions: list[Region] = []
    visited: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in visited:
            return
        visited.add(id(module))
        if is_layer(module):
            if name not in blocked and observation.count(name) and observation.calls[name].single:
                regions.append(Region(name))
            return
        if is_opaque(module) or not any(is_layer(m) for m in module.modules()):
            return
        graph = None if name in refused else _traced(model, name, observation, blocked)
        if graph is not None:
            regions.append(Region(name, graph))
            visited.update(id(m) for m in module.modules())
            return
        for child, inner in module.named_children():
            visit(f"{name}.{child}" if name else child, inner)

    visit("", model)
    return regions


def _traced(
    model: nn.Module, name: str, observation: Observation, blocked: Mapping[str, Reason]
) -> fx.GraphModule | None:
    """Return the trace of a submodule if it may be a region, as far as this can be decided without running it."""
    module = model.get_submodule(name)
    if not name or not observation.count(name) or not observation.calls[name].plain or hooked(module):
        return None
    inside = [n for n, _ in model.named_modules() if n.startswith(f"{name}.") and observation.count(n)]
    if sum(is_layer(model.get_submodule(n)) for n in inside) < 2 or any(n in blocked for n in inside):
        return None
    try:
        graph, _ = trace(module, {})
        if train_path_differs(module, {}, graph):
            return None
    except CaptureError:
        return None
    # If no other code calls what has weights, by whatever name, a pass may rewrite all of its calls.
    counts = Counter(f"{name}.{n.target}" for n in graph.graph.nodes if n.op == "call_module")
    weighted = {n for n in {*counts, *inside} if has_weights(model.get_submodule(n))}
    if any(observation.count(n) != counts[n] * observation.count(name) for n in weighted):
        return None
    return graph


def _slots(regions: Sequence[Region], calls: Mapping[str, list[Call]]) -> tuple[Slot, ...]:
    """Return a slot for each set of argument shapes that a region was called with, up to `SHAPES`."""
    slots = []
    for region in regions:
        signatures = [tuple((v.shape, v.dtype) for v in call.arguments) for call in calls[region.name]]
        for signature in list(dict.fromkeys(signatures))[:SHAPES]:
            index, times = signatures.index(signature), signatures.count(signature)
            slots.append(Slot(region.name, index, len(signature), times, region.ends))
    return tuple(slots)


def _side_by_side(model: nn.Module, regions: Sequence[Region], slots: Sequence[Slot]) -> fx.GraphModule:
    """Return one graph with the regions' graphs side by side, once for each slot."""
    by_name = {region.name: region for region in regions}
    graph = fx.Graph()
    arguments = [
        [graph.placeholder(_identifier(f"{slot.name}_{slot.call}_{i}")) for i in range(slot.arguments)]
        for slot in slots
    ]
    attributes: dict[str, Any] = {}
    outputs = []
    for slot, values in zip(slots, arguments, strict=True):
        size = len(graph.nodes)
        outputs.append(_append(graph, model, by_name[slot.name], values, attributes))
        for node in list(graph.nodes)[size:]:
            record_times(node, slot.times)
    graph.output(tuple(outputs))
    check_names(attributes, in_code=False)
    let_write(graph, list(attributes))
    gm = fx.GraphModule(attributes, graph, class_name=type(model).__name__)
    set_mode(gm, False)
    return gm


def _append(
    graph: fx.Graph, model: nn.Module, region: Region, arguments: Sequence[fx.Node], attributes: dict[str, Any]
) -> Any:
    """Append a region to the graph and return its output; its modules and tensors are put into ``attributes``."""
    name, inner = region.name, region.graph
    if inner is None:
        attributes.setdefault(name, stock_layer(model.get_submodule(name)))
        return graph.call_module(name, tuple(arguments))
    values: dict[fx.Node, fx.Node] = dict(zip(inner.graph.find_nodes(op="placeholder"), arguments, strict=True))
    for node in inner.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        if node.op == "placeholder":
            continue
        values[node] = graph.node_copy(node, values.__getitem__)
        if node.op in ("call_module", "get_attr"):
            target = region.target(str(node.target))
            values[node].target = target
            value = attribute(inner, str(node.target))
            attributes[target] = stock_layer(value) if isinstance(value, nn.Module) else value
    raise AssertionError("a graph has an output")


def _identifier(name: str) -> str:
    """Return a module's name as the name of an argument of forward: modules may be called 0, or a-b."""
    return "in_" + re.sub(r"\W", "_", name)
