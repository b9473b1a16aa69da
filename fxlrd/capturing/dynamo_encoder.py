"""Encoder layers in Dynamo's graphs, which run as one function in eval mode, as the functions that they are made of.

    _transformer_encoder_layer_fwd(x, …)   →   layer_norm, multi_head_attention_forward, linear, relu or gelu, linear, +

as nn.TransformerEncoderLayer computes them where it takes no fast path.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

FUNCTION = torch._transformer_encoder_layer_fwd
STACK = "nn_module_stack"
"""Where Dynamo records of a node in which modules it was called."""
_ARGUMENTS = (
    *("src", "embed_dim", "num_heads", "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias"),
    *("use_gelu", "norm_first", "eps", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"),
    *("linear1_weight", "linear1_bias", "linear2_weight", "linear2_bias", "mask", "mask_type"),
)
_PADDING, _MERGED = 1, 2
"""Types of masks: of padded keys, and of all heads of all inputs. A type of 0 is of one attention mask for all."""


def with_encoder_layers(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph of Dynamo's with the functions of its encoder layers, or the graph if it has none."""
    if not any(_can_be_expanded(node) for node in gm.graph.find_nodes(op="call_function", target=FUNCTION)):
        return gm
    copy = copied(gm)
    for node in list(copy.graph.find_nodes(op="call_function", target=FUNCTION)):
        if _can_be_expanded(node):
            _Expansion(node).replace()
    return copy


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph of Dynamo's, with the same names and what Dynamo noted on its nodes."""
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, values))
    for old, new in values.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return fx.GraphModule(gm, graph)


def inside(node: fx.Node, name: str, kind: type[nn.Module]) -> dict[str, Any]:
    """Return where a module is that the module which calls ``node`` holds, as Dynamo says it of its calls."""
    stack = dict(node.meta.get(STACK) or {})
    key, (path, _) = next(reversed(stack.items()), ("", ("", None)))
    module, at, call = str(key).partition("@")  # such as …@1 in the second call of a module
    return {**stack, f"{module}.{name}{at}{call}": (f"{path}.{name}" if path else name, kind)}


def _can_be_expanded(node: fx.Node) -> bool:
    values = dict(zip(_ARGUMENTS, node.args, strict=False))
    examples = [v.meta.get("example_value") for v in (values.get("src"), values.get("mask")) if isinstance(v, fx.Node)]
    known = len(values) == len(_ARGUMENTS) and not node.kwargs
    return known and all(isinstance(example, Tensor) and not example.is_nested for example in examples)


class _Expansion:
    """The replacement of one function."""

    def __init__(self, node: fx.Node) -> None:
        self.node, self.graph = node, node.graph
        self.values: dict[str, Any] = dict(zip(_ARGUMENTS, node.args, strict=True))

    def replace(self) -> None:
        """Replace the function in its graph."""
        x = self.values["src"]
        with self.graph.inserting_before(self.node):
            if self.values["norm_first"]:
                x = self._add(x, self._attention(self._norm("norm1", x)))
                x = self._add(x, self._feed_forward(self._norm("norm2", x)))
            else:
                x = self._norm("norm1", self._add(x, self._attention(x)))
                x = self._norm("norm2", self._add(x, self._feed_forward(x)))
        self.node.replace_all_uses_with(x)
        self.graph.erase_node(self.node)

    def _call(self, function: Callable[..., Any], *args: Any, module: tuple[str, Any] | None = None) -> fx.Node:
        """Append a function whose value has as many axes as the layer's input."""
        new = self.graph.call_function(function, args)
        new.meta = {"example_value": self.values["src"].meta["example_value"]}
        new.meta[STACK] = self.node.meta.get(STACK) if module is None else inside(self.node, *module)
        return new

    def _add(self, x: fx.Node, y: fx.Node) -> fx.Node:
        return self._call(operator.add, x, y)

    def _norm(self, name: str, x: fx.Node) -> fx.Node:
        weight, bias = self.values[f"{name}_weight"], self.values[f"{name}_bias"]
        shape = (self.values["embed_dim"],)
        return self._call(F.layer_norm, x, shape, weight, bias, self.values["eps"], module=(name, nn.LayerNorm))

    def _linear(self, name: str, x: fx.Node) -> fx.Node:
        weight, bias = self.values[f"{name}_weight"], self.values[f"{name}_bias"]
        return self._call(F.linear, x, weight, bias, module=(name, nn.Linear))

    def _feed_forward(self, x: fx.Node) -> fx.Node:
        activation = F.gelu if self.values["use_gelu"] else F.relu
        return self._linear("linear2", self._call(activation, self._linear("linear1", x)))

    def _attention(self, x: fx.Node) -> fx.Node:
        values, swapped = self.values, self._call(torch.transpose, x, 0, 1)
        mask, padding = self._masks()
        attention = self._call(
            F.multi_head_attention_forward,
            *(swapped, swapped, swapped, values["embed_dim"], values["num_heads"]),
            *(values["in_proj_weight"], values["in_proj_bias"], None, None, False, 0.0),
            *(values["out_proj_weight"], values["out_proj_bias"], False, padding, False, mask),
            module=("self_attn", nn.MultiheadAttention),
        )
        return self._call(torch.transpose, self._call(operator.getitem, attention, 0), 0, 1)

    def _masks(self) -> tuple[fx.Node | None, fx.Node | None]:
        """Return the mask of attention and that of padded keys."""
        mask, kind = self.values["mask"], self.values["mask_type"]
        if kind == _PADDING:
            return None, mask
        if kind != _MERGED:
            return mask, None
        merged = self._call(torch.flatten, mask, 0, 1)
        merged.meta["example_value"] = mask.meta["example_value"].flatten(0, 1)
        return merged, None
