"""Why a layer must not be replaced, and which layers a name or glob means."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence

from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from fxlrd.errors import Reason, unknown
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.facts import FACTORS, provenance
from fxlrd.graph.surgery import called, calls, layers, source
from fxlrd.layers.folded import padding_before
from fxlrd.layers.kinds import LAYERS, Conv, is_stock, op

FACTOR = Reason("factor", "it is a low-rank factor already")
MERGED = Reason("merged", "it is merged already")
MORE_INPUTS = Reason("more-inputs", "it is called with more than its input")
NEVER_CALLED = Reason("never-called", "it is never called in eval mode and is no part of the captured model")
ADAPTER = Reason(
    "adapter",
    "it belongs to a LoRA adapter, which is of low rank already",
    "merge adapters (merge_and_unload() of PEFT) before compress",
)
_ADAPTERS = {"lora_A", "lora_B", "lora_down", "lora_up"}
"""What PEFT and others name the two layers of an adapter, or the containers of those."""
_STEM_CHANNELS = 4


COMPLEX = Reason("complex", "its weight is complex: only real ones are factored")


def why_not_replaceable(gm: fx.GraphModule, norms: bool = False) -> dict[str, Reason | None]:
    """Return for each layer why it must not be replaced by other modules, or None where it may.

    With ``norms``, also for every other module of torch.nn that has parameters or buffers (BatchNorm, PReLU).
    """
    guard = _Guard(gm)
    modules = called(gm) if norms else layers(gm)
    return {name: guard.why_not(name, module) for name, module in modules.items()}


class _Guard:
    """What a graph has beside the calls of a module that stands in the way of replacing it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.owners = owners(gm)
        self.called = set(called(gm))
        self.attributes = [str(node.target) for node in gm.graph.find_nodes(op="get_attr", sort=False)]

    def why_not(self, name: str, module: nn.Module) -> Reason | None:
        """Return why the module must not be replaced."""
        if (reason := pads_itself(module)) is not None:
            return reason
        if isinstance(module, LAYERS) and not is_stock(module) and not is_parametrized(module):
            text = f"{type(module).__name__} is a subclass of {op(module)} with a behaviour of its own"
            return Reason("subclass", text)
        if any(p.is_complex() for p in module.parameters()):
            return COMPLEX
        if (reason := added(module)) is not None:
            return reason
        if is_factor(self.gm, name):
            return FACTOR
        if not _ADAPTERS.isdisjoint(name.split(".")):
            return ADAPTER
        return self._shared(name, module) or self._called_otherwise(name)

    def _shared(self, name: str, module: nn.Module) -> Reason | None:
        for parameter_name, parameter in module.named_parameters():
            others = [other for other in self.owners[id(parameter)] if not other.startswith(f"{name}.")]
            if others:
                return shared_parameter(parameter_name, others[0])
        read = next((target for target in self.attributes if target.startswith(f"{name}.")), None)
        if read is not None:
            return Reason("read-directly", f"its {read.rpartition('.')[2]} is read directly as well")
        return None

    def _called_otherwise(self, name: str) -> Reason | None:
        parts = name.split(".")
        if any(".".join(parts[:i]) in self.called for i in range(1, len(parts))):
            return Reason("container-called", "a module around it is called as a whole as well")
        return MORE_INPUTS if any(source(node) is None for node in calls(self.gm, name)) else None


def is_factor(gm: fx.GraphModule, name: str) -> bool:
    """Whether the layer is a low-rank factor from an earlier `compress`.

    Its provenance is lost by then. It is recognised by its name and its neighbours: the names of factors, called in a
    chain (`fxlrd.graph.surgery.chained`), or a container of factors in the user's model.
    """
    container, _, role = name.rpartition(".")
    p = provenance(calls(gm, name)[0])
    if role not in FACTORS or not container or (p is not None and p.role != "original"):
        return False
    if captured_or_bare(gm).is_container_of_factors(container):
        return True
    others = {f"{container}.{other}" for other in FACTORS if other != role}

    def is_other(node: fx.Node | None) -> bool:
        return node is not None and node.op == "call_module" and str(node.target) in others

    def in_chain(node: fx.Node) -> bool:
        return is_other(source(node)) or (len(node.users) == 1 and is_other(next(iter(node.users))))

    return isinstance(gm.get_submodule(name), LAYERS) and all(in_chain(node) for node in calls(gm, name))


def shared_parameter(parameter: str, other: str) -> Reason:
    """Return the reason of a layer whose parameter is also ``other``."""
    return Reason("shared-parameter", f"its {parameter} is shared with {other}")


def skip_reason(pattern: str) -> Reason:
    """Return the reason of a layer that ``pattern`` among the layers to skip fits."""
    return Reason("skip", f"skip={pattern}")


def stem_reason(module: nn.Module) -> Reason:
    """Return the reason of the model's first conv."""
    return Reason("stem", f"in_channels={module.in_channels}: the stem reads the model's input")


def container_hooked(name: str, module: nn.Module) -> Reason:
    """Return the reason of layers inside the module ``name``, which has hooks that a trace would lose."""
    return Reason("container-hooks", f"{name} ({type(module).__name__}) has hooks and is kept whole")


def container_reads(name: str, module: nn.Module) -> Reason:
    """Return the reason of layers inside the module ``name``, which does not call them but reads their weights."""
    return Reason("container-reads", f"{name} ({type(module).__name__}) reads its weight itself and is kept whole")


def added(module: nn.Module) -> Reason | None:
    """Return what was added to this one module that a replacement would drop, or None."""
    if is_parametrized(module):
        remedy = "remove that with torch.nn.utils.parametrize.remove_parametrizations first"
        return Reason("parametrized", "its weight is parametrized", remedy)
    if hooked(module):
        return Reason("hooks", "it has hooks (as weight_norm and spectral_norm do), which a replacement would drop")
    if "forward" in vars(module):
        text = "its forward was replaced on the module itself (as accelerate does), which a replacement would drop"
        return Reason("own-forward", text)
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks:
            return Reason("hooks", f"its {name} has hooks, which a replacement would drop")
    return None


def pads_itself(module: nn.Module) -> Reason | None:
    """Return why a module that pads its input cannot be decomposed inside the user's forward; None for another one."""
    if padding_before(module) is None:
        return None
    text = f"{type(module).__name__} pads its input itself, which factors inside the model's own forward would not"
    return Reason("pads-itself", text)


def check_names(gm: fx.GraphModule, patterns: Sequence[str]) -> None:
    """Raise FxlrdError for a name or glob that fits no layer of the captured model."""
    names = [*layers(gm), *captured_or_bare(gm).unreached]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise unknown("layer", pattern, names)


def matches(name: str, patterns: Sequence[str]) -> str | None:
    """Return the first of ``patterns`` (names or globs) that the module ``name``, or a module around it, fits."""
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next((p for p in patterns if any(fnmatch.fnmatchcase(n, p) for n in prefixes)), None)


def is_stem(gm: fx.GraphModule, name: str, module: nn.Module) -> bool:
    """Whether the layer is a conv that reads the model's input, of at most four channels, with no layer before."""
    if not isinstance(module, Conv) or module.in_channels > _STEM_CHANNELS:
        return False
    return name not in captured_or_bare(gm).not_stems and not reads_a_layer(gm, name)


def reads_a_layer(gm: fx.GraphModule, name: str) -> bool:
    """Whether a call of the module ``name`` reads what another layer of the graph, or an earlier call, has computed."""
    names = layers(gm).keys()
    return any(_follows_layer(source(call), names) for call in calls(gm, name))


def _follows_layer(node: fx.Node | None, names: Collection[str]) -> bool:
    """Whether the node's value depends on the output of a layer; ``names`` are those of all layers."""
    pending = [node] if node is not None else []
    visited: set[fx.Node] = set()
    while pending:
        current = pending.pop()
        if current in visited:
            continue
        visited.add(current)
        if current.op == "call_module" and str(current.target) in names:
            return True
        pending.extend(current.all_input_nodes)
    return False


def hooked(module: nn.Module) -> bool:
    """Whether the module has hooks on its forward or backward, which a trace or a replacement would lose."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def owners(gm: nn.Module) -> dict[int, list[str]]:
    """Return every name of every parameter, by the parameter's identity. Several names are a tie.

    A module that has several names counts once.
    """
    names: dict[int, list[str]] = {}
    first_name: dict[int, str] = {}
    for prefix, module in gm.named_modules(remove_duplicate=False):
        if first_name.setdefault(id(module), prefix) != prefix:
            continue
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return names
