"""Surgery on FX graphs: provenance, non-destructive copies, replacement of a layer by its factors.

What a node came from is ``node.meta["fxlrd"]``, a `Provenance`; it is shared by copies of the graph and
survives every pass. What is known of the captured model as a whole is ``graph_module.meta["fxlrd"]``, a
`Captured`.
"""

from __future__ import annotations

import copy
import fnmatch
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata, _extract_tensor_metadata
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import BaseTorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from fxlrd.errors import FxlrdError, VerificationError, one_line, unknown
from fxlrd.layers import LAYERS, Conv, is_stock, op

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

    from fxlrd.around import Around

KEY = "fxlrd"
MOMENTS = "fxlrd.moments"
"""The key of a node's second moments, see fxlrd/moments.py."""
SEEN = "fxlrd.seen"
"""The key of what calibration saw of a layer, on its call and on those of its factors; see fxlrd/moments.py."""
KEPT = "fxlrd.kept"
"""The key of the output channels of the original layer that a merged one still makes (a tensor of indices)."""
TIMES = "fxlrd.times"
"""The key of how many calls in one run of the model a node stands for, where those are several; see `times`."""
FACTORS = ("first", "core", "branch", "last")
"""The roles of the parts of a layer that stands decomposed."""
FACTOR = "it is a low-rank factor already"
NEVER_CALLED = "it is never called in eval mode and is no part of the captured model"
_STEM_CHANNELS = 4


@dataclass(frozen=True)
class Provenance:
    """Where a node comes from.

    ``name`` is the module's name in the captured model, ``role`` one of original, first, core, last, merged,
    branch; ``ranks`` are those of the layer's low-rank form and ``error`` its relative error: of the weight, or of
    the layer's output on calibration inputs if it is ``fitted`` to those. The
    ``original`` module is held by reference, never copied. ``latency`` is the measured time of the layer as
    it now stands, in seconds, where a pass has measured it.
    """

    name: str
    role: str = "original"
    ranks: tuple[int | None, ...] = ()
    error: float | None = None
    latency: float | None = None
    fitted: bool = False
    original: nn.Module | None = field(default=None, compare=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Provenance:
        return self


@dataclass(frozen=True)
class Inputs:
    """Example inputs as positional and keyword arguments of the model's forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example_inputs: Any) -> Inputs:
        """Read a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            return cls((), dict(example_inputs))
        if isinstance(example_inputs, (tuple, list)):
            return cls(tuple(example_inputs))
        if isinstance(example_inputs, Tensor):
            return cls((example_inputs,))
        raise FxlrdError(
            f"example inputs: a {type(example_inputs).__name__} is not a tensor, a tuple of positional arguments "
            "or a dict of keyword arguments"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Inputs:
        return self

    def fresh(self) -> Inputs:
        """Return a copy with tensors, and caches, of its own, for a forward that may write into them."""
        args, kwargs = tree_map(
            lambda v: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v), (self.args, self.kwargs)
        )
        return Inputs(args, kwargs)

    def describe(self) -> str:
        """Return the tensors' dtypes, shapes and devices in words."""
        tensors = [t for t in tree_flatten((self.args, self.kwargs))[0] if isinstance(t, Tensor)]
        return ", ".join(f"{str(t.dtype)[6:]}{list(t.shape)} on {t.device}" for t in tensors) or "no tensor"


@dataclass(frozen=True)
class Unreached:
    """A layer that no node of the graph stands for, and why."""

    reason: str
    op: str
    shape: tuple[int, ...]
    params: int


@dataclass(frozen=True)
class Captured:
    """What capture knows of the whole model: its example inputs, the layers that no node of the graph stands
    for, by name, what had to be frozen or left out and, where the graph is of regions only, what is ``around`` them.
    Where the model came compressed, the ``shapes`` that weights of its modules had before, by the modules' names.
    """

    inputs: Inputs
    unreached: dict[str, Unreached]
    warnings: tuple[str, ...] = ()
    around: Around | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def provenance(node: fx.Node) -> Provenance | None:
    """Return the node's provenance, if it has any."""
    found = node.meta.get(KEY)
    return found if isinstance(found, Provenance) else None


def captured(gm: fx.GraphModule) -> Captured | None:
    """Return what capture left on the graph module, if it came through capture."""
    found = gm.meta.get(KEY)
    return found if isinstance(found, Captured) else None


def annotate(gm: fx.GraphModule) -> None:
    """Give each module call that has no provenance one that names it as original."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    for node in gm.graph.nodes:
        if node.op == "call_module" and provenance(node) is None:
            node.meta[KEY] = Provenance(str(node.target), original=modules[str(node.target)])


def fork(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph module with a graph of its own that shares every leaf module with ``gm``.

    Replacing a module in the fork leaves ``gm`` as it was.
    """
    if not isinstance(gm, fx.GraphModule):
        raise FxlrdError(f"a {type(gm).__name__} is not captured yet: fxlrd.capture(model, example_inputs)")
    new = fx.GraphModule(gm, copy.deepcopy(gm.graph), class_name=type(gm).__name__)
    new.meta.update(gm.meta)
    set_container_mode(new, gm.training)
    for name in {p.name for n in new.graph.nodes if (p := provenance(n)) is not None and p.role in FACTORS}:
        parts = new.get_submodule(name)
        new.set_submodule(name, chained(parts).train(parts.training))
    return new


def chained(parts: nn.Module) -> nn.Module:
    """Return a layer's factors as a module that can be called as the layer: torch.fx makes bare containers."""
    return nn.Sequential(OrderedDict(parts.named_children())) if type(parts) is nn.Module else parts


def set_container_mode(gm: fx.GraphModule, training: bool) -> None:
    """Set the mode of the bare modules that torch.fx makes as containers, and of the graph module itself."""
    gm.training = training
    for module in gm.modules():
        if type(module) is nn.Module:
            module.training = training


def called(gm: fx.GraphModule) -> dict[str, nn.Module]:
    """Return the modules that the graph calls, by target, in graph order."""
    targets = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
    return {target: gm.get_submodule(target) for target in targets}


def calls(gm: fx.GraphModule, target: str) -> list[fx.Node]:
    """Return the nodes that call the module ``target``, in graph order."""
    return list(gm.graph.find_nodes(op="call_module", target=target))


def times(node: fx.Node) -> int:
    """Return how many calls of the same shapes the node stands for: several where a region was called so often."""
    return int(node.meta.get(TIMES, 1))


def source(node: fx.Node) -> fx.Node | None:
    """Return the one tensor input of a layer's call, or None if it is called in another way."""
    given = [*node.args, *node.kwargs.values()]
    if len(given) == 1 and isinstance(given[0], fx.Node) and set(node.kwargs) <= {"input", "x"}:
        return given[0]
    return None


def layers(gm: fx.GraphModule) -> dict[str, nn.Module]:
    """Return the conv and linear modules that the graph calls, subclasses included, by target."""
    return {target: m for target, m in called(gm).items() if isinstance(m, LAYERS)}


def replaceable(gm: fx.GraphModule, norms: bool = False) -> dict[str, str | None]:
    """Return for each layer None, or why it must not be replaced by other modules.

    With ``norms``, also for every other module of torch.nn that has parameters or buffers (BatchNorm, PReLU).
    """
    owned = owners(gm)
    targets = set(called(gm))
    found = called(gm) if norms else layers(gm)
    return {target: _guard(gm, target, module, owned, targets) for target, module in found.items()}


def _guard(
    gm: fx.GraphModule, target: str, module: nn.Module, owned: dict[int, list[str]], targets: set[str]
) -> str | None:
    if isinstance(module, LAYERS) and not is_stock(module) and not is_parametrized(module):
        return f"{type(module).__name__} is a subclass of {op(module)} with a behaviour of its own"
    if (reason := added(module)) is not None:
        return reason
    if is_factor(gm, target):
        return FACTOR
    for name, parameter in module.named_parameters():
        others = [owner for owner in owned[id(parameter)] if not owner.startswith(f"{target}.")]
        if others:
            return f"its {name} is shared with {others[0]}"
    for node in gm.graph.find_nodes(op="get_attr", sort=False):
        if str(node.target).startswith(f"{target}."):
            return f"its {str(node.target).rpartition('.')[2]} is read directly as well"
    parts = target.split(".")
    if any(".".join(parts[:i]) in targets for i in range(1, len(parts))):
        return "a module around it is called as a whole as well"
    if any(source(node) is None for node in calls(gm, target)):
        return "it is called with more than its input"
    return None


def is_factor(gm: fx.GraphModule, target: str) -> bool:
    """Whether the layer is a factor of a model that came compressed: there is no provenance, names and calls tell.

    It is one of several layers with the names of factors that are called in a chain; see `chained`.
    """
    around, _, role = target.rpartition(".")
    known = provenance(calls(gm, target)[0])
    if role not in FACTORS or not around or (known is not None and known.role != "original"):
        return False
    whole = captured(gm)
    if whole is not None and whole.around is not None:
        holder = whole.around.model.get_submodule(around)
        if type(holder) is nn.Sequential and {name for name, _ in holder.named_children()} <= set(FACTORS):
            return True
    parts = {f"{around}.{other}" for other in FACTORS if other != role}

    def beside(node: fx.Node | None) -> bool:
        return node is not None and node.op == "call_module" and str(node.target) in parts

    def chain(node: fx.Node) -> bool:
        return beside(source(node)) or (len(node.users) == 1 and beside(next(iter(node.users))))

    return all(chain(node) and isinstance(gm.get_submodule(target), LAYERS) for node in calls(gm, target))


def added(module: nn.Module) -> str | None:
    """Return what was added to this one module that a replacement would drop, or None."""
    if is_parametrized(module):
        return "its weight is parametrized: remove that with torch.nn.utils.parametrize.remove_parametrizations first"
    if hooked(module):
        return "it has hooks (as weight_norm and spectral_norm do), which a replacement would drop"
    if "forward" in vars(module):
        return "its forward was replaced on the module itself (as accelerate does), which a replacement would drop"
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks:
            return f"its {name} has hooks, which a replacement would drop"
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


def replace(
    gm: fx.GraphModule, target: str, module: nn.Sequential, ranks: tuple[int | None, ...], **known: Any
) -> None:
    """Replace every call of layer ``target`` by calls of the named children of ``module``, in order.

    The children become ``target.<child>``, each with the child's name as its role. ``known`` goes into the
    provenance. The graph module is changed in place and not yet recompiled.
    """
    replaced = gm.get_submodule(target)
    gm.set_submodule(target, module)
    for node in calls(gm, target):
        old = provenance(node)
        value = source(node)
        assert value is not None, f"{target} is not replaceable"
        kept = node.meta
        with gm.graph.inserting_before(node):
            for role, part in module.named_children():
                value = gm.graph.call_module(f"{target}.{role}", (value,))
                value.meta = {k: v for k, v in kept.items() if k not in ("tensor_meta", "flops", MOMENTS)}
                value.meta[KEY] = Provenance(
                    old.name if old else target,
                    role,
                    ranks,
                    original=old.original if old else replaced,
                    **known,
                )
                infer_shape(value, part)
        if MOMENTS in kept:  # those of the layer's output, which the last factor makes now
            value.meta[MOMENTS] = kept[MOMENTS]
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)


def restore(gm: fx.GraphModule, name: str, latency: float | None = None) -> None:
    """Put the original layer ``name`` back in the place of its factors, at every call."""
    parts = [n for n in gm.graph.nodes if (p := provenance(n)) is not None and p.name == name]
    inside = set(parts)
    for last in [n for n in parts if not any(user in inside for user in n.users)]:
        chain = [last]
        while (before := source(chain[-1])) in inside and before is not None:
            chain.append(before)
        p = provenance(last)
        assert p is not None
        assert p.original is not None, f"{name}: the original layer is not known"
        gm.set_submodule(name, p.original)
        start = source(chain[-1])
        with gm.graph.inserting_before(last):
            node = gm.graph.call_module(name, (start,))
        node.meta = {k: v for k, v in last.meta.items() if k != "flops"}
        node.meta = {**node.meta, KEY: Provenance(name, original=p.original, latency=latency)}
        last.replace_all_uses_with(node)
        for old in chain:
            gm.graph.erase_node(old)


def infer_shape(node: fx.Node, module: nn.Module) -> None:
    """Give the node of a layer's call its shape and dtype from those of its input, without computing."""
    given = node.all_input_nodes[0].meta.get("tensor_meta")
    if not isinstance(given, TensorMetadata):
        return
    stand_in = torch.empty_strided(given.shape, given.stride, dtype=given.dtype, device="meta")
    weights = {name: t.to("meta") for name, t in module.state_dict().items()}
    with torch.no_grad():
        node.meta["tensor_meta"] = _extract_tensor_metadata(torch.func.functional_call(module, weights, (stand_in,)))


def refresh_shapes(gm: fx.GraphModule) -> None:
    """Give every node its shape and dtype for the inputs that the model was captured with, without computing."""
    from torch._subclasses import FakeTensorMode

    known = captured(gm)
    if known is not None:
        with evaluating(gm), torch.no_grad():
            ShapeProp(gm, FakeTensorMode()).propagate(*positional(gm, known.inputs))


class _Propagation(fx.Interpreter):
    """Runs the graph once and leaves tensor_meta and FLOPs on each node."""

    def __init__(self, gm: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(gm)
        self.counter = counter

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        metadata = fx.node.map_aggregate(result, lambda o: _extract_tensor_metadata(o) if isinstance(o, Tensor) else o)
        if tensors(result):
            n.meta["tensor_meta"] = metadata
        n.meta["flops"] = (self.counter.get_total_flops() - before) * times(n)
        return result


class _Nowhere:
    """Stands in for torch's tracker of modules, whose hooks fail on modules that are given a parameter."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count FLOPs as torch.utils.flop_counter does (2 × multiply-adds).

    nn.MultiheadAttention's fused path, whose FLOPs torch does not count, is kept off meanwhile.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, since it imports triton

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
    with BaseTorchFunctionMode(), counter:
        yield counter


def propagate(gm: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    """Run the graph in eval mode, leave shape, dtype and FLOPs on every node, and return the output tensors.

    FLOPs are those for these inputs, see `counting`.
    """
    with evaluating(gm), torch.no_grad(), counting() as counter:
        return tensors(_Propagation(gm, counter).run(*positional(gm, inputs)))


def positional(gm: fx.GraphModule, inputs: Inputs) -> list[Any]:
    """Return the model's inputs in the order of the graph's placeholders; defaults fill what was not given.

    Where the graph is of regions, what those get while the model runs on the inputs.
    """
    known = captured(gm)
    if known is not None and known.around is not None:
        return list(known.around.feed(inputs))
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = inputs.fresh()
    values: list[Any] = list(inputs.args)
    for node in placeholders[len(values) :]:
        name = str(node.target)
        if name in inputs.kwargs:
            values.append(inputs.kwargs[name])
        elif node.args:
            values.append(node.args[0])
        elif name.startswith("*"):  # *args and **kwargs that nothing was given for
            break
        else:
            raise FxlrdError(f"example inputs: the model's argument {name!r} is missing")
    return values


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in an output of any structure, in order."""
    return [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module in eval mode; on leaving, each submodule is in its own former mode again."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@dataclass(frozen=True)
class Difference:
    """How far outputs lie apart: largest absolute difference, and ‖a − b‖ / ‖b‖ over all of them."""

    max_abs: float
    relative: float


def difference(outputs: list[Tensor], reference: list[Tensor], where: str) -> Difference:
    """Compare output counts, shapes and dtypes, then values (in float64).

    Raises VerificationError, naming ``where``, if anything but values differs or values are not finite where
    the reference is.
    """
    if len(outputs) != len(reference):
        raise VerificationError(f"{where}: {len(outputs)} output tensors instead of {len(reference)}")
    largest = above = below = 0.0
    for i, (a, b) in enumerate(zip(outputs, reference, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise VerificationError(
                f"{where}: output {i} is {a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}"
            )
        wide = torch.complex128 if b.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, torch.zeros_like(a), a - b).abs()
        if not gap.isfinite().all():
            raise VerificationError(f"{where}: output {i} has NaN or Inf where the reference is finite")
        largest = max(largest, gap.max().item() if gap.numel() else 0.0)
        above += gap.square().sum().item()
        below += torch.where(b.isfinite(), b, torch.zeros_like(b)).abs().square().sum().item()
    return Difference(largest, (above / below) ** 0.5 if below else above**0.5)


def rounding(values: Sequence[Tensor]) -> float:
    """Return the relative difference of such tensors that rounding explains."""
    eps = max((torch.finfo(t.dtype).eps for t in values if t.is_floating_point() or t.is_complex()), default=0.0)
    return min(1e3 * eps, 0.1)  # a thousand roundings of bfloat16 would explain anything


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """On leaving, the model's buffers hold what they held: a forward may count its calls, or keep a cache."""
    found = [(m._buffers, *each) for m in model.modules() for each in m._buffers.items()]
    kept = [(buffers, name, t, t.clone()) for buffers, name, t in found if t is not None and not t.is_meta]
    try:
        yield
    finally:
        for buffers, name, tensor, value in kept:
            buffers[name] = tensor
            if not torch.equal(tensor, value):
                with torch.no_grad():
                    tensor.copy_(value)


def seeded(model: nn.Module, inputs: Inputs) -> Any:
    """`run`, always with the same random numbers; the generators are left as they were."""
    here = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(here)):
        torch.manual_seed(0)
        return run(model, inputs)


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Run the model in eval mode without gradients, its buffers as before afterwards.

    Raises FxlrdError where it fails on these inputs.
    """
    with evaluating(model), unmoved(model), torch.no_grad():
        try:
            own = inputs.fresh()
            return model(*own.args, **own.kwargs)
        except Exception as error:
            weights = next(iter(model.parameters()), None)
            has = (
                f"the model's weights are {str(weights.dtype)[6:]} on {weights.device}; " if weights is not None else ""
            )
            raise FxlrdError(
                f"the model fails on the example inputs ({inputs.describe()}): {has}{one_line(error)}"
            ) from error
