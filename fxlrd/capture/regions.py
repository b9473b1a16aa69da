"""Capture of a model that cannot be traced as a whole: its largest regions that can, side by side in one graph.

The model is run once on its example inputs, and watched: which modules are called, with what, and which layers have
their weights read by others. A submodule is a region if

    - every call gave each argument of its forward a tensor, so that its trace freezes nothing;
    - its trace is the same in training mode, it calls its layers as often as was seen, and no one else does;
    - the trace gives what the submodule gave, on all that it was called with.

Where no such submodule is around a conv or linear, that layer is a region of its own. What passes make of the layers
goes back into a copy of the model (fxlrd/around.py), whose forward stays the user's: no control flow is frozen, the
traces serve to find and to check what is rewritten.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import BaseTorchFunctionMode

from fxlrd import cost
from fxlrd.around import Around, Call, Slot, plain, record, structure
from fxlrd.capture.whole import check_weights, trace, train_path_differs
from fxlrd.errors import CaptureError
from fxlrd.graph import (
    KEY,
    NEVER_CALLED,
    TIMES,
    Captured,
    Inputs,
    Unreached,
    annotate,
    difference,
    evaluating,
    hooked,
    owners,
    propagate,
    run,
    tensors,
)
from fxlrd.layers import LAYERS, op

SHAPES = 4
"""Calls of one region that stand in the graph: one for each set of argument shapes, up to so many."""

MORE = "it is called with more than its input"
_READ = ("weight", "bias")


def capture_regions(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Return the model's regions as one GraphModule, with shapes, FLOPs and provenance on its nodes.

    Its layers have the names that they have in the model. Its inputs are the model's own: what the regions are given
    is recorded while the model runs. The model itself is not changed. Raises FxlrdError for example inputs that
    the model fails on and weights that are not finite, CaptureError where no layer is called.
    """
    inputs = Inputs.of(example_inputs)
    check_weights(model)
    watch = _Watch(model, inputs)
    around = structure(model)
    found = _search(around, watch)
    graphs = {name: graph for name, graph in found.items() if graph is not None}
    calls = record(around, inputs, found)
    for name, graph in graphs.items():
        if not _reproduces(around, name, graph, calls[name]):
            found.pop(name)
            found.update(dict.fromkeys(_layer_names(graph, name)))
    if found.keys() - calls.keys():
        calls = record(around, inputs, found)
    for name in [name for name, graph in found.items() if graph is None]:
        reason = _unlike(_stand_in(around.get_submodule(name)), calls[name])
        if reason is not None:
            watch.reasons[name] = reason
            found.pop(name)
    if not found:
        raise CaptureError(f"{type(model).__name__}: no conv or linear layer in it could be captured")
    gm, slots, example = _side_by_side(around, found, calls)
    annotate(gm)
    unreached = {name: u for name, u in watch.unreached().items() if name not in _reached(gm)}
    meta = Around(around, {n: gm.get_submodule(n) for n in _reached(gm)}, slots, inputs, example)
    gm.meta[KEY] = Captured(inputs, unreached, (), meta)
    propagate(gm, inputs)
    rest = cost.params(model) - cost.params(gm), max(0, watch.flops - cost.flops(gm))
    gm.meta[KEY] = Captured(inputs, unreached, (), Around(around, meta.modules, slots, inputs, example, *rest))
    return gm


@dataclass
class _Seen:
    """What was seen of a module: its calls, whether all gave tensors for every argument, and one tensor alone."""

    calls: int = 0
    plain: bool = True
    alone: bool = True


class _Watch:
    """Runs the model once, as a copy whose layers say when they are read by others."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        self.copy = structure(model)
        self.modules = dict(self.copy.named_modules())
        self.layers = {name: m for name, m in self.modules.items() if is_layer(m)}
        self.reasons: dict[str, str] = {}
        self.seen: dict[str, _Seen] = {}
        self._tied()
        for name, module in self.modules.items():
            if not is_layer(module) and kept_whole(module):
                inside = [n for n in self.layers if n.startswith(f"{name}.")]
                for each in inside:
                    self.reasons[each] = f"{name} ({type(module).__name__}) reads its weight itself and is kept whole"
        for name, module in self.layers.items():
            if not hooked(module):
                _watched(name, module, self.reasons)
        handles = [m.register_forward_pre_hook(self._hook(n), with_kwargs=True) for n, m in self.modules.items() if n]
        counter = FlopCounterMode(display=False)
        try:
            with BaseTorchFunctionMode(), counter:
                run(self.copy, inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.flops = counter.get_total_flops()

    def _tied(self) -> None:
        names = owners(self.copy)
        for name, module in self.layers.items():
            for part, parameter in module.named_parameters(recurse=False):
                others = [n for n in names[id(parameter)] if not n.startswith(f"{name}.")]
                if others:
                    self.reasons[name] = f"its {part} is shared with {others[0]}"

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen = self.seen.setdefault(name, _Seen())
            seen.calls += 1
            seen.plain = seen.plain and plain(module, args, kwargs)
            given = (*args, *kwargs.values())
            seen.alone = seen.alone and len(given) == 1 and isinstance(given[0], Tensor)

        return hook

    def called(self, name: str) -> int:
        """How often the module was called."""
        return self.seen[name].calls if name in self.seen else 0

    def unreached(self) -> dict[str, Unreached]:
        """Return every layer, with the reason that speaks against it if there is one."""
        found = {}
        for name, module in self.layers.items():
            params = sum(p.numel() for p in module.parameters())
            kind = "Linear" if transposed_linear(module) else op(module)
            reason = self.reasons.get(name, MORE if self.called(name) else NEVER_CALLED)
            found[name] = Unreached(reason, kind, tuple(module.weight.shape), params)
        return found


def is_layer(module: nn.Module) -> bool:
    """Whether this is a conv or linear, or one in disguise."""
    return isinstance(module, LAYERS) or transposed_linear(module)


def transposed_linear(module: nn.Module) -> bool:
    """Whether this is the Conv1D of transformers (GPT-2), a Linear whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def kept_whole(module: nn.Module) -> bool:
    """Whether this is a module of torch's own with layers inside that its forward does not call as modules."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, *LAYERS)
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, containers)


def _watched(name: str, module: nn.Module, reasons: dict[str, str]) -> None:
    """Make the layer, which belongs to a copy, note who reads its parts other than its own forward."""
    inside = 0
    cls = type(module)

    class Watched(cls):  # type: ignore[misc, valid-type]
        @functools.wraps(cls.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            inside += 1
            try:
                return super().forward(*args, **kwargs)
            finally:
                inside -= 1

        def __getattribute__(self, attribute: str) -> Any:
            if attribute in _READ and not inside:
                caller = sys._getframe(1).f_code
                reasons.setdefault(
                    name, f"its {attribute} is read by {getattr(caller, 'co_qualname', caller.co_name)} directly"
                )
            return super().__getattribute__(attribute)

    Watched.__name__, Watched.__qualname__, Watched.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    module.__class__ = Watched


def _search(model: nn.Module, watch: _Watch) -> dict[str, fx.Graph | None]:
    """Return the regions by name, in the order of the model's modules: their graphs, or None for single layers."""
    found: dict[str, fx.Graph | None] = {}
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
        graph = _traced(model, name, module, watch)
        if graph is not None:
            found[name] = graph
            done.update(id(m) for m in module.modules())
            return
        for child, inner in module.named_children():
            visit(f"{name}.{child}" if name else child, inner)

    visit("", model)
    return found


def _traced(model: nn.Module, name: str, module: nn.Module, watch: _Watch) -> fx.Graph | None:
    """Return the graph of a submodule that may be a region, as far as can be told without running it."""
    if not name or not watch.called(name) or not watch.seen[name].plain or hooked(module):
        return None
    inside = [n for n in watch.layers if n.startswith(f"{name}.") and watch.called(n)]
    if len(inside) < 2 or any(n in watch.reasons for n in inside):
        return None
    try:
        with evaluating(module):
            gm, _ = trace(module, {})
        if train_path_differs(module, {}, gm):
            return None
    except CaptureError:
        return None
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            counts[f"{name}.{node.target}"] = counts.get(f"{name}.{node.target}", 0) + 1
    if any(watch.called(n) != counts.get(n, 0) * watch.called(name) for n in inside):
        return None
    return gm.graph


def _layer_names(graph: fx.Graph, name: str) -> list[str]:
    root = graph.owning_module
    assert root is not None
    targets = dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module")
    return [f"{name}.{t}" for t in targets if is_layer(root.get_submodule(t))]


def _reproduces(model: nn.Module, name: str, graph: fx.Graph, calls: Iterable[Call]) -> bool:
    """Whether the graph gives what the submodule gave."""
    gm = fx.GraphModule(model.get_submodule(name), graph)
    with evaluating(gm), torch.no_grad():
        return all(_same(lambda c=c: gm(*c.arguments), c.output) for c in calls)


def _unlike(module: nn.Module, calls: Iterable[Call]) -> str | None:
    """Return why a layer is no region of its own, or None if it is one."""
    for call in calls:
        (given,) = call.arguments
        with evaluating(module), torch.no_grad():
            if not _same(lambda given=given: module(given), call.output):
                return "its module gives something else than in the model: is its forward wrapped, or under autocast?"
    return None


def _same(compute: Any, reference: Any) -> bool:
    wanted = tensors(reference)
    try:
        found = difference(tensors(compute()), wanted, "region")
    except Exception:  # a graph that fails where the module ran is no region, whatever the reason
        return False
    return found.relative <= 1e3 * max((torch.finfo(t.dtype).eps for t in wanted if t.is_floating_point()), default=0.0)


def _stand_in(module: nn.Module) -> nn.Module:
    """Return the layer as passes know it: a Conv1D as the Linear that it is, around a view of its weight."""
    if not transposed_linear(module):
        return module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    assert bias is None or isinstance(bias, nn.Parameter)
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().mT, weight.requires_grad)
    linear.bias = bias
    return linear.train(module.training)


def _side_by_side(
    model: nn.Module, found: dict[str, fx.Graph | None], calls: dict[str, list[Call]]
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
    given = [[graph.placeholder(f"{s.name.replace('.', '_')}_{s.call}_{i}") for i in range(s.arguments)] for s in slots]
    modules: dict[str, Any] = {}
    outputs = []
    for slot, arguments in zip(slots, given, strict=True):
        known = len(graph.nodes)
        outputs.append(_copied(graph, model, slot.name, found[slot.name], arguments, modules))
        for node in list(graph.nodes)[known:]:
            node.meta[TIMES] = slot.times
    graph.output(tuple(outputs))
    return fx.GraphModule(modules, graph, class_name=type(model).__name__).eval(), tuple(slots), tuple(example)


def _copied(
    graph: fx.Graph, model: nn.Module, name: str, inner: fx.Graph | None, given: list[fx.Node], modules: dict[str, Any]
) -> Any:
    """Append a region to the graph and return what it gives; ``modules`` gets those that it calls."""
    if inner is None:
        modules.setdefault(name, _stand_in(model.get_submodule(name)))
        return graph.call_module(name, tuple(given))
    values: dict[fx.Node, fx.Node] = {}
    left = iter(given)
    for node in inner.nodes:
        if node.op == "placeholder":
            values[node] = next(left)
        elif node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            if node.op in ("call_module", "get_attr"):
                target = f"{name}.{node.target}"
                values[node].target = target
                value = _attribute(model, target)
                modules[target] = _stand_in(value) if isinstance(value, nn.Module) else value
    raise AssertionError("a graph has an output")


def _attribute(model: nn.Module, target: str) -> Any:
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _reached(gm: fx.GraphModule) -> set[str]:
    return {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
