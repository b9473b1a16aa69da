"""Capture of a model that torch.fx can trace as a whole.

Arguments that the example inputs leave at their defaults, and arguments that are no tensors, are frozen and checked at
run time. The captured graph is run and compared with the model before it is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from fxlrd.capturing.attentions import open_attentions
from fxlrd.capturing.inlined import call_inlined_layers
from fxlrd.capturing.multiplied import without_layer
from fxlrd.capturing.proof import Original, same
from fxlrd.capturing.substitution import fold_layers, put_stand_ins, why_not_alike
from fxlrd.capturing.tracing import check_arguments, constants, trace, train_path_differs
from fxlrd.errors import CaptureError, FxlrdError, Reason
from fxlrd.factor.failures import holds_everywhere
from fxlrd.graph.captured import Unreached, Whole, captured, feed, propagate_once
from fxlrd.graph.copies import modules_behind, structural_copy
from fxlrd.graph.facts import described_layers
from fxlrd.graph.guards import (
    MORE_INPUTS,
    NEVER_CALLED,
    container_hooked,
    container_reads,
    hooked,
    owners,
)
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating, isolated, stored
from fxlrd.graph.surgery import annotate, called
from fxlrd.layers.attention import ProjectedAttention
from fxlrd.layers.folded import is_layer, layer_of
from fxlrd.layers.kinds import LAYERS, op
from fxlrd.layers.quantized import quantized_weight


def capture(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Return ``model`` as a GraphModule with shapes, FLOPs and provenance on its nodes.

    >>> import fxlrd, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    >>> gm = fxlrd.capture(model, torch.randn(2, 4))
    >>> [(node.name, tuple(node.meta["tensor_meta"].shape)) for node in gm.graph.nodes]
    [('input_1', (2, 4)), ('_0', (2, 8)), ('_1', (2, 8)), ('output', (2, 8))]

    The graph module shares the model's parameters, in modules of its own, but for weights that a layer computes from
    them (weight standardisation): of these it has the values. The model itself is neither run nor changed.
    Raises CaptureError, naming the module and the line, for a model that cannot be traced as a whole, and for one whose
    trace does something else (`fxlrd.capturing.proof`); FxlrdError for example inputs that the model fails on and for
    weights that are not finite.
    """
    return capture_whole(original_of(model, example_inputs))


def original_of(model: nn.Module, example_inputs: Any) -> Original:
    """Return what the model does on the example inputs. A bare layer is wrapped in a Sequential.

    Raises FxlrdError for example inputs that the model fails on and for weights that are not finite.
    """
    inputs = Inputs.of(example_inputs)
    check_weights(model)
    if isinstance(model, LAYERS):
        layer, model = model, nn.Sequential(model)
        model.training = layer.training
    original = Original(model, inputs)
    open_attentions(original)
    return original


def capture_whole(original: Original, for_users_forward: bool = False) -> fx.GraphModule:
    """`capture` of a model of which is known what it does.

    ``for_users_forward`` says that the layers go back into the model, whose own forward will call them.
    """
    model, inputs = original.model, original.inputs
    if not original.behaviour.outputs:
        raise CaptureError(f"{type(model).__name__} returns no tensor for the example inputs")
    frozen = constants(model, inputs)
    check_arguments(model, inputs)
    gm, warnings = trace(model, frozen)
    _close_leaves(gm, original.users)
    if not for_users_forward:
        _check_hooks(gm)
    if train_path_differs(model, frozen, gm):
        warnings.append("forward takes another path in training mode: the eval path was captured")
    if not for_users_forward:
        call_inlined_layers(gm, model)
    of_graph = tuple(warnings)
    alike = put_stand_ins(gm)
    captured.record(gm, Whole(inputs))
    _check(gm, original)
    folding = fold_layers(gm, original, for_users_forward)
    gm = folding.graph_module
    annotate(gm)
    unreached = {**_unreached(model, gm), **without_layer(model, original.multiplied, original.closed)}
    warnings += _never_called(unreached)
    record = Whole(
        inputs,
        unreached,
        tuple(warnings),
        of_graph,
        model=original.users,
        modules=called(gm),
        alike={**alike, **folding.modules},
        padded=folding.padded,
        described=described_layers(gm) or frozenset(),
    )
    captured.record(gm, record)
    return gm


def _close_leaves(gm: fx.GraphModule, users: nn.Module) -> None:
    """Put the user's own modules in the place of those with open attentions inside, which the graph calls as one."""
    leaves = [
        name for name, leaf in called(gm).items() if any(isinstance(m, ProjectedAttention) for m in leaf.modules())
    ]
    own = structural_copy(users) if leaves else users
    for name in leaves:
        gm.set_submodule(name, own.get_submodule(name))


def _check_hooks(gm: fx.GraphModule) -> None:
    """Raise CaptureError for a hook that refers to modules which are not in the graph, such as the model itself."""
    own = set(map(id, gm.modules()))
    for name, module in gm.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if any(id(held) not in own for held in modules_behind(hook)):
                raise CaptureError(f"a hook of {name} refers to a module that is not part of {name}")


def _check(gm: fx.GraphModule, original: Original) -> None:
    """Run the graph, leave shapes and FLOPs on its nodes. Raise CaptureError if it does not do what the model does."""

    def call(gm: fx.GraphModule, inputs: Inputs) -> Any:
        return gm.forward(*feed(gm, inputs))  # a call of the graph module prints what it raises

    states = _states(gm)
    # Random numbers are others than those of the original: who draws some in eval mode is found so.
    reason = original.difference(gm, call, on_example=propagate_once, seed=1)
    if reason is None and (name := _changed(states, _states(gm))) is not None:
        with evaluating(gm), isolated(gm), torch.no_grad():
            again = tensors(call(gm, original.inputs))
        if not same(again, original.behaviour.outputs):
            reason = Reason("hidden-state", f"keeps state between calls, in {name}")
    if reason is not None:
        name = type(original.model).__name__
        raise CaptureError(f"capture of {name}: the trace {reason}; compress its submodules one by one")


def check_weights(model: nn.Module) -> None:
    """Raise FxlrdError for a parameter that is quantized, on the meta device or has NaN or Inf in it, by its name."""
    if (weight := quantized_weight(model)) is not None:
        raise FxlrdError(f"{weight} is quantized: compress the model first, then quantize the result")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise FxlrdError(f"{name} is not initialised yet: run the lazy model once on an input first")
        if parameter.is_meta:
            raise FxlrdError(f"{name} is on the meta device: materialise the model first")
        if (parameter.is_floating_point() or parameter.is_complex()) and not _all(torch.isfinite, parameter):
            raise FxlrdError(f"{name} holds NaN or Inf: the model is broken before compression")
    for name, buffer in model.named_buffers():  # -inf is how masks are written
        if not buffer.is_meta and buffer.is_floating_point() and not _all(_is_number, buffer):
            raise FxlrdError(f"{name} holds NaN: the model is broken before compression")


def _all(holds: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    values = stored(tensor)[0].detach()
    float8 = values.element_size() == 1  # which has no isfinite
    return holds_everywhere((lambda part: holds(part.float())) if float8 else holds, values)


def _is_number(values: Tensor) -> Tensor:
    return ~values.isnan()


def _states(gm: fx.GraphModule) -> dict[str, dict[str, Any]]:
    """Return the attributes of each module that the graph calls: what it holds of one call at the next."""
    return {
        name: dict(vars(module))
        for target, called_module in called(gm).items()
        for name, module in called_module.named_modules(prefix=target)
    }


def _changed(before: Mapping[str, dict[str, Any]], after: Mapping[str, dict[str, Any]]) -> str | None:
    """Return the name of the first attribute that is another object than before."""
    for name, attributes in after.items():
        for key, value in attributes.items():
            if key != "training" and value is not before[name].get(key, before):
                return f"{name}.{key}"
    return None


def _never_called(unreached: Mapping[str, Unreached]) -> list[str]:
    """Return a warning about the layers that the graph does not have because the model never calls them, if any."""
    dropped = {name: entry.params for name, entry in unreached.items() if entry.reason.code == NEVER_CALLED.code}
    if not dropped:
        return []
    return [
        f"{len(dropped)} layers ({sum(dropped.values()):,} parameters) are never called in eval mode and no part "
        f"of the captured model: {', '.join(dropped)}"
    ]


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
            reason = why_not_alike(gm, name, module, names_of) or MORE_INPUTS
        else:
            continue
        layer = layer_of(module)
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
