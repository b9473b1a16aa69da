"""Dynamo graph ⇄ GraphModule of stock modules.

What torch.compile hands to a backend has functions on tensors, and the weights are arguments of the graph
(placeholders) or, while Inductor freezes weights, attributes (get_attr). To *raise* it is to put a stock module around
the very same Parameters wherever a function is such a module's call:

    conv2d(x, weight, bias, stride, …)      →     layer1.0.conv1(x)

under the name that the layer has in the model, so that the passes find what they find in a captured model: not more,
so a function that the model's own code calls on a weight stays one. What else reads a weight reads it as an attribute.
What is left of the placeholders is the model's inputs.

To *lower* the rewritten graph is the way back: placeholders as they were, in their order, and a function for each
module. A layer that no pass touched is the original call of the original function on the original placeholder, so that
a compiler treats its weights as before. Only factors are new: as placeholders after the others, marked static
as Dynamo marks weights, or as attributes while weights freeze.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.node import has_side_effect

from fxlrd.errors import FxlrdError
from fxlrd.graph.surgery import attribute
from fxlrd.layers.kinds import BATCH_NORMS, CONVS, LAYERS, TRANSPOSED

# The signatures of torch's functions, which inspect cannot read: arguments in order, with their defaults.
_CONV = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_TRANSPOSED = {
    **{"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "output_padding": 0},
    **{"groups": 1, "dilation": 1},
}
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_NORM = {
    **{"input": None, "running_mean": None, "running_var": None, "weight": None, "bias": None},
    **{"training": False, "momentum": 0.1, "eps": 1e-5},
}
_LAYERS: dict[Any, tuple[type[nn.Module], dict[str, Any]]] = {
    F.linear: (nn.Linear, {"input": None, "weight": None, "bias": None}),
    **{f: (kind, _CONV) for f, kind in zip((F.conv1d, F.conv2d, F.conv3d), CONVS, strict=True)},
    **{f: (kind, _TRANSPOSED) for f, kind in zip(_CONV_TRANSPOSE, TRANSPOSED, strict=True)},
}
"""By function: the module that calls it, and the function's arguments with their defaults, in order."""


@has_side_effect
def _enter(*_: Any) -> None:
    """Stand for the start of an autocast region in a raised graph, which is run in the weights' own dtype."""


@has_side_effect
def _exit(*_: Any) -> None:
    """Stand for its end."""


_AUTOCAST: dict[Any, Any] = {_enter_autocast: _enter, _exit_autocast: _exit}
_LOWERED = {stand_in: function for function, stand_in in _AUTOCAST.items()}
_FUNCTIONS = {module: function for function, (module, _) in _LAYERS.items()}
_STATIC = "_dynamo_static_input_type"


@dataclass
class Raised:
    """A raised graph. ``modules`` are those that a function became, with its node in Dynamo's graph; ``reads`` are the
    nodes of weights that are read directly, by attribute; ``weights`` are all weights by the name of their node.
    """

    graph_module: fx.GraphModule
    weights: dict[str, Tensor]
    modules: dict[str, tuple[nn.Module, fx.Node]] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lowered:
    """A lowered graph, the factors in the order of their placeholders (or attributes), and the names of the weights,
    as nodes of Dynamo's graph, that the factors were made of.
    """

    graph_module: fx.GraphModule
    factors: dict[str, Tensor]
    sources: tuple[str, ...]


def has_layers(gm: fx.GraphModule) -> bool:
    """Whether any function of a Dynamo graph stands for a layer."""
    return any(n.op == "call_function" and _layer(n) is not None for n in gm.graph.nodes)


def weights_of(gm: fx.GraphModule, values: Sequence[Any]) -> dict[str, Tensor]:
    """Return the weights of a Dynamo graph by the name of their node; ``values`` are the placeholders'."""
    found = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, values, strict=True):
        static = bool((node.meta.get("tensor_dict") or {}).get(_STATIC)) or isinstance(value, nn.Parameter)
        if static and isinstance(value, Tensor) and not is_fake(value):
            found[node.name] = value
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(value := attribute(gm, str(node.target)), Tensor):
            found[node.name] = value
    return found


def raise_graph(gm: fx.GraphModule, weights: dict[str, Tensor]) -> Raised:
    """Return a Dynamo graph as calls of stock modules around ``weights``, in eval mode; ``gm`` is not changed.

    Buffers that are read directly are copies: a run of the raised graph leaves the model's as they are.
    """
    modules = _modules(gm, weights)
    graph = fx.Graph()
    attributes: dict[str, Any] = {name: module for name, module, _ in modules.values()}
    owners: dict[int, str] = {
        id(p): f"{name}.{key}" for name, module in attributes.items() for key, p in module.named_parameters()
    }  # a layer's weight that is read directly as well is read as the layer's
    env: dict[fx.Node, fx.Node] = {}
    reads: dict[str, str] = {}

    def value(node: fx.Node) -> fx.Node:
        if node not in env:
            tensor = weights[node.name]
            target = owners.get(id(tensor), node.name)
            attributes[target] = tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
            reads[target] = node.name
            env[node] = graph.get_attr(target)
        return env[node]

    for node in gm.graph.nodes:
        if node in modules:
            env[node] = graph.call_module(modules[node][0], (value(modules[node][2]),))
            env[node].meta = dict(node.meta)
        elif node.name not in weights:
            if node.op in ("get_attr", "call_module"):
                attributes[str(node.target)] = attribute(gm, str(node.target))
            env[node] = graph.node_copy(node, value)
            env[node].target = _AUTOCAST.get(node.target, node.target)
    new = fx.GraphModule(attributes, graph, class_name="Raised")
    return Raised(new.eval(), weights, {name: (module, node) for node, (name, module, _) in modules.items()}, reads)


def lower_graph(result: fx.GraphModule, raised: Raised, gm: fx.GraphModule, frozen: bool) -> Lowered:
    """Return the rewritten ``result`` of a raised graph as a graph with the placeholders of Dynamo's graph ``gm``.

    With ``frozen``, factors are attributes (Parameters) of the graph module, otherwise placeholders.
    """
    graph = fx.Graph()
    attributes: dict[str, Any] = {}
    factors: dict[str, Tensor] = {}
    given: dict[str, fx.Node] = {}  # nodes of Dynamo's graph, by name: inputs and weights
    placed: dict[int, fx.Node] = {}  # weights and factors by identity
    for node in gm.graph.find_nodes(op="placeholder"):
        given[node.name] = _copied(graph, node)
    anchor = next(iter(reversed(graph.nodes)), None)
    named = {id(t): name for name, t in raised.weights.items()}
    nodes = {n.name: n for n in gm.graph.nodes}

    def original(name: str) -> fx.Node:
        if name not in given:
            attributes[str(nodes[name].target)] = raised.weights[name]
            given[name] = _copied(graph, nodes[name])
        return given[name]

    def fetch(tensor: Tensor, path: str) -> fx.Node:
        nonlocal anchor
        if (name := named.get(id(tensor))) is not None:
            return original(name)
        if id(tensor) not in placed:
            name = "fxlrd_" + re.sub(r"\W", "_", path)
            while name in factors:
                name += "_"
            factors[name] = tensor.detach()
            if frozen:
                attributes[name] = nn.Parameter(tensor.detach(), requires_grad=False)
                placed[id(tensor)] = graph.get_attr(name)
            else:
                assert anchor is not None, "weights that are not frozen are placeholders"
                with graph.inserting_after(anchor):
                    placed[id(tensor)] = anchor = graph.placeholder(name)
                anchor.meta["tensor_dict"] = {_STATIC: "unguarded"}
                anchor._dynamo_source = None
        return placed[id(tensor)]

    inputs = [given[n.name] for n in gm.graph.find_nodes(op="placeholder") if n.name not in raised.weights]
    env = dict(zip(result.graph.find_nodes(op="placeholder"), inputs, strict=True))
    kept = set()
    for node in result.graph.nodes:
        target = str(node.target)
        if node.op == "placeholder":
            continue
        if node.op == "get_attr" and target in raised.reads:
            env[node] = original(raised.reads[target])
        elif node.op == "get_attr":
            value = attribute(result, target)
            attributes[target] = value
            env[node] = fetch(value, target) if isinstance(value, Tensor) else graph.node_copy(node)
        elif node.op == "call_module":
            module, source = raised.modules.get(target, (None, None))
            current = result.get_submodule(target)
            (value,) = node.args
            if source is not None and current is module:
                kept.add(target)
                old = _arguments(source)["input"]
                swapped = {n: original(n.name) for n in source.all_input_nodes if n is not old} | {old: env[value]}
                env[node] = graph.node_copy(source, swapped.__getitem__)
            elif target not in raised.modules and any(target == str(n.target) for n in nodes.values()):
                attributes[target] = current
                env[node] = graph.node_copy(node, env.__getitem__)
            else:
                env[node] = _call(graph, current, target, env[value], fetch)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].target = _LOWERED.get(node.target, node.target)
        if env[node].op not in ("placeholder", "get_attr"):
            env[node].meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    gone = [module for name, (module, _) in raised.modules.items() if name not in kept]
    taken = {named[id(t)] for m in gone for t in (*m.parameters(), *m.buffers()) if id(t) in named}
    lowered = fx.GraphModule(attributes, graph, class_name="Lowered")
    _keep_metadata(lowered, gm)
    return Lowered(lowered, factors, tuple(name for name in raised.weights if name in taken))


def _modules(gm: fx.GraphModule, weights: dict[str, Tensor]) -> dict[fx.Node, tuple[str, nn.Module, fx.Node]]:
    """Return for each node that becomes a module the module, its name, and the node of its input."""
    nodes = {n: m for n in gm.graph.nodes if n.op == "call_function" and (m := _module(n, weights)) is not None}
    roots = {root for n in nodes if (root := _path(n).root)}
    found: dict[fx.Node, tuple[str, nn.Module, fx.Node]] = {}
    known: dict[str, nn.Module] = {}
    names: dict[object, str] = {}
    for node, module in nodes.items():
        root, path, _, key = _path(node)
        first = ".".join(filter(None, [root if len(roots) > 1 else "", path])) or "0"
        what = (key, repr(module), tuple(id(t) for t in (*module.parameters(), *module.buffers())))
        if what not in names:  # a layer that is called again, be it by another name, is one module
            options = (first if i == 0 else f"{first}_{i}" for i in count())
            names[what] = next(name for name in options if name not in known)
        module = known.setdefault(names[what], module)
        found[node] = (names[what], module, _arguments(node)["input"])
    return found


class _Path(NamedTuple):
    """Where a node is: the variable that holds the model, the name in it, and the module's class and identity."""

    root: str
    name: str
    cls: type
    key: str


def _path(node: fx.Node) -> _Path:
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    if not stack:
        return _Path("", "", object, "")
    key, (text, cls) = stack[-1]
    match = re.match(r"[LG]\['([^']+)'\](.*)$", text)
    root, rest = match.groups() if match else ("", text)
    parts = [p for p in re.split(r"\W+", re.sub(r"@\d+", "", rest)) if p not in ("", "_modules", "_orig_mod")]
    return _Path(root, ".".join(parts), cls if isinstance(cls, type) else object, str(key).partition("@")[0])


def _layer(node: fx.Node) -> type[nn.Module] | None:
    """Return the stock layer whose call the function is; None where other code calls it, such as a subclass."""
    cls = _LAYERS[node.target][0] if node.target in _LAYERS else None
    return cls if cls in LAYERS and cls is _path(node).cls else None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by name, with defaults filled in."""
    names = _NORM if node.target is F.batch_norm else _LAYERS[node.target][1]
    return {**names, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _module(node: fx.Node, weights: dict[str, Tensor]) -> nn.Module | None:
    """Return the stock module that a function's call stands for, around the very same weights, or None."""
    if node.target is not F.batch_norm and _layer(node) is None:
        return None
    given = _arguments(node)
    tensors: dict[str, Tensor | None] = {}
    for key, value in given.items():
        if key == "input":
            if not isinstance(value, fx.Node):
                return None
        elif isinstance(value, fx.Node):
            tensor = weights.get(value.name)
            plain = type(tensor) is nn.Parameter or (key.startswith("running_") and type(tensor) is Tensor)
            if tensor is None or not plain or not tensor.is_floating_point():
                return None  # computed, as where it is parametrized, or of a kind that is not ours to cut
            tensors[key] = tensor
        elif isinstance(value, (list, tuple)) and any(isinstance(v, fx.Node) for v in value):
            return None
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k not in tensors and k != "input"}
    return _norm(node, options, tensors) if node.target is F.batch_norm else _stock(node, options, tensors)


def _stock(node: fx.Node, options: dict[str, Any], tensors: dict[str, Tensor | None]) -> nn.Module | None:
    cls, weight = _LAYERS[node.target][0], tensors.get("weight")
    if weight is None:
        return None
    new: nn.Module
    if cls is nn.Linear:
        if weight.dim() != 2:
            return None
        new = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    else:
        options.pop("bias", None)
        outer, inner = weight.shape[0], weight.shape[1] * options["groups"]
        sizes = (outer, inner) if "output_padding" in options else (inner, outer)
        new = cls(*sizes, tuple(weight.shape[2:]), device="meta", **options)
    new.register_parameter("weight", weight)  # type: ignore[arg-type]
    new.register_parameter("bias", tensors.get("bias"))  # type: ignore[arg-type]
    return new


def _norm(node: fx.Node, options: dict[str, Any], tensors: dict[str, Tensor | None]) -> nn.Module | None:
    cls = next((c for c in BATCH_NORMS if c is _path(node).cls), None)
    mean = tensors.get("running_mean")
    if cls is None or options.get("training") or mean is None or tensors.get("running_var") is None:
        return None
    affine = tensors.get("weight") is not None
    if affine != (tensors.get("bias") is not None):
        return None
    new: nn.Module = cls(len(mean), options["eps"], options["momentum"], affine=affine, device="meta")
    for key, tensor in tensors.items():
        (new._buffers if key.startswith("running_") else new._parameters)[key] = tensor  # type: ignore[assignment]
    new._buffers["num_batches_tracked"] = None
    return new


def _call(graph: fx.Graph, module: nn.Module, path: str, value: fx.Node, fetch: Any) -> fx.Node:
    """Add the function that a module's forward is."""
    if isinstance(module, nn.Identity):
        return value
    if type(module) is nn.Sequential:
        for name, child in module.named_children():
            value = _call(graph, child, f"{path}.{name}", value, fetch)
        return value

    def get(key: str) -> fx.Node | None:
        tensor = getattr(module, key)
        return None if tensor is None else fetch(tensor, f"{path}.{key}")

    args: tuple[Any, ...]
    if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
        args = (value, get("running_mean"), get("running_var"), get("weight"), get("bias"))
        return graph.call_function(F.batch_norm, (*args, False, module.momentum, module.eps))
    function = _FUNCTIONS.get(type(module))
    if function is None or getattr(module, "padding_mode", "zeros") != "zeros":
        raise FxlrdError(
            f"{path}: a {type(module).__name__} that a pass left cannot go into torch.compile's graph: "
            "use fxlrd.compress(model, …), then torch.compile(result.model)"
        )
    args = (value, get("weight"), get("bias"))
    options = [k for k in _LAYERS[function][1] if k not in ("input", "weight", "bias")]
    return graph.call_function(function, (*args, *(getattr(module, k) for k in options)))


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node:
    new = graph.node_copy(node)
    if hasattr(node, "_dynamo_source"):
        new._dynamo_source = node._dynamo_source
    return new


def _keep_metadata(new: fx.GraphModule, gm: fx.GraphModule) -> None:
    """Let AOTAutograd know the graph as Dynamo's, where it looks for what is static: placeholders with a source."""
    sources = getattr(gm, "_param_name_to_source", None) or {}
    attributes = [name for kind in (new.named_parameters, new.named_buffers) for name, _ in kind()]
    if "dynamo_compile_id" in gm.meta and all(name in sources for name in attributes):
        new.meta.update(gm.meta)
        found: Any = {name: sources[name] for name in attributes}
        new._param_name_to_source = found
