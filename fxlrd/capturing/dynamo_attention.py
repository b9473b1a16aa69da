"""Attention in Dynamo's graphs: one function, which is given packed weights, and the layers that it is made of.

    multi_head_attention_forward(query, key, value, …)   ⇄   linear(query, …), linear(key, …), linear(value, …),
                                                             scaled_dot_product_attention, linear

To *open* such a call is to replace it by what `fxlrd.layers.attention` computes, with views of the packed weights. A
call of which no pass replaced a projection is closed again: it is the original function on the original weights.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

from fxlrd.capturing.dynamo_encoder import STACK, copied, inside, with_encoder_layers
from fxlrd.graph.attentions import READERS, close_call, fuse_unread_weights, parts_of_calls, record_parts
from fxlrd.layers.attention import PROJECTIONS, MaskForm, ProjectedAttention

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_UNSUPPORTED = ("bias_k", "bias_v", "static_k", "static_v")
_CALL = (*READERS.values(), "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
"""The arguments that an attention module is called with as well."""
_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass
class Opened:
    """A graph of Dynamo's with open attentions.

    Attributes:
        graph_module: the graph.
        parts: the nodes of the three views of each packed weight, by the name of the weight's node.
        views: the views, by the names of their nodes.
        functions: the functions that were opened, nodes of the graph that came in, by their names.
    """

    graph_module: fx.GraphModule
    parts: dict[str, list[fx.Node]] = field(default_factory=dict)
    views: dict[str, Tensor] = field(default_factory=dict)
    functions: dict[str, fx.Node] = field(default_factory=dict)

    @property
    def packed(self) -> dict[str, str]:
        """For the node of each view of a packed weight, the name of the weight's node."""
        return {view.name: name for name, views in self.parts.items() for view in views}


def open_calls(gm: fx.GraphModule, weights: Mapping[str, Tensor]) -> Opened:
    """Return a graph of Dynamo's with its attentions open, or the graph itself where it has none that can be.

    So are those of encoder layers that run as one function (`fxlrd.capturing.dynamo_encoder`).
    """
    gm = with_encoder_layers(gm)
    functions = {node.name: node for node in _functions(gm.graph) if _can_be_opened(node, weights)}
    if not functions:
        return Opened(gm)
    opened = Opened(copied(gm), functions=functions)
    for node in list(_functions(opened.graph_module.graph)):
        if node.name in functions:
            _Opening(node, weights, opened).replace()
    return opened


def _functions(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=F.multi_head_attention_forward))


def bound(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of `multi_head_attention_forward` by name, defaults included."""
    values = _SIGNATURE.bind(*node.args, **node.kwargs)
    values.apply_defaults()
    return values.arguments


def _can_be_opened(node: fx.Node, weights: Mapping[str, Tensor]) -> bool:
    values = bound(node)
    tensors = [values[key] for key in ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias", *_WEIGHTS)]
    inputs = [value for key in _CALL if isinstance(value := values[key], fx.Node)]
    return (
        all(values[key] is None for key in _UNSUPPORTED)
        and not values["add_zero_attn"]
        and all(t is None or (isinstance(t, fx.Node) and _is_plain(weights.get(t.name))) for t in tensors)
        and all(isinstance(value.meta.get("example_value"), Tensor) for value in inputs)
        and all(user.target is operator.getitem and user.args[1] in (0, 1) for user in node.users)
    )


def _is_plain(weight: Tensor | None) -> bool:
    return type(weight) is nn.Parameter and weight.is_floating_point()


def _erase_unused(nodes: Iterable[fx.Node]) -> None:
    for node in reversed(list(nodes)):
        if not node.users and not node.is_impure():
            node.graph.erase_node(node)


class _Opening:
    """The replacement of one function by what it is made of."""

    def __init__(self, node: fx.Node, weights: Mapping[str, Tensor], opened: Opened) -> None:
        self.node, self.weights, self.opened = node, weights, opened
        self.values = bound(node)
        self.tracer = GraphAppendingTracer(node.graph)
        self.linears: dict[str, fx.Node] = {}

    def replace(self) -> None:
        """Replace the function in its graph."""
        graph, before = self.node.graph, set(self.node.graph.nodes)
        with graph.inserting_before(self.node):
            attention = self._attention()
            arguments = {key: self._proxied(self.values[key]) for key in _CALL}
            outputs = [v.node if isinstance(v, fx.Proxy) else v for v in attention(**arguments)]
        new = [node for node in graph.nodes if node not in before]
        readers = {self.linears[role]: argument for role, argument in READERS.items()}
        given = {key: self.values[key] for key in _CALL}
        record_parts(self.node.name, 0, new, readers, given, outputs)
        for node in new:
            node.meta.update({key: self.node.meta[key] for key in (STACK, "stack_trace") if key in self.node.meta})
        for role, node in self.linears.items():
            node.meta[STACK] = inside(self.node, role, nn.Linear)
        for user in list(self.node.users):
            output = outputs[int(str(user.args[1]))]
            output.meta["example_value"] = user.meta.get("example_value")
            user.replace_all_uses_with(output)
            graph.erase_node(user)
        graph.erase_node(self.node)
        _erase_unused(new)
        fuse_unread_weights(graph)
        remaining = set(graph.nodes)
        _erase_unused(node for node in new if node in remaining)

    def _proxied(self, value: Any) -> Any:
        return fx.Proxy(value, self.tracer) if isinstance(value, fx.Node) else value

    def _attention(self) -> ProjectedAttention:
        """Return an attention whose projections are linear functions of the graph."""
        values = self.values
        attention = ProjectedAttention.__new__(ProjectedAttention)
        nn.Module.__init__(attention)
        heads = values["num_heads"]
        options = {"num_heads": heads, "head_dim": values["embed_dim_to_check"] // heads, "batch_first": False}
        options |= {"dropout": values["dropout_p"], "training": values["training"], "traced_masks": self._masks()}
        weights: Sequence[Any] = [values[key] for key in _WEIGHTS]
        if not values["use_separate_proj_weight"]:
            weights = self._views(values["in_proj_weight"])
        biases = self._views(values["in_proj_bias"])
        pairs = [*zip(weights, biases, strict=True), (values["out_proj_weight"], values["out_proj_bias"])]
        linears = {role: self._linear(role, *pair) for role, pair in zip(PROJECTIONS, pairs, strict=True)}
        vars(attention).update(options | linears)
        return attention

    def _masks(self) -> MaskForm:
        masks = [self.values[key] for key in ("attn_mask", "key_padding_mask")]
        examples = [None if mask is None else mask.meta["example_value"] for mask in masks]
        return MaskForm.of(self.values["query"].meta["example_value"], *examples)

    def _views(self, packed: fx.Node | None) -> Sequence[fx.Node | None]:
        """Return the nodes of the three parts of a packed weight or bias: the same for all calls of an attention."""
        if packed is None:
            return [None] * 3
        if packed.name not in self.opened.parts:
            graph, weight = self.node.graph, self.weights[packed.name]
            chunk = graph.call_method("chunk", (packed, 3))
            views = [graph.call_function(operator.getitem, (chunk, i)) for i in range(3)]
            self.opened.parts[packed.name] = views
            for view, part in zip(views, weight.detach().chunk(3), strict=True):
                self.opened.views[view.name] = nn.Parameter(part, weight.requires_grad)
        return self.opened.parts[packed.name]

    def _linear(self, role: str, weight: fx.Node, bias: fx.Node | None) -> Callable[[fx.Proxy], fx.Proxy]:
        def linear(x: fx.Proxy) -> fx.Proxy:
            self.linears[role] = self.node.graph.call_function(F.linear, (x.node, weight, bias))
            return fx.Proxy(self.linears[role], self.tracer)

        return linear


def close_untouched(
    gm: fx.GraphModule, functions: Mapping[str, fx.Node], modules: Mapping[str, nn.Module]
) -> dict[str, list[str]]:
    """Close the attentions of a raised graph, in place, whose four projections are still those of ``modules``.

    The functions read weights as attributes with the names of the weights' nodes. Return these, and the projections.
    """
    closed: dict[str, list[str]] = {"weights": [], "projections": []}
    for parts in parts_of_calls(gm):
        part = next(iter(parts.values()))
        targets = [str(node.target) for node in parts if node.op == "call_module"]
        as_they_were = len(targets) == len(PROJECTIONS) and all(gm.get_submodule(t) is modules.get(t) for t in targets)
        if as_they_were and not dict(part.options)["is_causal"]:  # else its mask is not read
            close_call(gm.graph, parts, partial(_function, gm.graph, functions[part.name], closed["weights"]))
            closed["projections"] += targets
    return closed


def _function(
    graph: fx.Graph, function: fx.Node, weights: list[str], inputs: tuple[Any, ...], arguments: Mapping[str, Any]
) -> fx.Node:
    """Append a copy of a function to ``graph``, which has its inputs; add the weights that it reads to ``weights``."""
    values = bound(function)
    given = {**dict(zip(READERS.values(), inputs, strict=True)), **arguments}
    nodes = {values[key]: given[key] for key in _CALL if isinstance(values[key], fx.Node)}

    def mapped(node: fx.Node) -> fx.Node:
        if node in nodes:
            return nodes[node]
        weights.append(node.name)
        return graph.create_node("get_attr", node.name)

    return graph.node_copy(function, mapped)
