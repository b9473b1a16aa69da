"""A checkpoint back into the user's own architecture."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxlrd.capturing.whole import trace
from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.regions import set_modules, structural_copy
from fxlrd.graph.run import evaluating
from fxlrd.saving.architecture import config, described, remember, wrapped
from fxlrd.saving.parts import _around, _dense, _join, _made, _plain, _slots
from fxlrd.saving.schema import _REMEDY, read_plan
from fxlrd.saving.storage import _check_file, _weights


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Return the compressed model that was saved at ``path``, as a model of the user's own class.

    Args:
        path: a directory that `save` wrote.
        model: the architecture that was compressed, with any weights or, made under ``torch.device("meta")``, with
            none. It is not changed, and its weights are not copied. What was compressed as a graph that no class of
            the user's computes (arguments were frozen that its forward asks for, layers left out) comes back as such.

    Returns:
        The model in the modes (train or eval) that it was saved in, each tensor on the device of the architecture's,
        or on the CPU where that is meta.

    Raises:
        FxlrdError: for a file that is missing, damaged or of another version, and for another architecture.
    """
    if not isinstance(model, nn.Module):
        raise FxlrdError(f"load: a {type(model).__name__} is not a torch.nn.Module: give the architecture")
    try:
        folder = Path(path)
    except TypeError as error:
        raise FxlrdError(f"load: {path!r} is no path: {one_line(error)}") from error
    for attempt in range(3):
        plan = read_plan(folder)
        try:
            return _loaded(folder, plan, model)
        except FxlrdError:
            if attempt == 2 or read_plan(folder) == plan:  # else it was saved anew meanwhile
                raise
        except Exception as error:
            raise FxlrdError(f"load: {folder}: {one_line(error)}: the checkpoint is damaged") from error
    raise AssertionError("three attempts end in a return or an error")


def _loaded(folder: Path, plan: dict[str, Any], model: nn.Module) -> nn.Module:
    architecture = plan["architecture"]
    model = wrapped(model)
    _check_architecture(folder, architecture["modules"], model)
    target = structural_copy(model)
    if architecture["arguments"] is not None:
        takes = inspect.signature(model.forward).parameters
        if (alien := next((name for name in architecture["arguments"] if name not in takes), None)) is not None:
            raise FxlrdError(f"load: {folder}: forward of the model takes no {alien!r}: give the architecture")
        with evaluating(target):
            target, _ = trace(target, architecture["arguments"])
    devices = {name: t.device for name, t in _slots(target)}
    modules = dict(target.named_modules(remove_duplicate=False))
    for name in plan["layers"]:
        if not name or name not in modules:
            raise FxlrdError(f"load: {folder}: the model has no module {name[:80]!r}: {_REMEDY}")
    before = set_modules(target, {name: _made(name, spec) for name, spec in plan["layers"].items()})
    devices |= {name: t.device for name, old in before.items() for _, t in _slots(old)}
    _fill(folder, plan, target, devices)
    modes = plan["training"]
    for name, module in target.named_modules(remove_duplicate=False):
        module.training = next(modes[around] for around in [name, *reversed(_around(name)), ""] if around in modes)
    remember(target, architecture | {"refused": None})
    return target


def _check_architecture(folder: Path, wanted: dict[str, Any], model: nn.Module) -> None:
    """Raise FxlrdError where a module of the model is not as it was in the one that was compressed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (kind, options) in wanted.items():
        if name not in modules:
            raise FxlrdError(f"load: {folder}: the model has no module {name[:80]!r}: {_REMEDY}")
        here, now = config(modules[name])
        where = name or "the model"
        if name and here != kind:
            raise FxlrdError(f"load: {folder}: {where} is a {here} in the model and was a {kind[:80]!r}: {_REMEDY}")
        for option in sorted(options.keys() & now.keys()):
            a, b = now[option], options[option]
            if option == "shapes":
                shape = next((t for t in {**a, **b} if a.get(t, 0) != b.get(t, 0)), None)
                if shape is None:
                    continue
                option, a, b = f"the shape of {shape[:80]!r}", a.get(shape), b.get(shape)
            if a != b:
                raise FxlrdError(f"load: {folder}: {where}: {option} is {a!r} and was {str(b)[:80]!r}: {_REMEDY}")
    if (more := next((name for name in described(model) if name not in wanted), None)) is not None:
        kind = type(modules[more]).__name__
        raise FxlrdError(f"load: {folder}: {more or 'the model'} is a {kind} and was not there: {_REMEDY}")


def _fill(folder: Path, plan: dict[str, Any], model: nn.Module, devices: dict[str, torch.device]) -> None:
    """Give the model the tensors of the file, each of which must have a place, and each place a tensor."""
    file = folder / _weights(plan["weights"]["sha256"])
    details = plan["tensors"]
    frozen, attributes = set(details["frozen"]), set(details["attributes"])
    slots = dict(_slots(model))
    plain = {_join(name, k): t for name, m in model.named_modules() for k, t in _plain(m)}
    others: dict[str, list[str]] = {}
    for alias, name in details["same"].items():
        others.setdefault(name, []).append(alias)
    _check_file(file, plan["weights"])
    try:
        opened = safe_open(file, framework="pt", device="cpu")
    except Exception as error:
        raise FxlrdError(f"load: {file} is no safetensors file: {one_line(error)}") from error
    given: dict[str, Tensor] = {}
    with opened as stored:
        for name in stored.keys():  # noqa: SIM118
            slot = next((slots[n] for n in [name, *others.get(name, ())] if n in slots), plain.get(name))
            if slot is None:
                if name in attributes:  # one that the architecture makes when it runs
                    continue
                raise FxlrdError(f"load: {file}: the model has no place for {name[:80]!r}")
            shape = stored.get_slice(name).get_shape()
            if torch.nn.parameter.is_lazy(slot) or shape != list(slot.shape):
                raise FxlrdError(f"load: {file}: {name} has shape {shape}, the model takes {list(slot.shape)}")
            where = next((devices[n] for n in [name, *reversed(_around(name))] if n in devices), slot.device)
            value = _own(name, stored.get_tensor(name), details["strides"].get(name), where)
            if isinstance(slot, nn.Parameter):
                value = nn.Parameter(value, name not in frozen)
            for each in [name, *others.get(name, ())]:
                if each in slots and slots[each].shape != value.shape:
                    raise FxlrdError(f"load: {file}: {each} and {name} are one tensor, but not in the model: {_REMEDY}")
                given[each] = value
    tied = {id(slots[name]): value for name, value in given.items() if name in slots}
    for name, slot in slots.items():
        if name not in given and id(slot) not in tied:
            raise FxlrdError(f"load: {file}: there is no tensor {name[:80]!r}")
    for name, slot in slots.items():
        _assign(model, name, given.get(name, tied.get(id(slot), slot)))
    for name in given.keys() - slots.keys():
        if name in plain:
            _assign(model, name, given[name])
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules") and any(
                isinstance(t, Tensor) and t.is_meta for t in tree_leaves(value)
            ):
                raise FxlrdError(
                    f"load: {_join(name, key)} holds a tensor on the meta device that is no parameter and no buffer: "
                    "build the architecture on a real device"
                )


def _own(name: str, tensor: Tensor, strides: list[int] | None, device: torch.device) -> Tensor:
    """Return the tensor in memory of its own, not that of the file, with the strides that it had."""
    device = torch.device("cpu") if device.type == "meta" else device
    shape = list(tensor.shape)
    if strides is None:
        return tensor.to(device, copy=True)
    if len(strides) != len(shape) or not _dense(shape, strides):
        raise FxlrdError(f"load: strides {strides} of {name} fit no tensor of shape {shape}: the plan is damaged")
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=device).copy_(tensor)


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    holder, _, key = name.rpartition(".")
    module = model.get_submodule(holder)
    if key in module._buffers:
        module._buffers[key] = value
    else:
        setattr(module, key, value)  # recurrent modules hold their parameters elsewhere as well, and see to that
