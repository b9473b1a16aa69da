"""What a model does while it runs: which modules it calls, with what, and which code reads a module's weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.capturing.proof import Original, not_saving_for_backward, same
from fxlrd.capturing.reads import Reads, noting_reads
from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph.captured import Unreached
from fxlrd.graph.copies import independent_copy, private_copy, structural_copy
from fxlrd.graph.fast_paths import TRANSFORMERS
from fxlrd.graph.guards import MORE_INPUTS, NEVER_CALLED, added, container_reads, owners, pads_itself, shared_parameter
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.regions import plain, set_modules
from fxlrd.graph.run import called_on, counting, evaluating, isolated, training_unasked
from fxlrd.graph.surgery import is_reserved
from fxlrd.graph.writes import guarding_weights
from fxlrd.layers.folded import is_layer, layer_of
from fxlrd.layers.kinds import LAYERS, op, written_class
from fxlrd.layers.stand_ins import stand_in

RESERVED = Reason("reserved-name", "its name begins with that of an attribute of torch.fx.GraphModule", "rename it")


@dataclass
class Calls:
    """The calls of one module in a run of its model.

    Attributes:
        count: the number of calls.
        plain: whether every call gave a tensor for every argument of forward, so that a trace freezes none of them.
        single: whether every call gave exactly one argument, a tensor.
    """

    count: int = 0
    plain: bool = True
    single: bool = True


@dataclass(frozen=True)
class Observation:
    """What a run of a model showed.

    Attributes:
        calls: the calls of each module that was called, by the module's name.
        readers: for each module of which other code read values of parameters or buffers, which code did.
        described: the layers of which other code asked for a parameter, be it for its dtype, device or shape.
    """

    calls: Mapping[str, Calls]
    readers: Mapping[str, Reason]
    described: frozenset[str]

    def count(self, name: str) -> int:
        """Return how often the module was called."""
        return self.calls[name].count if name in self.calls else 0


def observe(original: Original) -> Observation:
    """Run copies of the model on the example inputs and return what they did."""
    instrumented = structural_copy(original.model)
    reads = Reads()
    outputs, calls = _run_noting_calls(instrumented, original.inputs, noting_reads(instrumented, reads))
    if not same(tensors(outputs), original.behaviour.outputs):
        # The model checks `type(layer)`: the instrumented subclasses changed what it does. Observe it without them.
        _, calls = _run_noting_calls(structural_copy(original.model), original.inputs, counting())
    in_training = _reads_in_training(original)
    described = frozenset(reads.described | in_training.described)
    return Observation(calls, {**in_training.values, **reads.values}, described)


def _run_noting_calls(
    model: nn.Module, inputs: Inputs, context: AbstractContextManager[Any]
) -> tuple[Any, dict[str, Calls]]:
    calls: dict[str, Calls] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            noted = calls.setdefault(name, Calls())
            values = (*args, *kwargs.values())
            noted.count += 1
            noted.plain = noted.plain and plain(module, args, kwargs)
            noted.single = noted.single and len(values) == 1 and isinstance(values[0], Tensor)

        return hook

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name and not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        with evaluating(model), isolated(model), torch.no_grad(), context:
            return called_on(model, inputs), calls
    finally:
        for handle in handles:
            handle.remove()


def _reads_in_training(original: Original) -> Reads:
    """Return what a copy of the model reads in training mode, until it fails if it does: it may want labels.

    A forward that writes to weights in this mode is stopped, and runs again in a copy with weights of its own.
    """
    try:
        model = private_copy(original.model)
        with guarding_weights(model) as guard:
            reads = _reads_of(model, original)
        return reads if guard.written is None else _reads_of(independent_copy(original.model), original)
    except FxlrdError:
        return Reads()


def _reads_of(model: nn.Module, original: Original) -> Reads:
    reads = Reads()
    noting = noting_reads(model, reads, ", in training mode")
    with training_unasked(model), not_saving_for_backward(), suppress(Exception), noting:
        called_on(model, original.inputs)
    return reads


def blocked_modules(model: nn.Module, observation: Observation) -> dict[str, Reason]:
    """Return the layers, and the norms, that no other module may take the place of, each with the reason."""
    layers = named_layers(model)
    return {
        **observation.readers,
        **_sharing(model, layers),
        **_inside_opaque(model, layers),
        **_altered_stand_ins(layers),
        **{name: RESERVED for name in layers if is_reserved(name)},
    }


def _sharing(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Reason]:
    names = owners(model)
    shared = {}
    for name, module in layers.items():
        for part, parameter in module.named_parameters(recurse=False):
            others = [n for n in names[id(parameter)] if not n.startswith(f"{name}.")]
            if others:
                shared[name] = shared_parameter(part, others[0])
    return shared


def _inside_opaque(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Reason]:
    reasons = {}
    for name, module in model.named_modules():
        if is_layer(module) or not is_opaque(module):
            continue
        reason = container_reads(name, module)
        if hasattr(module, "_orig_mod"):
            reason = Reason("compiled", f"{name} is compiled", "compress the model first, then compile it")
        reasons.update({n: reason for n in layers if n.startswith(f"{name}.")})
    return reasons


def _altered_stand_ins(layers: Mapping[str, nn.Module]) -> dict[str, Reason]:
    # A stand-in has neither hooks nor a forward of the module's own. Guards on the graph see the stand-in only.
    others = {name: module for name, module in layers.items() if layer_of(module) is not module}
    reasons = {
        name: added(module) or (None if isinstance(module, LAYERS) else pads_itself(module))
        for name, module in others.items()
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def unreached(
    layers: Mapping[str, nn.Module], observation: Observation, blocked: Mapping[str, Reason]
) -> dict[str, Unreached]:
    """Return for each of the layers why no node of a graph stands for it, if none does."""
    entries = {}
    for name, module in layers.items():
        reason = blocked.get(name, MORE_INPUTS if observation.count(name) else NEVER_CALLED)
        layer = layer_of(module)
        params = sum(p.numel() for p in module.parameters())
        entries[name] = Unreached(reason, op(layer), tuple(layer.weight.shape), params)
    return entries


def asked_for(original: Original, names: Sequence[str], described: Collection[str]) -> set[str]:
    """Return the layers that cannot be inside another module without the model doing something else.

    The set is empty if two runs of the model itself differ.
    """

    def affecting(some: Sequence[str]) -> set[str]:
        if _unaffected(original, some, described):
            return set()
        half = len(some) // 2
        return affecting(some[:half]) | affecting(some[half:]) if half else set(some)

    if _unaffected(original, names, described) or not _unaffected(original, (), described):
        return set()
    return affecting(names)


def _unaffected(original: Original, names: Sequence[str], described: Collection[str]) -> bool:
    """Whether the model does the same with each of the layers inside a Sequential, as factors are, and calls those.

    It does not call them where it holds the layers in places that nobody looks into, such as an object of its own.
    """
    wrapped = structural_copy(original.model)
    modules = dict(wrapped.named_modules(remove_duplicate=False))
    containers = {name: nn.Sequential(OrderedDict(first=stand_in(modules[name]) or modules[name])) for name in names}
    set_modules(wrapped, containers, described)
    called = _noted(wrapped, names)
    return original.difference(wrapped) is None and not _called(original, set(names) - called)


def _called(original: Original, names: Collection[str]) -> set[str]:
    """Return those of the modules that the model calls, and does not only read."""
    if not names:
        return set()
    model = structural_copy(original.model)
    called = _noted(model, names)
    original.difference(model)
    return called


def _noted(model: nn.Module, names: Collection[str]) -> set[str]:
    """Return a set that fills with the names of those modules that are called from now on."""
    called: set[str] = set()
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
    return called


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the conv and linear layers of a model, those in disguise included, by name."""
    return {name: module for name, module in model.named_modules() if is_layer(module)}


def is_opaque(module: nn.Module) -> bool:
    """Whether this is a module of torch's own whose forward may read the layers inside it rather than call them."""
    if hasattr(module, "_orig_mod"):  # what torch.compile returns
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, *TRANSFORMERS, *LAYERS)
    torchs = written_class(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
    return torchs and not isinstance(module, containers)
