"""A rewritten graph back as the graph of functions that torch.compile's backends get, see `fxlrd.capturing.dynamo`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxlrd.capturing.dynamo import Raised
from fxlrd.capturing.dynamo_attention import close_untouched
from fxlrd.capturing.functions import AUTOCAST_INVERSE, STATIC
from fxlrd.errors import FxlrdError
from fxlrd.graph.code import let_write
from fxlrd.graph.surgery import attribute
from fxlrd.layers.functions import CALLS, FUNCTIONS, TENSORS
from fxlrd.layers.kinds import BATCH_NORMS


@dataclass(frozen=True)
class Lowered:
    """A lowered graph.

    Attributes:
        factors: the factors by name, in the order of their placeholders or attributes.
        sources: the names of the nodes in Dynamo's graph of the weights that the factors were computed from.
    """

    graph_module: fx.GraphModule
    factors: dict[str, Tensor]
    sources: tuple[str, ...]


def lower_graph(result: fx.GraphModule, raised: Raised, gm: fx.GraphModule, frozen: bool) -> Lowered:
    """Return the rewritten ``result`` of a raised graph as a graph with the placeholders of Dynamo's graph ``gm``.

    With ``frozen``, factors are attributes (Parameters) of the graph module, otherwise placeholders.
    """
    modules = {name: call.module for name, call in raised.modules.items()}
    closed = close_untouched(result, raised.opened.functions, modules)
    raised = replace(
        raised,
        modules={name: call for name, call in raised.modules.items() if name not in closed["projections"]},
        reads=raised.reads | {name: name for name in closed["weights"]},
    )
    return _Lowering(result, raised, gm, frozen).lowered()


class _Lowering:
    """Builds a lowered graph, node by node of the rewritten one.

    Attributes:
        graph: the new graph.
        attributes: what its get_attr and call_module nodes stand for.
        factors: the tensors that Dynamo's graph does not have, by name.
    """

    def __init__(self, result: fx.GraphModule, raised: Raised, gm: fx.GraphModule, frozen: bool) -> None:
        self.result, self.raised, self.gm, self.frozen = result, raised, gm, frozen
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.factors: dict[str, Tensor] = {}
        self._sources = {n.name: n for n in raised.opened.graph_module.graph.nodes}
        self._weight_names = {id(t): name for name, t in raised.weights.items()}
        self._originals = {n.name: _copied(self.graph, n) for n in gm.graph.find_nodes(op="placeholder")}
        self._last_placeholder = next(iter(reversed(self.graph.nodes)), None)
        self._factor_nodes: dict[int, fx.Node] = {}
        self._untouched: set[str] = set()
        inputs = [n.name for n in gm.graph.find_nodes(op="placeholder") if n.name not in raised.weights]
        placeholders = result.graph.find_nodes(op="placeholder")
        self._nodes = {n: self._originals[name] for n, name in zip(placeholders, inputs, strict=True)}

    def lowered(self) -> Lowered:
        """Return the whole graph, lowered."""
        visit = {
            "placeholder": self.visit_placeholder,
            "get_attr": self.visit_get_attr,
            "call_module": self.visit_call_module,
        }
        for node in self.result.graph.nodes:
            new = visit.get(node.op, self.visit_other)(node)
            self._nodes[node] = new
            if new.op not in ("placeholder", "get_attr"):
                new.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        let_write(self.graph, list(self.attributes))
        gm = fx.GraphModule(self.attributes, self.graph, class_name="Lowered")
        _copy_metadata(gm, self.gm)
        return Lowered(gm, self.factors, self._replaced_weights())

    def visit_placeholder(self, node: fx.Node) -> fx.Node:
        """Return the placeholder of Dynamo's graph."""
        return self._nodes[node]

    def visit_get_attr(self, node: fx.Node) -> fx.Node:
        """Return the original node of a weight, the node of a factor, or a copy."""
        target = str(node.target)
        if target in self.raised.reads:
            return self.original(self.raised.reads[target])
        value = attribute(self.result, target)
        self.attributes[target] = value
        return self.fetch(value, target) if isinstance(value, Tensor) else self.graph.node_copy(node)

    def visit_call_module(self, node: fx.Node) -> fx.Node:
        """Return the original call of a layer that no pass replaced, a module of the user's, or a new function."""
        target = str(node.target)
        module = self.result.get_submodule(target)
        source = self.raised.modules.get(target)
        (value,) = node.args
        assert isinstance(value, fx.Node)
        if source is not None and module is source.module:
            self._untouched.add(target)
            operand = {source.input: self._nodes[value]}
            return self.graph.node_copy(source.node, lambda n: operand.get(n) or self.of_weights(n))
        if source is None and any(target == str(n.target) for n in self._sources.values()):
            self.attributes[target] = module
            return self.graph.node_copy(node, self._nodes.__getitem__)
        return self.call(module, target, self._nodes[value])

    def visit_other(self, node: fx.Node) -> fx.Node:
        """Return a copy of a function, a method or the output."""
        new = self.graph.node_copy(node, self._nodes.__getitem__)
        new.target = AUTOCAST_INVERSE.get(node.target, node.target)
        return new

    def original(self, name: str) -> fx.Node:
        """Return the node of Dynamo's graph with this name, an input or a weight."""
        if name not in self._originals:
            node = self._sources[name]
            if node.op not in ("placeholder", "get_attr"):  # a view of a packed weight
                return self._originals.setdefault(name, self.graph.node_copy(node, self.of_weights))
            self.attributes[str(node.target)] = self.raised.weights[name]
            self._originals[name] = _copied(self.graph, node)
        return self._originals[name]

    def of_weights(self, node: fx.Node) -> fx.Node:
        """Return a weight's node, or a copy of a function of weights."""
        if node.op in ("placeholder", "get_attr"):
            return self.original(node.name)
        return self.graph.node_copy(node, self.of_weights)

    def fetch(self, tensor: Tensor, path: str) -> fx.Node:
        """Return the node of a weight of Dynamo's graph, or of the factor called ``path``."""
        if (weight := self._weight_names.get(id(tensor))) is not None:
            return self.original(weight)
        if id(tensor) not in self._factor_nodes:
            name = "fxlrd_" + re.sub(r"\W", "_", path)
            while name in self.factors:
                name += "_"
            self.factors[name] = tensor.detach()
            self._factor_nodes[id(tensor)] = self._frozen_factor(name) if self.frozen else self._static_factor(name)
        return self._factor_nodes[id(tensor)]

    def _frozen_factor(self, name: str) -> fx.Node:
        self.attributes[name] = nn.Parameter(self.factors[name], requires_grad=False)
        return self.graph.get_attr(name)

    def _static_factor(self, name: str) -> fx.Node:
        assert self._last_placeholder is not None, "weights that are not frozen are placeholders"
        with self.graph.inserting_after(self._last_placeholder):
            node = self.graph.placeholder(name)
        node.meta["tensor_dict"] = {STATIC: "unguarded"}
        node._dynamo_source = None
        self._last_placeholder = node
        return node

    def call(self, module: nn.Module, path: str, value: fx.Node) -> fx.Node:
        """Return the functions that a module's forward calls. Raises FxlrdError for a module that has none."""
        if isinstance(module, nn.Identity):
            return value
        if type(module) is nn.Sequential:
            for name, child in module.named_children():
                value = self.call(child, f"{path}.{name}", value)
            return value

        def fetch(key: str) -> fx.Node | None:
            tensor = getattr(module, key)
            return None if tensor is None else self.fetch(tensor, f"{path}.{key}")

        if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
            tensors = (fetch("running_mean"), fetch("running_var"), fetch("weight"), fetch("bias"))
            return self.graph.call_function(F.batch_norm, (value, *tensors, False, module.momentum, module.eps))
        function = FUNCTIONS.get(type(module))
        if function is None or getattr(module, "padding_mode", "zeros") != "zeros":
            raise FxlrdError(
                f"{path}: a {type(module).__name__} that a pass left cannot go into torch.compile's graph: "
                "use fxlrd.compress(model, …), then torch.compile(result.model)"
            )
        settings = tuple(getattr(module, name) for name in CALLS[function][1] if name not in TENSORS)
        return self.graph.call_function(function, (value, fetch("weight"), fetch("bias"), *settings))

    def _replaced_weights(self) -> tuple[str, ...]:
        replaced = [call for name, call in self.raised.modules.items() if name not in self._untouched]
        packed = self.raised.opened.packed
        names = {packed.get(name, name) for call in replaced for name in call.weights}
        return tuple(name for name in self.raised.weights if name in names)


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node:
    new = graph.node_copy(node)
    if hasattr(node, "_dynamo_source"):
        new._dynamo_source = node._dynamo_source
    return new


def _copy_metadata(new: fx.GraphModule, gm: fx.GraphModule) -> None:
    """Copy what AOTAutograd reads of Dynamo's graph to tell which placeholders are static."""
    sources = getattr(gm, "_param_name_to_source", None) or {}
    attributes = [name for kind in (new.named_parameters, new.named_buffers) for name, _ in kind()]
    if "dynamo_compile_id" in gm.meta and all(name in sources for name in attributes):
        new.meta.update(gm.meta)
        attribute_sources: Any = {name: sources[name] for name in attributes}
        new._param_name_to_source = attribute_sources
