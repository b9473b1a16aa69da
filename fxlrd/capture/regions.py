"""Capture of a model that cannot be traced as a whole: its largest regions that can, side by side in one graph.

The model is run once on its example inputs, and watched: which modules are called, with what, and which layers have
their weights read by others. A submodule is a region if

    - every call gave each argument of its forward a tensor, so that its trace freezes nothing;
    - its trace is the same in training mode, it calls what has weights as often as was seen, and no one else does;
    - the trace gives what the submodule gave, on all that it was called with.

Where no such submodule is around a conv or linear, that layer is a region of its own. Once more the model is run with
each layer inside another module, as its factors will be: what asks for a layer's type or parts is found so, and those
layers are left alone. What passes make of the others
goes back into a copy of the model (fxlrd/around.py), whose forward stays the user's: no control flow is frozen, the
traces serve to find and to check what is rewritten.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd import cost
from fxlrd.around import Around, Call, Slot, copies, describe, plain, record, structure
from fxlrd.capture.whole import check_weights, trace, train_path_differs
from fxlrd.errors import CaptureError, FxlrdError
from fxlrd.graph import (
    KEY,
    NEVER_CALLED,
    TIMES,
    Captured,
    Inputs,
    Unreached,
    added,
    annotate,
    counting,
    difference,
    evaluating,
    hooked,
    owners,
    propagate,
    rounding,
    seeded,
    tensors,
)
from fxlrd.layers import LAYERS, op

SHAPES = 4
"""Calls of one region that stand in the graph: one for each set of argument shapes, up to so many."""

MORE = "it is called with more than its input"
UNLIKE = "it gives something else alone than in the model: is its forward wrapped, or under autocast?"
ASKED = "the model does something else once another module stands in its place: is its type or its weight asked for?"
COMPILED = "{} is compiled: compress the model first, then compile it"
_READ = ("weight", "bias", "running_mean", "running_var")


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
    found, calls = _regions(around, inputs, watch)
    if not found:
        why = next((f"; {name}: {u.reason}" for name, u in watch.unreached().items()), "")
        raise CaptureError(f"{type(model).__name__}: no conv or linear layer in it could be captured{why}")
    gm, slots, example = _side_by_side(around, found, calls)
    annotate(gm)
    unreached = {name: u for name, u in watch.unreached().items() if name not in _reached(gm)}
    meta = Around(around, {n: gm.get_submodule(n) for n in _reached(gm)}, slots, inputs, example)
    gm.meta[KEY] = Captured(inputs, unreached, (), meta)
    propagate(gm, inputs)
    rest = cost.params(model) - cost.params(gm), max(0, watch.flops - cost.flops(gm))
    gm.meta[KEY] = Captured(inputs, unreached, (), Around(around, meta.modules, slots, inputs, example, *rest))
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


@dataclass
class _Seen:
    """What was seen of a module: its calls, whether all gave tensors for every argument, and one tensor alone."""

    calls: int = 0
    plain: bool = True
    alone: bool = True


class _Watch:
    """What was seen of the model while it ran, as a copy whose layers say when they are read by others."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        outputs, self.flops = counted(structure(model), inputs)
        self.outputs = copies(tensors(outputs))
        self.reasons: dict[str, str] = {}
        outputs = self._look(inputs, readers=True)
        if not _same(tensors(outputs), self.outputs):  # it asks for types: those of the layers looked at are not theirs
            self._look(inputs, readers=False)

    def _look(self, inputs: Inputs, readers: bool) -> Any:
        """Run a copy and see what is called and, by ``readers``, who reads parts of a module other than itself."""
        self.copy = structure(self.model)
        self.modules = dict(self.copy.named_modules())
        self.layers = {name: m for name, m in self.modules.items() if is_layer(m)}
        self.seen: dict[str, _Seen] = {}
        self._tied()
        for name, module in self.modules.items():
            if not is_layer(module) and kept_whole(module):
                why = f"{name} ({type(module).__name__}) reads its weight itself and is kept whole"
                why = COMPILED.format(name) if hasattr(module, "_orig_mod") else why
                self.reasons.update({n: why for n in self.layers if n.startswith(f"{name}.")})
        for name, module in self.modules.items():
            if transposed_linear(module) and (reason := added(module)) is not None:
                self.reasons[name] = reason  # a stand-in for it has nothing of that
            if readers and _has_weights(module) and not hooked(module):
                _watched(name, module, self.reasons)
        handles = [
            m.register_forward_pre_hook(self._hook(n), with_kwargs=True)
            for n, m in self.modules.items()
            if n and not isinstance(m, torch.jit.ScriptModule)
        ]
        try:
            return counted(self.copy, inputs)[0]
        finally:
            for handle in handles:
                handle.remove()

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

    def asked(self, inputs: Inputs, names: Sequence[str]) -> set[str]:
        """Return those layers that cannot be inside another module without the model doing something else."""

        def found(some: Sequence[str]) -> set[str]:
            if self._alike(inputs, some):
                return set()
            half = len(some) // 2
            return found(some[:half]) | found(some[half:]) if half else set(some)

        if self._alike(inputs, names) or not self._alike(inputs, ()):  # no two runs of it are alike: it cannot be told
            return set()
        return found(names)

    def _alike(self, inputs: Inputs, names: Sequence[str]) -> bool:
        """Whether the model gives what it gave with each of these layers inside a module like that of factors."""
        model = structure(self.model)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in names:
            old = modules[name]
            new = nn.Sequential(OrderedDict(first=_stand_in(old))).train(old.training)
            describe(new, old)
            for alias in [alias for alias, m in modules.items() if m is old]:
                model.set_submodule(alias, new)
        try:
            return _same(tensors(counted(model, inputs)[0]), self.outputs)
        except FxlrdError:
            return False

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


def counted(model: nn.Module, inputs: Inputs) -> tuple[Any, int]:
    """Return what the model gives, always with the same random numbers, and the FLOPs that it takes."""
    with counting() as counter:
        return seeded(model, inputs), counter.get_total_flops()


def is_layer(module: nn.Module) -> bool:
    """Whether this is a conv or linear, or one in disguise."""
    return isinstance(module, LAYERS) or transposed_linear(module)


def transposed_linear(module: nn.Module) -> bool:
    """Whether this is the Conv1D of transformers (GPT-2), a Linear whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def kept_whole(module: nn.Module) -> bool:
    """Whether this is a module of torch's own with layers inside that its forward does not call as modules."""
    if hasattr(module, "_orig_mod"):  # torch.compile's
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, *LAYERS)
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, containers)


def _has_weights(module: nn.Module) -> bool:
    """Whether a pass may put another module in the place of this one: a layer, a norm, an activation with weights."""
    own = module._parameters or module._buffers
    return is_layer(module) or (bool(own) and type(module).__module__.startswith("torch.nn.modules"))


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


def _same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    try:
        return difference(found, wanted, "region").relative <= rounding(wanted)
    except FxlrdError:
        return False


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
            node.meta[TIMES] = slot.times
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
                value = _attribute(inner, str(node.target))
                modules[target] = _stand_in(value) if isinstance(value, nn.Module) else value
    raise AssertionError("a graph has an output")


def _identifier(name: str) -> str:
    """Return a module's name as one of a forward's argument: modules may be called 0, or a-b."""
    return "in_" + re.sub(r"\W", "_", name)


def _attribute(model: nn.Module, target: str) -> Any:
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _reached(gm: fx.GraphModule) -> set[str]:
    return {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
