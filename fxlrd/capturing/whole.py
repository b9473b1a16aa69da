"""Capture of a whole traceable model.

The model is traced in eval mode. Modules of torch.nn are leaves, and so is every module without a conv or
linear inside (dropout, stochastic depth, activation blocks), so that train and eval mode keep working on
the result, and every module with hooks, which a trace would run once and then forget. Arguments that the
example inputs leave at their defaults, and arguments that are no tensors, are frozen and checked at run time.
The captured graph is run against the model before it is handed on.
"""

from __future__ import annotations

import inspect
import operator
import os
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import _assert_is_none
from torch.nn.parameter import UninitializedParameter

from fxlrd.errors import CaptureError, FxlrdError, Reason, one_line
from fxlrd.graph.captured import Unreached, Whole, captured, propagate
from fxlrd.graph.compare import difference, rounding
from fxlrd.graph.guards import NEVER_CALLED, container_hooked, container_reads, hooked
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating, run, unmoved
from fxlrd.graph.surgery import annotate, called, set_container_mode
from fxlrd.layers.kinds import LAYERS, op

_INSIDE = (os.path.dirname(torch.__file__) + os.sep, os.path.abspath(__file__))


def capture(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Return ``model`` as a GraphModule with shapes, FLOPs and provenance on its nodes.

    >>> import fxlrd, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    >>> gm = fxlrd.capture(model, torch.randn(2, 4))
    >>> [(node.name, tuple(node.meta["tensor_meta"].shape)) for node in gm.graph.nodes]
    [('input_1', (2, 4)), ('_0', (2, 8)), ('_1', (2, 8)), ('output', (2, 8))]

    The graph module shares the model's modules; the model itself is not changed. Raises CaptureError for a
    model that cannot be traced as a whole, naming the module and the line, or whose trace computes something
    else; FxlrdError for example inputs that the model fails on and for weights that are not finite.
    """
    inputs = Inputs.of(example_inputs)
    check_weights(model)
    if isinstance(model, LAYERS):
        model = nn.Sequential(model).train(model.training)
    reference = tensors(run(model, inputs))
    if not reference:
        raise CaptureError(f"{type(model).__name__} returns no tensor for the example inputs")
    with evaluating(model):
        gm, warnings = trace(model, constants(model, inputs))
    if train_path_differs(model, constants(model, inputs), gm):
        warnings.append("forward takes another path in training mode: the eval path was captured")
    annotate(gm)
    unreached = _unreached(model, gm)
    dropped = {name: u.params for name, u in unreached.items() if u.reason.code == NEVER_CALLED.code}
    if dropped:
        warnings.append(
            f"{len(dropped)} layers ({sum(dropped.values()):,} parameters) are never called in eval mode and no part "
            f"of the captured model: {', '.join(dropped)}"
        )
    captured.record(gm, Whole(inputs, unreached, tuple(warnings), modules=called(gm)))
    where = f"capture of {type(model).__name__}"
    try:
        outputs = propagate(gm, inputs)
    except FxlrdError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{where}: the trace fails where the model runs: {one_line(error)}; compress its submodules one by one"
        ) from error
    found = difference(outputs, reference, where)
    if found.relative > rounding(reference):
        raise CaptureError(
            f"{where}: the trace differs from the model by {found.relative:.2g} relative; is its forward "
            "random in eval mode, or does it depend on values?"
        )
    return gm


def check_weights(model: nn.Module) -> None:
    """Raise FxlrdError for a parameter on the meta device or with NaN or Inf in it, by its name."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise FxlrdError(f"{name} is not initialised yet: run the lazy model once on an input first")
        if parameter.is_meta:
            raise FxlrdError(f"{name} is on the meta device: materialise the model first")
        wide = parameter.float() if parameter.element_size() == 1 else parameter  # float8 has no isfinite
        if parameter.is_floating_point() and not bool(wide.isfinite().all()):
            raise FxlrdError(f"{name} holds NaN or Inf: the model is broken before compression")
    for name, buffer in model.named_buffers():  # -inf is how masks are written
        if not buffer.is_meta and buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise FxlrdError(f"{name} holds NaN: the model is broken before compression")


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
    """A tracer that keeps layer-free and hooked modules whole, and knows which module it failed in."""

    def __init__(self) -> None:
        super().__init__()
        self.failed_in: str | None = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            super().is_leaf_module(m, module_qualified_name)
            or isinstance(m, LAYERS)
            or not any(isinstance(child, LAYERS) for child in m.modules())
            or hooked(m)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = f"{self.path_of_module(m)} ({type(m).__name__})"
            raise


def trace(model: nn.Module, frozen: dict[str, Any]) -> tuple[fx.GraphModule, list[str]]:
    """Return the trace of a module in its present mode with some arguments frozen, and what a user should know of it.

    Raises CaptureError, naming the module and the line, where it cannot be traced.
    """
    tracer = _Tracer()
    attributes = set(vars(model))
    try:
        with unmoved(model):
            graph = tracer.trace(model, frozen or None)
    except Exception as error:
        _forget(model, attributes)
        where = tracer.failed_in or type(model).__name__
        raise CaptureError(
            f"{where} cannot be traced at {_line(error)}: {one_line(error).split('. ')[0]}; "
            "rewrite that line without control flow on tensors, or compress its submodules one by one"
        ) from error
    _plain_checks(graph)
    _keep_argument_names(model, graph, frozen)
    # The tracer belongs to capture: what is handed on unpickles with plain torch.fx.
    graph._tracer_cls = None
    graph.eliminate_dead_code(partial(_is_impure, model))
    gm = fx.GraphModule(tracer.root, graph, class_name=type(model).__name__)
    _forget(model, attributes)
    set_container_mode(gm, training=False)
    said = [f"{name}={value!r}" for name, value in frozen.items()]
    warnings = [f"frozen arguments of forward: {', '.join(said)}"] if said else []
    if hooked(model):
        warnings.append("the model's own hooks are not carried over: register them on the result")
    return gm, warnings


def _forget(model: nn.Module, attributes: set[str]) -> None:
    """Take the constants that torch.fx left on the model off it again; a graph has its own."""
    for name in set(vars(model)) - attributes:
        if name.startswith("_tensor_constant"):
            delattr(model, name)


def _is_impure(model: nn.Module, node: fx.Node) -> bool:
    """Whether the node must stay although nothing uses its value: an argument, the output, a check."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    writes = name.endswith("_") and not name.endswith("__")
    in_place = node.target in _IN_PLACE or writes or "out" in node.kwargs or node.kwargs.get("inplace") is True
    return node.op in ("placeholder", "output") or in_place or node.is_impure()


def constants(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of forward to freeze: defaults that were not overridden, and non-tensors."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise FxlrdError(f"example inputs do not fit forward{signature}: {error}") from error
    found = {
        name: p.default
        for name, p in signature.parameters.items()
        if name not in bound.arguments and (p.default is None or isinstance(p.default, (bool, int, float, str)))
    }
    for name, value in bound.arguments.items():
        variadic = signature.parameters[name].kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if not variadic and (value is None or isinstance(value, (bool, int, float, str))):
            found[name] = value
    return found


def _plain_checks(graph: fx.Graph) -> None:
    """Turn torch.fx's check for None into a plain comparison: unpickling the former breaks every later trace."""
    for node in graph.find_nodes(op="call_function", target=_assert_is_none):
        value, message = node.args
        with graph.inserting_before(node):
            graph.call_function(torch._assert, (graph.call_function(operator.eq, (value, None)), message))
        graph.erase_node(node)


def _keep_argument_names(model: nn.Module, graph: fx.Graph, constants: dict[str, Any]) -> None:
    """Undo the renaming of frozen arguments (mask → mask_1), and let them default to the frozen value."""
    order = inspect.unwrap(type(model).forward).__code__.co_varnames[1:]
    for node, name in zip(graph.find_nodes(op="placeholder"), order, strict=False):
        if name in constants:
            node.target = name
            node.args = (constants[name],)


def train_path_differs(model: nn.Module, frozen: dict[str, Any], gm: fx.GraphModule) -> bool:
    """Whether forward, traced in training mode, is another graph."""
    modes = [(m, m.training) for m in model.modules()]
    attributes = set(vars(model))
    model.train()
    try:
        with unmoved(model):
            graph = _Tracer().trace(model, frozen or None)
    except Exception:  # whatever stops the trace in training mode, it is another path
        return True
    finally:
        _forget(model, attributes)
        for m, training in modes:
            m.training = training
    _plain_checks(graph)
    graph.eliminate_dead_code(partial(_is_impure, model))
    return _shape(graph) != _shape(gm.graph)


def _shape(graph: fx.Graph) -> list[tuple[str, ...]]:
    """Return the graph as text without its nodes' names."""
    number = {n: f"%{i}" for i, n in enumerate(graph.nodes)}
    return [
        (n.op, str(n.target), str(fx.map_arg((n.args, n.kwargs), number.__getitem__)))
        for n in graph.nodes
        if n.op != "placeholder"
    ]


def _unreached(model: nn.Module, gm: fx.GraphModule) -> dict[str, Unreached]:
    """Return the layers that no node of the graph calls, each with the reason."""
    targets = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    seen = {id(m) for name, m in model.named_modules(remove_duplicate=False) if name in targets}
    read = {str(n.target): n for n in gm.graph.nodes if n.op == "get_attr"}
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LAYERS) or id(module) in seen:
            continue
        params = sum(p.numel() for p in module.parameters())
        found[name] = Unreached(_why(model, name, targets, read), op(module), tuple(module.weight.shape), params)
    return found


def _why(model: nn.Module, name: str, targets: set[str], read: dict[str, fx.Node]) -> Reason:
    around = next((t for t in targets if name.startswith(f"{t}.")), None)
    if around is not None:
        whole = model.get_submodule(around)
        return container_hooked(around, whole) if hooked(whole) else container_reads(around, whole)
    if f"{name}.weight" in read:
        user = next(iter(read[f"{name}.weight"].users), None)
        by = getattr(user.target, "__name__", user.target) if user is not None else "forward"
        return Reason("weight-read", f"its weight is read by {by} directly: the layer itself is never called")
    return NEVER_CALLED


def _line(error: BaseException) -> str:
    """Return file:line of the last frame in the user's code."""
    every = traceback.extract_tb(error.__traceback__)
    frames = [f for f in every if not f.filename.startswith(_INSIDE)]
    # A module of torch's own: the deepest of its frames, before those of the tracer.
    modules = [f for f in every if f"{os.sep}nn{os.sep}modules{os.sep}" in f.filename]
    last = (frames or modules or every)[-1]
    return f"{os.path.basename(last.filename)}:{last.lineno}"
