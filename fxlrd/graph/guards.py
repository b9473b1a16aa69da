"""Why a layer is left alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from fxlrd.errors import Reason, unknown
from fxlrd.graph.captured import captured, captured_or_bare
from fxlrd.graph.facts import FACTORS, provenance
from fxlrd.graph.surgery import called, calls, layers, source
from fxlrd.layers.kinds import LAYERS, Conv, is_stock, op

FACTOR = Reason("factor", "it is a low-rank factor already")
MORE_INPUTS = Reason("more-inputs", "it is called with more than its input")
NEVER_CALLED = Reason("never-called", "it is never called in eval mode and is no part of the captured model")
_STEM_CHANNELS = 4


def replaceable(gm: fx.GraphModule, norms: bool = False) -> dict[str, Reason | None]:
    """Return for each layer None, or why it must not be replaced by other modules.

    With ``norms``, also for every other module of torch.nn that has parameters or buffers (BatchNorm, PReLU).
    """
    owned = owners(gm)
    targets = set(called(gm))
    found = called(gm) if norms else layers(gm)
    return {target: _guard(gm, target, module, owned, targets) for target, module in found.items()}


def _guard(
    gm: fx.GraphModule, target: str, module: nn.Module, owned: dict[int, list[str]], targets: set[str]
) -> Reason | None:
    if isinstance(module, LAYERS) and not is_stock(module) and not is_parametrized(module):
        return Reason("subclass", f"{type(module).__name__} is a subclass of {op(module)} with a behaviour of its own")
    if (reason := added(module)) is not None:
        return reason
    if is_factor(gm, target):
        return FACTOR
    for name, parameter in module.named_parameters():
        others = [owner for owner in owned[id(parameter)] if not owner.startswith(f"{target}.")]
        if others:
            return shared_parameter(name, others[0])
    for node in gm.graph.find_nodes(op="get_attr", sort=False):
        if str(node.target).startswith(f"{target}."):
            return Reason("read-directly", f"its {str(node.target).rpartition('.')[2]} is read directly as well")
    parts = target.split(".")
    if any(".".join(parts[:i]) in targets for i in range(1, len(parts))):
        return Reason("container-called", "a module around it is called as a whole as well")
    if any(source(node) is None for node in calls(gm, target)):
        return MORE_INPUTS
    return None


def is_factor(gm: fx.GraphModule, target: str) -> bool:
    """Whether the layer is a factor of a model that came compressed: there is no provenance, names and calls tell.

    It is one of several layers with the names of factors that are called in a chain; see `chained`.
    """
    around, _, role = target.rpartition(".")
    known = provenance(calls(gm, target)[0])
    if role not in FACTORS or not around or (known is not None and known.role != "original"):
        return False
    if captured_or_bare(gm).is_container_of_factors(around):
        return True
    parts = {f"{around}.{other}" for other in FACTORS if other != role}

    def beside(node: fx.Node | None) -> bool:
        return node is not None and node.op == "call_module" and str(node.target) in parts

    def chain(node: fx.Node) -> bool:
        return beside(source(node)) or (len(node.users) == 1 and beside(next(iter(node.users))))

    return all(chain(node) and isinstance(gm.get_submodule(target), LAYERS) for node in calls(gm, target))


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


def check_names(gm: fx.GraphModule, patterns: Sequence[str]) -> None:
    """Raise FxlrdError for a name or glob that fits no layer of the captured model."""
    whole = captured(gm)
    known = [*layers(gm), *(whole.unreached if whole is not None else ())]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in known):
            raise unknown("layer", pattern, known)


def matches(name: str, patterns: Sequence[str]) -> str | None:
    """Return the first of ``patterns`` (names or globs) that the module ``name``, or a module around it, fits."""
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next((p for p in patterns if any(fnmatch.fnmatchcase(n, p) for n in prefixes)), None)


def is_stem(gm: fx.GraphModule, name: str, module: nn.Module) -> bool:
    """Whether the layer is a conv that reads the model's input, of at most four channels, with no layer before."""
    if not isinstance(module, Conv) or module.in_channels > _STEM_CHANNELS:
        return False
    found = layers(gm)
    return all(not _reads_layer(source(call), found) for call in calls(gm, name))


def _reads_layer(node: fx.Node | None, found: Mapping[str, nn.Module]) -> bool:
    pending, seen = [node] if node is not None else [], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "call_module" and str(current.target) in found:
            return True
        pending.extend(current.all_input_nodes)
    return False


def hooked(module: nn.Module) -> bool:
    """Whether the module has hooks on its forward or backward, which a trace or a replacement would lose."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def owners(gm: nn.Module) -> dict[int, list[str]]:
    """Return every name of every parameter, by the parameter's identity: two names are a tie."""
    found: dict[int, list[str]] = {}
    aliases: dict[int, str] = {}
    for prefix, module in gm.named_modules(remove_duplicate=False):
        canonical = aliases.setdefault(id(module), prefix)
        if canonical != prefix:
            continue
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return found
