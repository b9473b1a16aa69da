"""The model around the regions that were captured of it: for models that cannot be traced as a whole.

Its regions stand side by side in one graph, each call with placeholders of its own. What those are given is
recorded while the model itself runs, its own code between the regions and all; and what a region became goes back
into the model layer by layer, under the layers' names.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.compare import Difference, difference
from fxlrd.graph.facts import provenance
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating, run
from fxlrd.graph.surgery import called, chained
from fxlrd.layers.kinds import LAYERS, OPTIONS

CALLS = 32
"""So many calls of one module are recorded in one run of the model at most; a decoder makes one for each token."""
DESCRIBING = dict.fromkeys(name for kind in LAYERS for name in (*OPTIONS[kind], "nf", "nx") if name != "bias")
"""The options of a layer, which the code that calls it may read; ``nf`` and ``nx`` are those of a GPT-2 Conv1D."""


@dataclass(frozen=True)
class Call:
    """One call of a module while its model ran: arguments in forward's order and output, tensors copied."""

    arguments: tuple[Any, ...]
    output: Any


@dataclass(frozen=True)
class Slot:
    """A region's call that placeholders of the graph stand for: the ``call``-th, with so many ``arguments``.

    It is the first of ``times`` calls with arguments of these shapes.
    """

    name: str
    call: int
    arguments: int
    times: int = 1


@dataclass(frozen=True)
class Around:
    """The ``model``, the slots of the graph in the order of its placeholders, and what is outside of the regions.

    ``model`` has modules of its own, tensors are the user's; ``modules`` are those of the regions, by name.
    ``example`` is what the slots got from example ``inputs``; ``params`` and ``flops`` are those that no region has.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    slots: tuple[Slot, ...]
    inputs: Inputs
    example: tuple[Tensor, ...]
    params: int = 0
    flops: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Around:
        return self

    def feed(self, inputs: Inputs) -> list[Tensor]:
        """Return what the placeholders get while the model runs on ``inputs``.

        A region that is called less often than with the example inputs gets one of its calls again, and one that is
        not called, or not with tensors for all of its arguments, what it got then.
        """
        if inputs is self.inputs:
            return [t.clone() for t in self.example]
        calls = record(self.model, inputs, {slot.name for slot in self.slots})
        values: list[Tensor] = []
        for slot in self.slots:
            found = [call.arguments for call in calls.get(slot.name, ()) if all_tensors(call.arguments, slot.arguments)]
            if found:
                values += copies(found[slot.call % len(found)])
            else:
                values += self.example[len(values) : len(values) + slot.arguments]
        return values

    def compared(self, model: nn.Module, gm: fx.GraphModule, inputs: Inputs) -> Difference:
        """Return how far what the regions of ``model`` give lies from what the graph gives for the same arguments.

        What ``model`` does not call any more, as its values are others now, does not count.
        """
        calls = record(model, inputs, {slot.name for slot in self.slots})
        here: list[Call | None] = []
        given: list[Tensor] = []
        for slot in self.slots:
            found = [c for c in calls.get(slot.name, ()) if all_tensors(c.arguments, slot.arguments)]
            call = found[slot.call % len(found)] if found else None
            here.append(call)
            given += call.arguments if call else self.example[len(given) : len(given) + slot.arguments]
        with evaluating(gm), torch.no_grad():
            outputs = fx.Interpreter(gm).run(*copies(given))
        both = [(call.output, output) for call, output in zip(here, outputs, strict=True) if call is not None]
        return difference(tensors([a for a, _ in both]), tensors([b for _, b in both]), "regions")


def structure(model: nn.Module) -> nn.Module:
    """Return a copy of the model with modules of its own around the very same parameters and buffers."""
    return _copied(model, {id(t): t for t in chain(model.parameters(), model.buffers())})


def own(model: nn.Module) -> nn.Module:
    """Return a copy of the model that shares nothing with it."""
    return _copied(model, {})


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    # What a forward left on its module with a history of gradients is no parameter, and cannot be copied with it.
    left = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in left} | memo)
    except Exception as error:
        raise FxlrdError(
            f"{type(model).__name__} cannot be copied ({one_line(error)}): is a lock or a file kept on it?"
        ) from error


def record(model: nn.Module, inputs: Inputs, names: Collection[str]) -> dict[str, list[Call]]:
    """Run the model in eval mode and return the calls of the modules ``names``."""
    calls: dict[str, list[Call]] = {}
    with _watching(model, names, lambda name, call: calls.setdefault(name, []).append(call), calls):
        run(model, inputs)
    return calls


@contextmanager
def _watching(
    model: nn.Module, names: Collection[str], take: Callable[[str, Call], None], calls: dict[str, list[Call]]
) -> Iterator[None]:
    open_: dict[str, list[Any]] = {name: [] for name in names}
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            wanted = len(calls.get(name, ())) < CALLS
            open_[name].append(copies(bound(module, args, kwargs)) if wanted else None)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            arguments = open_[name].pop()
            if arguments is not None:
                take(name, Call(arguments, copies(output)))

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


def bound(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Return the arguments of a call in the order of forward's."""
    return tuple(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())


def copies(value: Any) -> Any:
    """Return the value with copies of its tensors: what comes next may write into them."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


def put(model: nn.Module, gm: fx.GraphModule, was: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put what ``gm`` calls in the place of the modules ``was`` into ``model``, under their names.

    Returns the modules that were there, by name; setting them again undoes it.
    """
    names = rewritten(gm, was)
    gone = _gone(gm, was)
    # In the model each must be callable; what was composed away is passed through.
    return put_modules(
        model, {name: nn.Identity() if name in gone else chained(gm.get_submodule(name)) for name in names}
    )


def put_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules into ``model`` under their names, and return those that were there. Aliases stay one module."""
    modules = dict(model.named_modules(remove_duplicate=False))
    before = {}
    for name, module in new.items():
        for alias in [alias for alias, m in modules.items() if m is modules[name]]:
            before[alias] = modules[alias]
            describe(module, modules[alias])
            model.set_submodule(alias, module.train(modules[alias].training))
    return before


def describe(new: nn.Module, old: nn.Module) -> None:
    """Leave on a layer's factors what forwards around it may read of the layer: its strides, its features."""
    if type(new) is nn.Sequential:
        for name in DESCRIBING:
            if hasattr(old, name):
                setattr(new, name, getattr(old, name))


def rewritten(gm: fx.GraphModule, was: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the modules ``was`` in whose place ``gm`` has others, or factors, or nothing."""
    known = [(str(n.target), p.name) for n in gm.graph.nodes if (p := provenance(n)) is not None]
    factored = {name for target, name in known if target.startswith(f"{name}.")}  # or what merging left of factors
    others = {name for name, m in called(gm).items() if name in was and m is not was[name]}
    return factored | others | _gone(gm, was)


def _gone(gm: fx.GraphModule, was: Mapping[str, nn.Module]) -> set[str]:
    return set(was) - {p.name for n in gm.graph.nodes if (p := provenance(n)) is not None}


def take_back(model: nn.Module, before: dict[str, nn.Module]) -> None:
    """Undo `put`."""
    for name, module in before.items():
        model.set_submodule(name, module)


def all_tensors(arguments: tuple[Any, ...], count: int) -> bool:
    """Whether a call gave as many arguments, each a tensor."""
    return len(arguments) == count and all(isinstance(v, Tensor) for v in arguments)


def plain(module: nn.Module, args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call gives every argument of forward, each a tensor: nothing of it is then frozen in a trace."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for p in parameters):
        return False
    return all_tensors(bound(module, args, kwargs), len(parameters))
