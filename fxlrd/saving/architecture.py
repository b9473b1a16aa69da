"""What a compressed model is, told by the architecture that it was made from: enough to save it without the original.

A layout is plain data. It describes every module of the *original* that has options or tensors of its own, or no
parts: an activation is told by its class alone,

    modules     name → [class, {option: value, "shapes": {tensor: shape}}]
    gone        names of modules that were composed away: an Identity stands for them
    arguments   None: the user's own class with the new layers inside computes what the result computes. Otherwise
                the graph does only, and these arguments of forward are frozen in it
    refused     why neither does, or None
    source      how the command line names the model, or None

and what became of those is read from the model itself when it is saved. The layout stays on the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.capturing.whole import constants
from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.captured import captured
from fxlrd.graph.compare import difference, rounding
from fxlrd.graph.facts import FACTORS
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.regions import install_layers, structural_copy
from fxlrd.graph.run import run
from fxlrd.graph.surgery import called, fork
from fxlrd.layers.kinds import LAYERS

_KEY = "_fxlrd"
_FREE = {"p", "inplace", "momentum", "training"}
"""What may differ between two instances of one architecture: no output in eval mode depends on it."""
_DROPS = ("p", "drop_prob")
"""By one of these is known what drops values in training: Dropout, StochasticDepth, DropPath."""
Layout = dict[str, Any]


def remember(model: nn.Module, layout: Layout) -> None:
    """Leave the layout on the model: as data, so that the model unpickles where there is no fxlrd."""
    if isinstance(model, fx.GraphModule):
        model.meta[_KEY] = layout  # survives deepcopy; the attribute survives pickle
    setattr(model, _KEY, layout)


def recall(model: nn.Module) -> Layout | None:
    """Return the layout that is on the model, if there is one."""
    found = model.meta.get(_KEY) if isinstance(model, fx.GraphModule) else None
    found = found if found is not None else vars(model).get(_KEY)
    return found if isinstance(found, dict) else None


def shapes_before(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of what a compressed model was made from, by module; of another, none."""
    modules = (recall(model) or {"modules": {}})["modules"]
    # The weight of a Conv1D, GPT-2's, is transposed.
    known = {n: o["shapes"].get("weight") for n, (kind, o) in modules.items() if kind != "Conv1D"}
    return {n: tuple(shape) for n, shape in known.items() if shape}


def config(module: nn.Module) -> list[Any]:
    """Return the class of a module, its options that set what it computes, and the shapes of its own tensors."""
    options: dict[str, Any] = {}
    for name in getattr(module, "__constants__", ()):
        known, value = _plain(getattr(module, name, ...))
        if known and name not in _FREE:
            options[name] = value
    own = {**module._parameters, **module._buffers}
    lazy = torch.nn.parameter.is_lazy
    options["shapes"] = {n: None if lazy(t) else list(t.shape) for n, t in own.items() if t is not None}
    return [type(module).__name__, options]


def _plain(value: Any) -> tuple[bool, Any]:
    """Return whether the value is fit for JSON, and the value as JSON gives it back."""
    if isinstance(value, (tuple, list)):
        items = [_plain(item) for item in value]
        return all(known for known, _ in items), [item for _, item in items]
    return value is None or isinstance(value, (bool, int, float, str)), value


def described(model: nn.Module, was: Mapping[str, nn.Module] | None = None) -> dict[str, list[Any]]:
    """Return the `config` of every module that computes something; where ``was`` names one, of that instead.

    Whether a module that does nothing in eval mode is there may depend on how a model is trained.
    """
    was = was or {}
    found = {}
    for name, module in (dict(model.named_modules()) | dict(was)).items():
        if any(name.startswith(f"{around}.") for around in _around(name, was)):
            continue
        kind, options = config(module)
        idle = isinstance(module, nn.Identity) or any(hasattr(module, name) for name in _DROPS)
        if options["shapes"] or len(options) > 1 or not (module._modules or idle):
            found[name] = [kind, options]
    return found


def _around(name: str, was: Mapping[str, nn.Module]) -> list[str]:
    parts = name.split(".")
    return [around for i in range(1, len(parts)) if (around := ".".join(parts[:i])) in was]


def lay_out(
    model: nn.Module, original: nn.Module, before: Mapping[str, nn.Module], arguments: dict[str, Any] | None = None
) -> Layout:
    """Return the layout of ``model``, in which other modules have taken the place of those in ``before``.

    Where ``original`` was a compressed model already, that of what this was made from.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    gone = sorted(n for n, m in before.items() if type(modules[n]) is nn.Identity and type(m) is not nn.Identity)
    first = dict(model.named_modules())  # one name of each module, as graphs have it
    found: Layout = {"modules": described(model, {n: m for n, m in before.items() if n in first}), "gone": gone}
    found |= {"arguments": arguments, "refused": None, "source": None}
    known = recall(original)
    if known is None:
        return found
    both = None if known["arguments"] is None and arguments is None else (known["arguments"] or {}) | (arguments or {})
    parts = {n for n in gone if n.rpartition(".")[2] in FACTORS and n.rpartition(".")[0] in known["modules"]}
    gone = sorted({*known["gone"], *gone} - parts)
    return known | {"gone": gone, "arguments": both}


def lay_out_graph(model: nn.Module, original: fx.GraphModule, gm: fx.GraphModule) -> Layout:
    """Return the layout of the graph that a whole model became.

    The layers are put into a copy of the user's model and that is run, with nothing in it that the graph has not;
    where it computes anything else (it asks a layer for its type, calls what the graph dropped), so are they into
    the graph as it was captured.
    """
    known = captured(original)
    assert known is not None
    inputs = known.inputs
    was = called(original)
    model = wrapped(model)
    try:
        target = structural_copy(model)
        before = install_layers(target, gm, was)
        kept = {id(t) for t in _tensors(gm)}
        if all(id(t) in kept for t in _tensors(target)) and _same(target, gm, inputs):
            return lay_out(target, model, before)
        graph = fork(original)
        layout = lay_out(target, model, before, constants(model, inputs))
        install_layers(graph, gm, was)
        if not _same(graph, gm, inputs):
            layout["refused"] = "a pass changed the graph in more than its layers, which no names tell"
        return layout
    except FxlrdError as error:
        return {"modules": {}, "gone": [], "arguments": None, "refused": one_line(error), "source": None}


def wrapped(model: nn.Module) -> nn.Module:
    """Return the model, or where it is a bare layer, that in a Sequential, as it is captured."""
    return nn.Sequential(model).train(model.training) if isinstance(model, LAYERS) else model


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _same(model: nn.Module, gm: fx.GraphModule, inputs: Inputs) -> bool:
    """Whether the two give the same bits or, on a device where no two runs do, the same but for rounding."""
    try:
        outputs, wanted = tensors(run(model, inputs)), tensors(run(gm, inputs))
        found = difference(outputs, wanted, "layout")
        if found.max_abs == 0:
            return True
        again = difference(tensors(run(gm, inputs)), wanted, "layout")
        return again.max_abs > 0 and found.relative <= rounding(wanted)
    except FxlrdError:
        return False
