"""A model and the regions inside it: recording what the regions get, and putting rewritten layers back.

For models that cannot be traced as a whole (`fxlrd.graph.captured.Regions`): while the model itself runs, the arguments
and outputs of its regions are recorded; what a region became goes back into the model layer by layer, under the layers'
names.
"""

from __future__ import annotations

import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._pytree import tree_map

from fxlrd.graph.attentions import attention_of, inside, open_for, with_siblings
from fxlrd.graph.facts import provenance
from fxlrd.graph.fast_paths import turn_off_around
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.placing import put
from fxlrd.graph.run import run, set_mode
from fxlrd.graph.surgery import called, chained
from fxlrd.graph.writes import changes_in_place
from fxlrd.layers.absorbed import in_place_of
from fxlrd.layers.described import DescribedFactors
from fxlrd.layers.kinds import LAYERS, OPTIONS
from fxlrd.layers.readable import ReadableFactors, weight_shape_of

CALLS = 32
"""Calls of one module that are recorded in one run of the model, at most: a decoder makes one for each token."""
DESCRIBING = dict.fromkeys(name for kind in LAYERS for name in (*OPTIONS[kind], "nf", "nx") if name != "bias")
"""The options of a layer, which the code that calls it may read; ``nf`` and ``nx`` are those of a GPT-2 Conv1D."""


@dataclass(frozen=True)
class Call:
    """One call of a module while its model ran: arguments in forward's order and output, tensors copied.

    Calls may share copies: copy them again for what may write into them.
    """

    arguments: tuple[Any, ...]
    output: Any


@dataclass(frozen=True)
class Slot:
    """A region's call that placeholders of the graph stand for.

    Attributes:
        name: the region's name in the model.
        call: the index of the call among those of the region in one run.
        arguments: the number of its arguments, each a tensor.
        times: the number of calls with arguments of these shapes; this is the first.
        ends: the module whose call of the same number ends the region, where that is another one.
    """

    name: str
    call: int
    arguments: int
    times: int = 1
    ends: str = ""


def call_for(slot: Slot, calls: Mapping[str, list[Call]]) -> Call | None:
    """Return the recorded call that a slot stands for; only calls with tensors for all arguments count."""
    recorded = calls_between(slot.name, slot.ends, calls)
    usable = [call for call in recorded if all_tensors(call.arguments, slot.arguments)]
    return usable[slot.call % len(usable)] if usable else None


def calls_between(name: str, ends: str, calls: Mapping[str, list[Call]]) -> list[Call]:
    """Return the calls of a region, with the arguments of module ``name`` and the outputs of ``ends``, if given."""
    starting = calls.get(name, [])
    if not ends:
        return starting
    return [Call(start.arguments, end.output) for start, end in zip(starting, calls.get(ends, ()), strict=False)]


def names_in(slots: Iterable[Slot]) -> set[str]:
    """Return the modules whose calls have to be recorded for the slots."""
    return {name for slot in slots for name in (slot.name, slot.ends) if name}


def record(model: nn.Module, inputs: Inputs, names: Collection[str]) -> dict[str, list[Call]]:
    """Run the model in eval mode and return the calls of the modules ``names``.

    What a run leaves on the model, it leaves: give it a copy.
    """
    return recorded_calls(model, names, lambda: run(model, inputs))


def recorded_calls(model: nn.Module, names: Collection[str], run_model: Callable[[], Any]) -> dict[str, list[Call]]:
    """Return the calls of the modules ``names`` of a model while ``run_model`` runs it.

    Attentions that they are projections of are opened.
    Fast paths that read weights in the place of calling layers are off meanwhile.
    """
    open_for(model, names)
    calls: dict[str, list[Call]] = {}
    watching = _watching(model, names, lambda name, call: calls.setdefault(name, []).append(call), calls)
    with watching, BaseTorchFunctionMode():
        run_model()
    return calls


@contextmanager
def _watching(
    model: nn.Module, names: Collection[str], take: Callable[[str, Call], None], calls: dict[str, list[Call]]
) -> Iterator[None]:
    open_: dict[str, list[Any]] = {name: [] for name in names}
    handles, clones = [], _Clones()

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            wanted = len(calls.get(name, ())) < CALLS
            open_[name].append(clones.of(bound(module, args, kwargs)) if wanted else None)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            arguments = open_[name].pop()
            if arguments is not None:
                take(name, Call(arguments, clones.of(output)))

        return hook

    try:
        for name in names:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Clones:
    """Copies tensors, each once as long as it stays as it is: query, key and value read the same one."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def of(self, value: Any) -> Any:
        """Return the value with copies of its tensors, which are not to be written into."""
        return tree_map(lambda v: self._of(v) if isinstance(v, Tensor) else v, value)

    def _of(self, tensor: Tensor) -> Tensor:
        if tensor.is_inference():
            return tensor.detach().clone()
        tensor_then, changes, clone = self._made.get(id(tensor), (None, 0, tensor))
        if tensor_then is None or tensor_then() is not tensor or changes != changes_in_place(tensor):
            clone = tensor.detach().clone()
            self._made[id(tensor)] = weakref.ref(tensor), changes_in_place(tensor), clone
        return clone


def bound(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Return the arguments of a call in the order of forward's."""
    return tuple(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())


def copies(value: Any) -> Any:
    """Return the value with copies of its tensors: what comes next may write into them."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


def install_layers(
    model: nn.Module, gm: fx.GraphModule, captured_modules: Mapping[str, nn.Module], described: Collection[str] = ()
) -> dict[str, nn.Module]:
    """Put what ``gm`` calls in the place of ``captured_modules`` into ``model``, under their names.

    Returns the modules that were there, by name: `undo` with those undoes it. ``described`` are those whose weight
    other code asks for its dtype, device or shape.
    """
    names = with_siblings(model, rewritten(gm, captured_modules), captured_modules)
    removed = _removed(gm, captured_modules)
    # The user's code still calls a layer that was composed into another one: the input is passed through.
    modules = {name: nn.Identity() if name in removed else chained(gm.get_submodule(name)) for name in names}
    return set_modules(model, modules, described)


def set_modules(
    model: nn.Module, new: Mapping[str, nn.Module], described: Collection[str] = ()
) -> dict[str, nn.Module]:
    """Put modules into ``model`` under their names, and return the replaced ones. Aliases stay one module.

    Factors of layers in ``described`` answer for the layer's weight, see `fxlrd.layers.described`; those of others
    compose it, see `fxlrd.layers.readable`. An Identity in the place of a BatchNorm reads as one that does nothing, see
    `fxlrd.layers.absorbed`. Fast paths around the modules are turned off. An attention of torch's own
    whose projections are among them is opened; it is returned in their place.
    """
    closed = open_for(model, new)
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = dict(closed)
    placed: dict[str, nn.Module] = {}
    for name, module in new.items():
        if type(module) is nn.Sequential:
            kind = DescribedFactors if name in described else ReadableFactors
            module = kind(OrderedDict(module.named_children()))
        module = in_place_of(module, modules[name])
        for alias in [alias for alias, m in modules.items() if m is modules[name]]:
            if attention_of(alias) not in closed:
                replaced[alias] = modules[alias]
            describe(module, modules[alias])
            set_mode(module, modules[alias].training)
            placed[alias] = module
    put(model, placed)
    turn_off_around(model, replaced)
    return replaced


def undo(model: nn.Module, replaced: Mapping[str, nn.Module]) -> None:
    """Undo `install_layers` or `set_modules`: put the ``replaced`` modules back, in their own modes."""
    put(model, replaced)


def describe(new: nn.Module, old: nn.Module) -> None:
    """Leave on a layer's factors what the user's code may read from the layer: its strides, its features."""
    if not isinstance(new, nn.Sequential):
        return
    for name in DESCRIBING:
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    if isinstance(new, DescribedFactors):
        own = {name: None if p is None else tuple(p.shape) for name, p in old._parameters.items()}
        new.described = old.described if isinstance(old, DescribedFactors) else own
    elif isinstance(new, ReadableFactors):
        new.weight_shape = weight_shape_of(old)


def rewritten(gm: fx.GraphModule, captured_modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the captured modules that ``gm`` has others for, or factors, or nothing."""
    origins = [(str(n.target), p.name) for n in gm.graph.nodes if (p := provenance(n)) is not None]
    # A factor's target starts with its layer's name; so does what merging made of a factor.
    factored = {name for target, name in origins if target.startswith(f"{name}.")}
    others = {name for name, m in called(gm).items() if name in captured_modules and m is not captured_modules[name]}
    return factored | others | _removed(gm, captured_modules)


def _removed(gm: fx.GraphModule, captured_modules: Mapping[str, nn.Module]) -> set[str]:
    named = {p.name for n in gm.graph.nodes if (p := provenance(n)) is not None}
    return set(captured_modules) - named - inside(captured_modules, called(gm))


def all_tensors(arguments: tuple[Any, ...], count: int) -> bool:
    """Whether a call gave as many arguments, each a tensor."""
    return len(arguments) == count and all(isinstance(v, Tensor) for v in arguments)


def plain(module: nn.Module, args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call gives every argument of forward, each a tensor: nothing of it is then frozen in a trace."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for p in parameters):
        return False
    return all_tensors(bound(module, args, kwargs), len(parameters))
