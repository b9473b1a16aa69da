"""save: a compressed model as a directory that holds no code.

A plan says what takes the place of which module of the original, and a safetensors file holds every parameter and
buffer under its name in the model: see `fxlrd.saving.schema` and `fxlrd.saving.storage`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxlrd.errors import FxlrdError, one_line
from fxlrd.layers.attention import PROJECTIONS
from fxlrd.layers.quantized import quantized_weight
from fxlrd.saving.architecture import recall
from fxlrd.saving.descriptions import is_as_described
from fxlrd.saving.schema import ATTENTION, Architecture, Factors, LayerSpec, Narrowed, Plan, TensorTable, Weights
from fxlrd.saving.specs import spec_of
from fxlrd.saving.storage import write
from fxlrd.saving.tensors import attributes, contiguous_strides, is_dense, joined, parents, registered


class HasModel(Protocol):
    """What `compress` returned: its ``model`` is what is saved."""

    @property
    def model(self) -> nn.Module:
        """The compressed model."""
        ...


def save(result: HasModel | nn.Module, path: str | os.PathLike[str], *, source: str | None = None) -> None:
    """Write a compressed model to the directory ``path``, replacing the checkpoint in it, if there is one.

    >>> import fxlrd, tempfile, torch
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> result = fxlrd.compress(model, torch.randn(2, 64), measure=False)
    >>> fxlrd.save(result, folder.name)
    >>> sorted(fxlrd.load(folder.name, model).state_dict())
    ['0.first.weight', '0.last.bias', '0.last.weight']
    >>> folder.cleanup()

    Args:
        result: what `compress` returned, or its model, or one from `load`; also after fine-tuning.
        path: the directory; it is made, with its parents. Other files in it are not touched.
        source: how the command line names the architecture, such as torchvision:resnet50, if it should open the
            checkpoint.

    Raises:
        FxlrdError: for a model that `compress` or `load` did not make, for one with state that is no tensor, and for
            a failed write. An existing checkpoint then stays as it was.
    """
    model = result if isinstance(result, nn.Module) else getattr(result, "model", None)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise FxlrdError(f"save: a {type(result).__name__} is no result of compress")
    tensors, plan_for = contents(model, source)
    try:
        write(Path(path), tensors, plan_for)
    except FxlrdError:
        raise
    except Exception as error:
        raise FxlrdError(f"save: {path}: nothing was changed there: {one_line(error)}") from error


def contents(model: nn.Module, source: str | None = None) -> tuple[dict[str, Tensor], Callable[[Weights], Plan]]:
    """Return what a checkpoint of the model holds: its tensors by name, and its plan for a file that they are in."""
    origin = recall(model)
    if origin is None:
        raise FxlrdError("save: it is not known what this model was made from: give the result of fxlrd.compress")
    if origin.refused is not None:
        raise FxlrdError(f"save: {origin.refused}")
    if (weight := quantized_weight(model)) is not None:
        raise FxlrdError(f"save: {weight} is quantized: save the result of compress, and quantize what load returns")
    architecture = origin.architecture if source is None else replace(origin.architecture, source=source)
    layers = replacements(model, architecture)
    tensors, table = _tensors(model, architecture, layers)
    made_with = {"torch": torch.__version__.split("+")[0]}
    return tensors, partial(Plan, made_with, architecture, layers, table, _modes(model))


def replacements(model: nn.Module, architecture: Architecture) -> dict[str, LayerSpec | Factors | Narrowed]:
    """Return what has taken the place of modules of the architecture, by their names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    specs: dict[str, LayerSpec | Factors | Narrowed]
    specs = {name: spec_of(name, nn.Identity()) for name in architecture.gone}
    containers = {parent for name in architecture.modules for parent in parents(name)}
    opened = opened_attentions(architecture, modules)
    projections = [joined(name, role) for name in opened for role in PROJECTIONS]
    specs |= {name: spec_of(name, modules[name]) for name in projections}
    for name, was in architecture.modules.items():
        module = modules.get(name)
        if not name or module is None or name in specs or name in opened or is_as_described(module, was):
            continue
        # torch.fx makes bare modules: for containers, and for a module of which it reads only a tensor.
        if type(module) is nn.Module and (name in containers or not module._modules):
            continue
        specs[name] = spec_of(name, module, was)
    return specs


def _tensors(
    model: nn.Module, architecture: Architecture, layers: Collection[str]
) -> tuple[dict[str, Tensor], TensorTable]:
    """Return the model's tensors by name, and what safetensors cannot hold of them."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise FxlrdError(f"save: {name} ({type(module).__name__}) has a state that is no tensor (get_extra_state)")
    own = registered(model)
    names = (joined(name, key) for name, module in architecture.modules.items() for key in module.shapes)
    listed = dict.fromkeys(names)
    opened = opened_attentions(architecture, dict(model.named_modules(remove_duplicate=False)))
    layers = {*layers, *opened}
    if architecture.arguments is None:
        for name in listed:
            if name not in own and not _in_layer(name, layers):
                raise FxlrdError(f"save: {name} is not in the model: did passes, or a fuse, run on it after compress?")
    unregistered = {name: tensor for name, tensor in attributes(model) if not tensor.is_meta}
    # What the architecture does not register: constants of a graph, and tensors that are attributes of modules.
    optional = {name for name in own if name not in listed and not _in_layer(name, layers)}
    return _table({**unregistered, **own}, sorted({*unregistered, *optional}))


def opened_attentions(architecture: Architecture, modules: Collection[str]) -> list[str]:
    """Return the attentions of an architecture whose projections are layers among the ``modules`` of a model."""
    return [
        name
        for name, was in architecture.modules.items()
        if was.kind == ATTENTION and {joined(name, role) for role in PROJECTIONS} <= {*modules}
    ]


def _in_layer(name: str, layers: Collection[str]) -> bool:
    return any(parent in layers for parent in parents(name))


def _table(named: Mapping[str, Tensor], optional: list[str]) -> tuple[dict[str, Tensor], TensorTable]:
    """Return each tensor once, under its first name, and what safetensors cannot hold of them."""
    first_names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    strides: dict[str, tuple[int, ...]] = {}
    for name, tensor in named.items():
        if (first := first_names.setdefault(id(tensor), name)) != name:
            same[name] = first
            continue
        if is_lazy(tensor) or tensor.is_meta:
            raise FxlrdError(f"save: {name} has no values: it is not initialised, or on the meta device")
        tensors[name] = tensor.detach()
        if tensor.stride() != contiguous_strides(tensor.shape) and is_dense(tensor.shape, tensor.stride()):
            strides[name] = tensor.stride()
    frozen = tuple(n for n in tensors if isinstance(named[n], nn.Parameter) and not named[n].requires_grad)
    return tensors, TensorTable(same, strides, frozen, tuple(optional))


def _modes(model: nn.Module) -> dict[str, bool]:
    """Return the mode of the model, and of each module that is in another mode than the one that holds it."""
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    return {name: mode for name, mode in modes.items() if not name or modes[name.rpartition(".")[0]] != mode}
