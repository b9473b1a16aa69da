"""Tracing of a module with torch.fx: modules without layers stay one call, in-place arithmetic stays in place.

A copy of the module is traced, as it is called with some arguments frozen. Modules of torch.nn are leaves. So
is every module without a conv or linear inside (dropout, stochastic depth, activation blocks), so that train and eval
mode keep working on the result. So is every module with hooks, which a trace would run once and then forget.
"""

from __future__ import annotations

import enum
import inspect
import keyword
import operator
import threading
import types
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx._symbolic_trace import _assert_is_none

from fxlrd.capturing.descriptions import without_described_weights
from fxlrd.capturing.obstacles import obstacle
from fxlrd.errors import CaptureError, FxlrdError
from fxlrd.graph.attentions import fuse_unread_weights, projections_in, record_parts
from fxlrd.graph.code import unwritable
from fxlrd.graph.copies import structural_copy
from fxlrd.graph.facts import described_layers
from fxlrd.graph.guards import hooked
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.run import isolated, set_mode
from fxlrd.graph.surgery import is_reserved, set_container_mode
from fxlrd.graph.writes import guarding_weights, may_write
from fxlrd.layers.attention import ProjectedAttention
from fxlrd.layers.folded import is_layer
from fxlrd.layers.kinds import written_class


def constants(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of forward to freeze, with their values: None, numbers and strings, defaults included.

    Raises FxlrdError for inputs that do not fit forward.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise FxlrdError(f"example inputs do not fit forward{signature}: {error}") from error
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    values = {name: bound.arguments.get(name, p.default) for name, p in signature.parameters.items()}
    return {
        name: value
        for name, value in values.items()
        if (value is None or isinstance(value, (bool, int, float, str)))
        and signature.parameters[name].kind not in variadic
    }


def check_arguments(model: nn.Module, inputs: Inputs) -> None:
    """Raise CaptureError for an argument, or a default, whose value a trace would compare and never ask again."""
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if isinstance(value, (enum.Enum, np.generic)):
            raise CaptureError(f"forward takes {name}={value!r}: a trace cannot tell it from other values")


class _InPlaceProxy(fx.Proxy):
    """A proxy that records ``y += x`` as the in-place addition it is; torch.fx would make a copy of it."""


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
for _operation in _IN_PLACE:
    setattr(_InPlaceProxy, f"__{_operation.__name__}__", _in_place(_operation))


class _Tracer(fx.Tracer):
    """A tracer for which modules without layers and modules with hooks are leaves.

    torch.fx patches nn.Module for the process while it traces. Calls and attributes in other threads pass through; of
    this class one traces at a time, since each puts back what it found.

    Attributes:
        failed_in: the name of the innermost module whose forward could not be traced, and the module.
        layer_names: the names of the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.failed_in: tuple[str, nn.Module] | None = None
        # Determined now: while torch.fx traces, a module cannot be run to see what it computes.
        self.layer_names = {n for n, m in model.named_modules(remove_duplicate=False) if is_layer(m)}
        self._layers = {id(model.get_submodule(n)) for n in self.layer_names}
        self._thread = threading.get_ident()
        self._open_calls = 0

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _TRACING:
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            (super().is_leaf_module(m, module_qualified_name) and written_class(m).__module__.startswith("torch."))
            or id(m) in self._layers
            or not any(id(child) in self._layers for child in m.modules())
            or hooked(m)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        try:
            if isinstance(m, ProjectedAttention) and not self.is_leaf_module(m, self.path_of_module(m)):
                return self._call_open(m, forward, args, kwargs)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = self.path_of_module(m), m
            raise

    def _call_open(self, m: ProjectedAttention, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace an open attention. Its dropout depends on the mode that the module has in the graph."""
        name, size, training = self.path_of_module(m), len(self.graph.nodes), m.training
        if m.dropout:
            vars(m)["training"] = self.create_proxy("get_attr", f"{name}.training", (), {})
        try:
            outputs = super().call_module(m, forward, args, kwargs)
        finally:
            m.training = training
        arguments = inspect.signature(type(m).forward).bind(m, *args, **kwargs).arguments
        arguments.pop("self")
        self._open_calls += 1
        nodes = list(self.graph.nodes)[size:]
        readers = projections_in(nodes)
        record_parts(name, self._open_calls, nodes, readers, self._as_nodes(arguments), self._as_nodes(outputs))
        return outputs

    @staticmethod
    def _as_nodes(value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda v: v.node if isinstance(v, fx.Proxy) else v)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


_TRACING = threading.RLock()
CONSTANT = "_tensor_constant"
"""How names begin that torch.fx gives to tensors that forward makes."""
_SEED = 1
"""Of random numbers that are drawn in a trace. It is not that of runs, which could not tell them from constants."""


def trace(model: nn.Module, frozen: dict[str, Any]) -> tuple[fx.GraphModule, list[str]]:
    """Return the trace of a module in eval mode with some arguments frozen, and warnings about it.

    The module itself is not touched: copies of it are traced, and called by the graph; they have its parameters and
    buffers. Raises CaptureError, naming the module and the line, where it cannot be traced.
    """
    traced = structural_copy(model)
    graph, described = _graph(traced, frozen, training=False)
    check_names({str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")})
    _restore_argument_names(traced, graph, frozen)
    graph._tracer_cls = None  # pickles of the graph then need plain torch.fx only
    root = structural_copy(model)
    for name, value in vars(traced).items():
        if name.startswith(CONSTANT):
            setattr(root, name, value)
    _check_held(graph, traced, root)
    gm = fx.GraphModule(root, graph, class_name=type(model).__name__)
    described_layers.record(gm, frozenset(described))
    set_container_mode(gm, training=False)
    arguments = [f"{name}={value!r}" for name, value in frozen.items()]
    warnings = [f"frozen arguments of forward: {', '.join(arguments)}"] if arguments else []
    if hooked(model):
        warnings.append("the model's own hooks are not carried over: register them on the result")
    return gm, warnings


def _check_held(graph: fx.Graph, traced: nn.Module, root: nn.Module) -> None:
    """Raise CaptureError for what the graph takes from the traced copy and the model has not under that name.

    torch.fx leaves generators and other opaque objects there, forward the modules and buffers that it makes.
    """
    for target in sorted({str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}):
        if _attribute(root, target) is None:
            kind = type(_attribute(traced, target)).__name__
            raise CaptureError(
                f"{type(traced).__name__} cannot be traced: forward uses a {kind} that the model has not as a "
                f"parameter, buffer or module before the call ({target})"
            )


def _attribute(module: nn.Module, name: str) -> Any:
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        return None


def _graph(model: nn.Module, frozen: dict[str, Any], training: bool) -> tuple[fx.Graph, set[str]]:
    """Trace a copy of a module, on which that leaves what it does; see `trace`.

    Return the graph, and the layers that it asks for the dtype, device or shape of their weight.
    """
    set_mode(model, training)
    _use_own_forward(model)
    tracer = _Tracer(model)
    try:
        with isolated(model, _SEED), guarding_weights(model):
            graph = tracer.trace(model, frozen or None)
    except Exception as error:
        name, module = tracer.failed_in or ("", model)
        where = f"{name} ({type(module).__name__})" if name else type(module).__name__
        raise CaptureError(f"{where} cannot be traced{obstacle(error, module)}") from error
    _check_statements(model, graph)
    _plain_checks(graph)
    graph.eliminate_dead_code(partial(_is_impure, model))
    fuse_unread_weights(graph)
    graph.eliminate_dead_code(partial(_is_impure, model))
    return graph, without_described_weights(graph, model, tracer.layer_names, CONSTANT)


def _use_own_forward(model: nn.Module) -> None:
    """Let torch.fx, which traces the forward of a class, trace a method that was set on the model as its forward."""
    own = vars(model).get("forward")
    if own is None:
        return
    if not isinstance(own, types.MethodType) or own.__self__ is not model:
        raise CaptureError(f"{type(model).__name__}: its forward was replaced on the model itself, by no method of it")
    cls = type(model)
    model.__class__ = type(cls.__name__, (cls,), {"forward": own.__func__, "__module__": cls.__module__})


def check_names(targets: Iterable[str], in_code: bool = True) -> None:
    """Raise CaptureError for the name of a module or tensor that a GraphModule cannot have.

    These are names of attributes of its own and, ``in_code``, those that break the code that torch.fx writes.
    """
    for target in sorted(targets):
        if is_reserved(target):
            first = target.split(".")[0]
            raise CaptureError(f"{target}: torch.fx.GraphModule has an attribute {first!r} of its own; rename it")
        if in_code and (word := unwritable(target)) is not None:
            what = "is a keyword of Python" if keyword.iskeyword(word) else "has a quote, a backslash or a line break"
            raise CaptureError(f"{target}: {word!r} {what}, and torch.fx writes code with it")


def _check_statements(model: nn.Module, graph: fx.Graph) -> None:
    """Raise CaptureError for a call of which nothing is used, of a module of the user's with buffers to write into.

    It may act in training mode only, as statistics do; a trace in eval mode shows nothing of that.
    """
    for node in graph.find_nodes(op="call_module"):
        module = model.get_submodule(str(node.target))
        own = not type(module).__module__.startswith("torch.nn") and not is_layer(module)
        if not node.users and own and any(True for _ in module.buffers()):
            raise CaptureError(f"{node.target} is called as a statement: what it does in training is not known")


def _is_impure(model: nn.Module, node: fx.Node) -> bool:
    """Whether the node must stay although nothing uses its value: an argument, the output, a check."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    return node.op in ("placeholder", "output") or may_write(node) or node.is_impure()


def _plain_checks(graph: fx.Graph) -> None:
    """Turn torch.fx's check for None into a plain comparison: unpickling the former breaks all later traces."""
    for node in graph.find_nodes(op="call_function", target=_assert_is_none):
        value, message = node.args
        with graph.inserting_before(node):
            graph.call_function(torch._assert, (graph.call_function(operator.eq, (value, None)), message))
        graph.erase_node(node)


def _restore_argument_names(model: nn.Module, graph: fx.Graph, frozen: dict[str, Any]) -> None:
    """Undo the renaming of frozen arguments (mask → mask_1), and let them default to the frozen value."""
    order = inspect.unwrap(type(model).forward).__code__.co_varnames[1:]
    for node, name in zip(graph.find_nodes(op="placeholder"), order, strict=False):
        if name in frozen:
            node.target = name
            node.args = (frozen[name],)


def train_path_differs(model: nn.Module, frozen: dict[str, Any], gm: fx.GraphModule) -> bool:
    """Whether the trace in training mode is another graph than ``gm``, the trace in eval mode."""
    try:
        graph, _ = _graph(structural_copy(model), frozen, training=True)
    except CaptureError:  # whatever stops the trace, training takes another path
        return True
    return _structure(graph) != _structure(gm.graph)


def _structure(graph: fx.Graph) -> list[tuple[str, ...]]:
    """Return the graph as text, with numbers for the names of nodes."""
    number = {n: f"%{i}" for i, n in enumerate(graph.nodes)}
    return [
        (n.op, str(n.target), str(fx.map_arg((n.args, n.kwargs), number.__getitem__)))
        for n in graph.nodes
        if n.op != "placeholder"
    ]
