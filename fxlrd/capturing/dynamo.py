"""Dynamo graph ⇄ GraphModule of stock modules.

torch.compile hands a backend a graph of functions on tensors. Weights are arguments of the graph (placeholders) or,
while Inductor freezes weights, attributes (get_attr). To *raise* the graph is to replace each call of a stock module's
function by a call of that module, around the very same Parameters, under the name that the layer has in the model:

    conv2d(x, weight, bias, stride, …)      →     layer1.0.conv1(x)

Only calls made by a stock module's own forward are raised; an `F.linear` written in user code stays a function. What
else reads a weight reads it as an attribute. The placeholders that remain are the model's inputs.

To *lower* the rewritten graph is the inverse: the original placeholders, in their order, and a function for each
module. A layer that no pass touched is the original call of the original function on the original placeholder, so that
a compiler treats its weights as before. Only factors are new: placeholders after the others, marked static as Dynamo
marks weights, or attributes while weights are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake

from fxlrd.capturing.functions import AUTOCAST, STATIC, arguments, layer_class, module_of, path_of
from fxlrd.graph.surgery import attribute


@dataclass
class Raised:
    """A raised graph.

    Attributes:
        weights: all weights, by the name of their node in Dynamo's graph.
        modules: by name, each module that a function was raised to, with the function's node in Dynamo's graph.
        reads: by the attribute of the graph module, the name of the node of each weight that is read directly.
    """

    graph_module: fx.GraphModule
    weights: dict[str, Tensor]
    modules: dict[str, tuple[nn.Module, fx.Node]] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)


def has_layers(gm: fx.GraphModule) -> bool:
    """Whether any function of a Dynamo graph is the call of a layer."""
    return any(n.op == "call_function" and layer_class(n) is not None for n in gm.graph.nodes)


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
    sites = _sites(gm, weights)
    graph = fx.Graph()
    attributes: dict[str, Any] = {site.name: site.module for site in sites.values()}
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
        if (site := sites.get(node)) is not None:
            nodes[node] = graph.call_module(site.name, (raised(site.input),))
            nodes[node].meta = dict(node.meta)
        elif node.name not in weights:
            if node.op in ("get_attr", "call_module"):
                attributes[str(node.target)] = attribute(gm, str(node.target))
            nodes[node] = graph.node_copy(node, raised)
            nodes[node].target = AUTOCAST.get(node.target, node.target)
    new = fx.GraphModule(attributes, graph, class_name="Raised")
    return Raised(new.eval(), weights, {site.name: (site.module, node) for node, site in sites.items()}, reads)


class _Site(NamedTuple):
    """A function of Dynamo's graph that is the call of a module: the module, its name, and the node of its input."""

    name: str
    module: nn.Module
    input: fx.Node


def _sites(gm: fx.GraphModule, weights: dict[str, Tensor]) -> dict[fx.Node, _Site]:
    """Return the call of a module that each function is, for those that are one."""
    calls = {n: m for n in gm.graph.nodes if n.op == "call_function" and (m := module_of(n, weights)) is not None}
    roots = {root for n in calls if (root := path_of(n).root)}
    sites: dict[fx.Node, _Site] = {}
    modules: dict[str, nn.Module] = {}
    names: dict[object, str] = {}
    for node, module in calls.items():
        root, path, _, key = path_of(node)
        first = ".".join(filter(None, [root if len(roots) > 1 else "", path])) or "0"
        identity = (key, repr(module), tuple(id(t) for t in (*module.parameters(), *module.buffers())))
        if identity not in names:  # a layer that is called again, also by another name, is one module
            options = (first if i == 0 else f"{first}_{i}" for i in count())
            names[identity] = next(name for name in options if name not in modules)
        name = names[identity]
        sites[node] = _Site(name, modules.setdefault(name, module), arguments(node)["input"])
    return sites
