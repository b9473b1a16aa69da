"""Capture of a model that torch.fx can trace as a whole.

Arguments that the example inputs leave at their defaults, and arguments that are no tensors, are frozen and checked at
run time. The captured graph is run and compared with the model before it is returned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from fxlrd.capturing.tracing import constants, trace, train_path_differs
from fxlrd.errors import CaptureError, FxlrdError, Reason, one_line
from fxlrd.graph.captured import Unreached, Whole, captured, propagate
from fxlrd.graph.compare import difference, rounding
from fxlrd.graph.guards import (
    MORE_INPUTS,
    NEVER_CALLED,
    added,
    container_hooked,
    container_reads,
    hooked,
    owners,
    shared_parameter,
)
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating, run
from fxlrd.graph.surgery import annotate, called, calls, source
from fxlrd.layers.kinds import LAYERS, as_layer, op
from fxlrd.layers.stand_ins import is_layer, stand_in


def capture(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Return ``model`` as a GraphModule with shapes, FLOPs and provenance on its nodes.

    >>> import fxlrd, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    >>> gm = fxlrd.capture(model, torch.randn(2, 4))
    >>> [(node.name, tuple(node.meta["tensor_meta"].shape)) for node in gm.graph.nodes]
    [('input_1', (2, 4)), ('_0', (2, 8)), ('_1', (2, 8)), ('output', (2, 8))]

    The graph module shares the model's modules; the model itself is not changed. Raises CaptureError, naming the module
    and the line, for a model that cannot be traced as a whole, and for one whose trace computes something else;
    FxlrdError for example inputs that the model fails on and for weights that are not finite.
    """
    inputs = Inputs.of(example_inputs)
    check_weights(model)
    if isinstance(model, LAYERS):
        model = nn.Sequential(model).train(model.training)
    reference = tensors(run(model, inputs))
    if not reference:
        raise CaptureError(f"{type(model).__name__} returns no tensor for the example inputs")
    frozen = constants(model, inputs)
    with evaluating(model):
        gm, warnings = trace(model, frozen)
    if train_path_differs(model, frozen, gm):
        warnings.append("forward takes another path in training mode: the eval path was captured")
    alike = _put_stand_ins(gm)
    annotate(gm)
    unreached = _unreached(model, gm)
    warnings += _never_called(unreached)
    captured.record(gm, Whole(inputs, unreached, tuple(warnings), modules=called(gm), alike=alike))
    _check_outputs(gm, inputs, reference, f"capture of {type(model).__name__}")
    return gm


def _check_outputs(gm: fx.GraphModule, inputs: Inputs, reference: list[Tensor], where: str) -> None:
    """Run the graph, leave shapes and FLOPs on its nodes. Raise CaptureError if its outputs are not the model's."""
    try:
        outputs = propagate(gm, inputs)
    except FxlrdError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{where}: the trace fails where the model runs: {one_line(error)}; compress its submodules one by one"
        ) from error
    relative = difference(outputs, reference, where).relative
    if relative > rounding(reference):
        raise CaptureError(
            f"{where}: the trace differs from the model by {relative:.2g} relative; is its forward "
            "random in eval mode, or does it depend on values?"
        )


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


def _never_called(unreached: Mapping[str, Unreached]) -> list[str]:
    """Return a warning about the layers that the graph does not have because the model never calls them, if any."""
    dropped = {name: entry.params for name, entry in unreached.items() if entry.reason.code == NEVER_CALLED.code}
    if not dropped:
        return []
    return [
        f"{len(dropped)} layers ({sum(dropped.values()):,} parameters) are never called in eval mode and no part "
        f"of the captured model: {', '.join(dropped)}"
    ]


def _put_stand_ins(gm: fx.GraphModule) -> dict[str, nn.Module]:
    """Put stock layers in the place of the modules that compute what these do; return the modules, by name."""
    names_of = owners(gm)
    replaced = {}
    for name, module in called(gm).items():
        layer = stand_in(module)
        if layer is not None and layer is not module and _why_not_alike(gm, name, module, names_of) is None:
            gm.set_submodule(name, layer)
            replaced[name] = module
    return replaced


def _why_not_alike(
    gm: fx.GraphModule, name: str, module: nn.Module, names_of: Mapping[int, Sequence[str]]
) -> Reason | None:
    """Return why no stock layer may stand in for a module that computes what one does."""
    if (reason := added(module)) is not None:
        return reason
    for key, parameter in module.named_parameters():
        others = [other for other in names_of[id(parameter)] if not other.startswith(f"{name}.")]
        if others:
            return shared_parameter(key, others[0])
    if any(str(node.target).startswith(f"{name}.") for node in gm.graph.find_nodes(op="get_attr")):
        return Reason("read-directly", "its weight is read directly as well")
    return MORE_INPUTS if any(source(node) is None for node in calls(gm, name)) else None


def _unreached(model: nn.Module, gm: fx.GraphModule) -> dict[str, Unreached]:
    """Return the layers that no node of the graph calls as such, each with the reason."""
    modules = called(gm)
    names_of = owners(gm)
    called_ids = {id(m) for name, m in model.named_modules(remove_duplicate=False) if name in modules}
    attributes = {str(n.target): n for n in gm.graph.find_nodes(op="get_attr")}
    entries = {}
    for name, module in model.named_modules():
        if not is_layer(module):
            continue
        if id(module) not in called_ids:
            reason = _why_unreached(model, name, modules, attributes)
        elif name in modules and not isinstance(modules[name], LAYERS):
            reason = _why_not_alike(gm, name, module, names_of) or MORE_INPUTS
        else:
            continue
        layer = stand_in(module) or as_layer(module)
        params = sum(p.numel() for p in module.parameters())
        entries[name] = Unreached(reason, op(layer), tuple(layer.weight.shape), params)
    return entries


def _why_unreached(model: nn.Module, name: str, modules: Collection[str], attributes: Mapping[str, fx.Node]) -> Reason:
    container_name = next((target for target in modules if name.startswith(f"{target}.")), None)
    if container_name is not None:
        container = model.get_submodule(container_name)
        reason = container_hooked if hooked(container) else container_reads
        return reason(container_name, container)
    if f"{name}.weight" in attributes:
        user = next(iter(attributes[f"{name}.weight"].users), None)
        reader = getattr(user.target, "__name__", user.target) if user is not None else "forward"
        return Reason("weight-read", f"its weight is read by {reader} directly: the layer itself is never called")
    return NEVER_CALLED
