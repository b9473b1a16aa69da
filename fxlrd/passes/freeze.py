"""freeze: train one factor of each layer (paper, §2.2).

    first (frozen) → last                   an SVD pair
    first (frozen) → core → last (frozen)   a Tucker triple

Only weights are frozen; a bias still trains. Exact: the forward does not change. With the schedule ``sequential``, even
epochs train the factors above, odd epochs the others.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxlrd.errors import Reason, unknown
from fxlrd.graph.facts import provenance
from fxlrd.graph.layer import decomposed_layers
from fxlrd.layers.kinds import LAYERS, as_layer
from fxlrd.layers.readable import is_container
from fxlrd.passes.contract import PassResult, Site, Skip
from fxlrd.passes.driver import start
from fxlrd.progress import Progress, quiet

NOTHING_DECOMPOSED = Reason("nothing-decomposed", "no layer is decomposed", "run decompose first")
SCHEDULES = ("paper", "sequential")
FORMS = (("first", "last"), ("first", "core", "last"), ("first", "core"), ("core", "last"))


@dataclass(frozen=True)
class Freeze:
    """Set ``requires_grad`` of the factors by ``schedule`` (paper or sequential) for ``epoch``, counted from 0."""

    needs: ClassVar[tuple[str, ...]] = ()

    schedule: str = "paper"
    epoch: int = 0

    def __post_init__(self) -> None:
        check_schedule(self.schedule)

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` whose factors are its own, sharing the tensors but not ``requires_grad``."""
        run = start(self, gm, progress)
        layers = forms(run.gm)
        if not layers:
            run.add(Skip("model", NOTHING_DECOMPOSED))
        run.each(layers, lambda name: self._freeze(run.gm, name, layers[name]))
        return run.result()

    def _freeze(self, gm: fx.GraphModule, name: str, form: nn.Module) -> Site | Skip:
        own = nn.Sequential()
        for role, part in form.named_children():
            own.add_module(role, _own(part))
        gm.set_submodule(name, own.train(form.training))
        trained = " and ".join(_set(own, self.schedule, self.epoch))
        if _trains(own) == _trains(form):
            return Skip(name, Reason("trains-already", f"it trains {trained} already"))
        return Site(name, True, f"trains {trained}")


def freeze_factors(model: nn.Module, schedule: str = "paper", epoch: int = 0) -> list[str]:
    """Set ``requires_grad`` of a model's factors in place and return the names of the weights that train.

    Factors are recognised by name (``….first``, ``….core``, ``….last``), so that this works on a loaded model too.
    Training loops call it at the start of each epoch. Raises FxlrdError for an unknown schedule.
    """
    check_schedule(schedule)
    return [f"{name}.{role}.weight" for name, form in forms(model).items() for role in _set(form, schedule, epoch)]


def check_schedule(schedule: str) -> None:
    """Raise FxlrdError for an unknown schedule."""
    if schedule not in SCHEDULES:
        raise unknown("freezing schedule", schedule, SCHEDULES)


def forms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the containers of the factors of each decomposed layer, by name.

    The provenance of a graph's nodes says which those are. In a model without it (the user's own, or unpickled) every
    bare container counts whose convs and linears have the names of factors, and at most the last one a bias.
    """
    names = _decomposed_names(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name and _is_form(module) and (names is None or name in names)
    }


def _decomposed_names(model: nn.Module) -> set[str] | None:
    """Return the names of a graph's decomposed layers; None for a model without a graph or without provenance."""
    if not isinstance(model, fx.GraphModule) or not any(provenance(node) for node in model.graph.nodes):
        return None
    return {layer.name for layer in decomposed_layers(model)}


def _is_form(module: nn.Module) -> bool:
    parts = list(module.children())
    return (
        (is_container(module) or type(module) is nn.Module)
        and tuple(name for name, _ in module.named_children()) in FORMS
        and all(isinstance(part, LAYERS) for part in parts)
        and all(part.bias is None for part in parts[:-1])
    )


def _set(form: nn.Module, schedule: str, epoch: int) -> list[str]:
    roles = [role for role, _ in form.named_children()]
    main = {"core"} if "core" in roles else {"last"}
    turn = schedule == "sequential" and epoch % 2 == 1
    trained = [role for role in roles if (role in main) != turn]
    for role, part in form.named_children():
        as_layer(part).weight.requires_grad_(role in trained)
    return trained


def _trains(form: nn.Module) -> list[bool]:
    return [p.requires_grad for p in form.parameters()]


def _own(part: nn.Module) -> nn.Module:
    """Return the module with parameters of its own on the same storage."""
    own = copy.copy(part)
    own._parameters = {
        name: None if p is None else nn.Parameter(p.detach(), p.requires_grad) for name, p in part._parameters.items()
    }
    return own
