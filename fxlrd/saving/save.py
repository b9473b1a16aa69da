"""save and load: a compressed model as a directory that holds no code.

    plan.json                        what became of each module of the original (`fxlrd.saving.architecture`)
    weights-<hash>.safetensors       every parameter and buffer, under its name in the model

Loading makes a copy of the user's own architecture without weights, puts empty layers into it where the plan says so,
and gives it the tensors. Nothing is decomposed, timed or unpickled; a plan names only classes in
`fxlrd.layers.kinds.OPTIONS`. All is checked before the model is handed out, against the plan and the architecture; the
plan holds a checksum of the weights and of itself.

Saving is atomic: the weights are written under the name of their own hash, and with the plan, which is replaced last
and at once, they take effect. Whoever is killed before leaves the old checkpoint, and after, the new one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.facts import FACTORS
from fxlrd.graph.surgery import chained
from fxlrd.layers.kinds import OPTIONS, options
from fxlrd.saving.architecture import Layout, config, recall
from fxlrd.saving.parts import _around, _dense, _join, _made, _plain, _slots, _strides
from fxlrd.saving.schema import _FORMAT, VERSION
from fxlrd.saving.storage import _write


class HasModel(Protocol):
    """What `compress` returned: its ``model`` is what is saved."""

    @property
    def model(self) -> nn.Module:
        """The compressed model."""
        ...


def save(result: HasModel | nn.Module, path: str | os.PathLike[str], *, source: str | None = None) -> None:
    """Write a compressed model to the directory ``path``, in the place of the checkpoint that is there.

    Args:
        result: what `compress` returned, or its model, or one from `load`; also after fine-tuning.
        path: the directory; it is made, with those around it. Of other files in it none is touched.
        source: how the command line names the architecture, such as torchvision:resnet50, if it should open the
            checkpoint.

    Raises:
        FxlrdError: for a model that no layout is known of, that holds what is no tensor, and for a failed write.
    """
    model = result if isinstance(result, nn.Module) else getattr(result, "model", None)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise FxlrdError(f"save: a {type(result).__name__} is no result of compress")
    layout = recall(model)
    if layout is None:
        raise FxlrdError("save: it is not known what this model was made from: give the result of fxlrd.compress")
    if layout["refused"] is not None:
        raise FxlrdError(f"save: {layout['refused']}")
    if source is not None:
        layout = layout | {"source": source}
    layers = _rewritten(model, layout)
    tensors, details = _tensors(model, layout, layers)
    plan = {
        "format": _FORMAT,
        "version": VERSION,
        "made_with": {"torch": torch.__version__.split("+")[0]},
        "architecture": {key: layout[key] for key in ("modules", "gone", "arguments", "source")},
        "layers": layers,
        "tensors": details,
        "training": _modes(model),
    }
    try:
        _write(Path(path), plan, tensors)
    except FxlrdError:
        raise
    except Exception as error:
        raise FxlrdError(f"save: {path}: nothing was changed there: {one_line(error)}") from error


def _rewritten(model: nn.Module, layout: Layout) -> dict[str, Any]:
    """Return what stands in the place of a module of the architecture, where that is another one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Any] = {name: _spec(name, nn.Identity()) for name in layout["gone"]}
    holders = {around for name in layout["modules"] for around in _around(name)}
    for name, was in layout["modules"].items():
        module = modules.get(name)
        if not name or module is None or name in found or config(module) == was:
            continue
        # What a graph has in the place of a module of the user's, or of a layer whose weight is read, is bare as well.
        if type(module) is nn.Module and (name in holders or not module._modules):
            continue
        found[name] = _spec(name, module)
    return found


def _spec(name: str, module: nn.Module) -> dict[str, Any]:
    """Return class and options of a module, or those of the factors that it holds."""
    module = chained(module)
    if type(module) is nn.Sequential and set(module._modules) <= set(FACTORS):
        if beside := config(module)[1]["shapes"]:
            raise FxlrdError(f"save: {name}: {', '.join(beside)} beside its factors: load makes no layer with that")
        return {"parts": [[role, _spec(f"{name}.{role}", part)] for role, part in module.named_children()]}
    if type(module) not in OPTIONS:
        raise FxlrdError(f"save: {name}: a {type(module).__name__} has taken the place of what was compressed")
    spec = {
        "kind": type(module).__name__,
        "options": {n: list(v) if isinstance(v, tuple) else v for n, v in options(module).items()},
    }
    if config(_made(name, spec)) != config(module):
        raise FxlrdError(f"save: {name}: this {type(module).__name__} is no longer what its options say")
    return spec


def _tensors(model: nn.Module, layout: Layout, layers: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the model's tensors by name, and what safetensors cannot hold of them."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise FxlrdError(f"save: {name} ({type(module).__name__}) has a state that is no tensor (get_extra_state)")
    slots = dict(_slots(model))
    wanted = [_join(name, t) for name, (_, options) in layout["modules"].items() for t in options["shapes"]]
    if layout["arguments"] is None:
        for name in wanted:
            if name not in slots and not any(around in layers for around in _around(name)):
                raise FxlrdError(f"save: {name} is not in the model: did passes run on it after compress?")
    plain = {_join(name, k): t for name, m in model.named_modules() for k, t in _plain(m) if not t.is_meta}
    # What the architecture does not register: constants of a graph, and tensors that are mere attributes of modules.
    known = set(wanted)
    beside = [n for n in slots if n not in known and not any(around in layers for around in _around(n))]
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    details: dict[str, Any] = {"same": {}, "strides": {}, "frozen": [], "attributes": sorted({*plain, *beside})}
    for name, tensor in (plain | slots).items():
        if (canonical := first.setdefault(id(tensor), name)) != name:
            details["same"][name] = canonical
            continue
        if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise FxlrdError(f"save: {name} has no values: it is not initialised, or on the meta device")
        tensors[name] = tensor.detach()
        shape, strides = list(tensor.shape), list(tensor.stride())
        if strides != _strides(shape) and _dense(shape, strides):
            details["strides"][name] = strides
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            details["frozen"].append(name)
    return tensors, details


def _modes(model: nn.Module) -> dict[str, bool]:
    """Return the mode of the model and of each module that is in another than the one around it."""
    modes = {name: m.training for name, m in model.named_modules(remove_duplicate=False)}
    return {name: mode for name, mode in modes.items() if not name or modes[name.rpartition(".")[0]] != mode}
