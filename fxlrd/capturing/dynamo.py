"""Dynamo graph ⇄ GraphModule of stock modules.

torch.compile hands a backend a graph of functions on tensors. Weights are arguments of the graph (placeholders) or,
while Inductor freezes weights, attributes (get_attr). To *raise* the graph is to replace each call of a stock module's
function by a call of that module, around the very same Parameters, under the name that the layer has in the model:

    conv2d(x, weight, bias, stride, …)      →     layer1.0.conv1(x)

Only calls of modules that are layers are raised (`fxlrd.capturing.products`); an `F.linear` in a forward that does
more stays a function. What else reads a weight reads it as an attribute. The placeholders that remain are the model's
inputs.

To *lower* the rewritten graph is the inverse: the original placeholders, in their order, and a function for each
module. A layer that no pass touched is the original call of the original function on the original placeholder, so that
a compiler treats its weights as before. Only factors are new: placeholders after the others, marked static as Dynamo
marks weights, or attributes while weights are frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake

from fxlrd.capturing.dynamo_attention import Opened, open_calls
from fxlrd.capturing.functions import AUTOCAST, STATIC, path_of
from fxlrd.capturing.products import LayerCall, layer_calls
from fxlrd.graph.code import let_write
from fxlrd.graph.surgery import attribute, is_reserved
from fxlrd.layers.kinds import LAYERS


@dataclass
class Raised:
    """A raised graph.

    Attributes:
        weights: all weights, by the name of their node in Dynamo's graph.
        modules: by name, each module that a function was raised to, with the last such function of Dynamo's graph.
        reads: by the attribute of the graph module, the name of the node of each weight that is read directly.
        opened: Dynamo's graph with its attentions open, which was raised.
    """

    graph_module: fx.GraphModule
    weights: dict[str, Tensor]
    modules: dict[str, LayerCall] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    opened: Opened = field(kw_only=True)


def has_layers(gm: fx.GraphModule, weights: Mapping[str, Tensor]) -> bool:
    """Whether any function of a Dynamo graph is the call of a layer."""
    opened = open_calls(gm, weights)
    calls = layer_calls(opened.graph_module, {**weights, **opened.views})
    return any(isinstance(call.module, LAYERS) for call in calls.values())


def weights_of(gm: fx.GraphModule, values: Sequence[Any]) -> dict[str, Tensor]:
    """Return the weights of a Dynamo graph by the name of their node; ``values`` are those of the placeholders."""
    weights = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, values, strict=True):
        static = bool((node.meta.get("tensor_dict") or {}).get(STATIC)) or isinstance(value, nn.Parameter)
        if static and isinstance(value, Tensor) and not is_fake(value):
            weights[node.name] = value
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(value := attribute(gm, str(node.target)), Tensor):
            weights[node.name] = value
    return weights


def raise_graph(gm: fx.GraphModule, weights: dict[str, Tensor]) -> Raised:
    """Return a Dynamo graph as calls of stock modules around ``weights``, in eval mode; ``gm`` is not changed.

    Buffers that are read directly are copies: a run of the raised graph does not change those of the model.
    """
    opened = open_calls(gm, weights)
    gm, weights = opened.graph_module, {**weights, **opened.views}
    sites = _sites(gm, weights)
    graph = fx.Graph()
    attributes: dict[str, Any] = {name: call.module for name, call in sites.values()}
    absorbed = _absorbed(sites)
    # A layer's weight that is read directly as well is read as an attribute of the layer.
    owners = {id(p): f"{name}.{key}" for name, m in attributes.items() for key, p in m.named_parameters()}
    nodes: dict[fx.Node, fx.Node] = {}
    reads: dict[str, str] = {}

    def raised(node: fx.Node) -> fx.Node:
        if node not in nodes:
            weight = weights[node.name]
            target = owners.get(id(weight), node.name)
            attributes[target] = weight if isinstance(weight, nn.Parameter) else weight.clone()
            reads[target] = node.name
            nodes[node] = graph.get_attr(target)
        return nodes[node]

    for node in gm.graph.nodes:
        if node in sites:
            name, call = sites[node]
            nodes[node] = graph.call_module(name, (raised(call.input),))
            nodes[node].meta = dict(node.meta)
        elif node.name not in weights and node not in absorbed:
            if node.op in ("get_attr", "call_module"):
                attributes[str(node.target)] = attribute(gm, str(node.target))
            nodes[node] = graph.node_copy(node, raised)
            nodes[node].target = AUTOCAST.get(node.target, node.target)
    let_write(graph, list(attributes))
    new = fx.GraphModule(attributes, graph, class_name="Raised")
    return Raised(new.eval(), weights, dict(sites.values()), reads, opened=opened)


def _sites(gm: fx.GraphModule, weights: Mapping[str, Tensor]) -> dict[fx.Node, tuple[str, LayerCall]]:
    """Return the calls of modules by their nodes, each with a name for the module: that of its place in the model."""
    calls = layer_calls(gm, weights)
    roots = {root for n in calls if (root := path_of(n).root)}
    sites: dict[fx.Node, tuple[str, LayerCall]] = {}
    modules: dict[str, nn.Module] = {}
    names: dict[object, str] = {}
    for node, call in calls.items():
        root, path, _, key = path_of(node)
        first = ".".join(filter(None, [root if len(roots) > 1 else "", path])) or "0"
        first = f"model.{first}" if is_reserved(first) else first
        identity = (key, repr(call.module), tuple(id(weights[name]) for name in call.weights))
        if identity not in names:  # a layer that is called again, also by another name, is one module
            options = (first if i == 0 else f"{first}_{i}" for i in count())
            names[identity] = next(name for name in options if name not in modules)
        name = names[identity]
        sites[node] = name, replace(call, module=modules.setdefault(name, call.module))
    return sites


def _absorbed(sites: Mapping[fx.Node, tuple[str, LayerCall]]) -> set[fx.Node]:
    """Return the functions that prepare weights for calls of layers, and for nothing else."""
    absorbed: set[fx.Node] = set()
    pending = [n for node, (_, call) in sites.items() for n in node.all_input_nodes if n is not call.input]
    while pending:
        node = pending.pop()
        if node.op in ("call_function", "call_method") and all(
            user in sites or user in absorbed for user in node.users
        ):
            absorbed.add(node)
            pending += node.all_input_nodes
    return absorbed
