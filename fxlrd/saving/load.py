"""load: a checkpoint back into the user's own architecture.

A copy of the architecture without weights gets empty layers where the plan says so, and then the tensors. Nothing is
decomposed, timed or unpickled; a plan names only classes in `fxlrd.layers.kinds.OPTIONS`. Everything is checked,
against the plan and against the architecture, before a model is returned.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxlrd.capturing.inlined import call_inlined_layers
from fxlrd.capturing.tracing import trace
from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.attentions import open_for
from fxlrd.graph.copies import structural_copy
from fxlrd.graph.padding import insert_padding
from fxlrd.graph.run import evaluating
from fxlrd.graph.surgery import calls, source
from fxlrd.saving.architecture import remember, wrapped
from fxlrd.saving.descriptions import mismatch
from fxlrd.saving.from_pretrained import load_pretrained
from fxlrd.saving.geometry import check_padding
from fxlrd.saving.padding import padding_of
from fxlrd.saving.placement import Placement, Slots, place, put
from fxlrd.saving.pretrained import read_pretrained, save_all_of
from fxlrd.saving.replacing import REMEDY, put_layers
from fxlrd.saving.runtime import runtime_tensors
from fxlrd.saving.schema import Origin, Plan, TensorTable
from fxlrd.saving.sentences import holds_sentences, load_sentences, makes_sentences
from fxlrd.saving.storage import PLAN, check_weights, read_plan
from fxlrd.saving.tensors import attributes, joined, parents, registered

_ATTEMPTS = 3
"""How often a checkpoint is read again that another process replaces meanwhile."""


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Return the compressed model that was saved at ``path``, as a model of the user's own class.

    >>> import fxlrd, tempfile, torch
    >>> folder, x = tempfile.TemporaryDirectory(), torch.randn(2, 64)
    >>> result = fxlrd.compress(torch.nn.Sequential(torch.nn.Linear(64, 64)), x, measure=False)
    >>> fxlrd.save(result, folder.name)
    >>> model = fxlrd.load(folder.name, torch.nn.Sequential(torch.nn.Linear(64, 64)))  # the architecture, any weights
    >>> torch.equal(model(x), result.model(x))
    True
    >>> folder.cleanup()

    Args:
        path: a directory that `save` wrote, or ``save_pretrained`` of a compressed model of transformers or of
            sentence-transformers.
        model: the architecture that was compressed, with any weights or, made under ``torch.device("meta")``, with
            none. It is not changed, and its weights are not copied. A model that was compressed as a graph which the
            user's class does not compute (it freezes arguments of forward, or drops layers) comes back as a graph.
            What ``save_pretrained`` wrote needs none: transformers, or sentence-transformers, makes its class from
            the config in the directory.

    Returns:
        The model in the modes (train or eval) that it was saved in, each tensor on the device of the architecture's,
        or on the CPU where that is meta.

    Raises:
        FxlrdError: for a file that is missing, damaged or of another version, and for another architecture.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise FxlrdError(f"load: a {type(model).__name__} is not a torch.nn.Module: give the architecture")
    try:
        folder = Path(path)
    except TypeError as error:
        raise FxlrdError(f"load: {path!r} is no path: {one_line(error)}") from error
    if not (folder / PLAN).exists() and (makes_sentences(type(model)) if model else holds_sentences(folder)):
        return load_sentences(folder, None if model is None else type(model))
    if (model is None or not (folder / PLAN).exists()) and (pretrained := read_pretrained(folder)) is not None:
        return load_pretrained(folder, pretrained, None if model is None else type(model))
    if model is None:
        raise FxlrdError(f"load: {folder} holds no model that save_pretrained wrote: {REMEDY}, fxlrd.load(path, model)")
    for attempt in range(1, _ATTEMPTS + 1):
        plan = read_plan(folder)
        try:
            return _loaded(folder, plan, model)
        except FxlrdError:
            if attempt == _ATTEMPTS or read_plan(folder) == plan:  # otherwise another process has replaced it
                raise
        except Exception as error:
            raise FxlrdError(f"load: {folder}: {one_line(error)}: the checkpoint is damaged") from error
    raise AssertionError("the last attempt returns or raises")


def _loaded(folder: Path, plan: Plan, model: nn.Module) -> nn.Module:
    model = wrapped(model)
    target = _target(folder, plan, model)
    devices = {name: tensor.device for name, tensor in registered(target).items()}
    devices |= put_layers(folder, plan.layers, plan.architecture.described, target)
    _fill(check_weights(folder, plan.weights), plan.tensors, target, devices)
    _check_no_meta(target)
    _set_modes(target, plan.training)
    remember(target, Origin(**vars(plan.architecture)))
    save_all_of(target)
    return target


def _target(folder: Path, plan: Plan, model: nn.Module) -> nn.Module:
    """Return the architecture to put layers into: a copy of the model, or its graph with arguments frozen."""
    architecture = plan.architecture
    if (difference := mismatch(architecture.modules, model)) is not None:
        raise FxlrdError(f"load: {folder}: {difference}: {REMEDY}")
    check_padding(folder, architecture, plan.layers, model)
    target = structural_copy(model)
    if architecture.arguments is None:
        return target
    parameters = inspect.signature(model.forward).parameters
    if (other := next((name for name in architecture.arguments if name not in parameters), None)) is not None:
        raise FxlrdError(f"load: {folder}: forward of the model takes no {other!r}: give the architecture")
    open_for(target, plan.layers)
    with evaluating(target):
        graph, _ = trace(target, dict(architecture.arguments))
    call_inlined_layers(graph, target)
    for name, pads in architecture.padded.items():
        if not all(source(node) is not None for node in calls(graph, name)):
            raise FxlrdError(f"load: {folder}: the model calls {name[:80]!r} with more than its input: {REMEDY}")
        insert_padding(graph, name, padding_of(pads))
    graph.recompile()
    return graph


def _fill(file: Path, table: TensorTable, model: nn.Module, devices: Mapping[str, torch.device]) -> None:
    """Give the model the tensors of the file, each of which must have a place, and each place a tensor."""
    try:
        opened = safe_open(file, framework="pt", device="cpu")
    except Exception as error:
        raise FxlrdError(f"load: {file} is no safetensors file: {one_line(error)}") from error
    with opened as stored:
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
        try:
            slots = Slots(registered(model), dict(attributes(model)), runtime_tensors(model), devices)
            placements = place(shapes, slots, table)
        except FxlrdError as error:
            raise FxlrdError(f"load: {file}: {error}") from error
        filled = {name for placement in placements.values() for name in placement.names}
        for name in slots.registered.keys() - filled:  # made by the architecture's forward, and shared with it
            put(model, slots.registered[name], Placement((name,), slots.registered[name].device, None, None))
        for name, placement in placements.items():
            put(model, stored.get_tensor(name), placement)


def _set_modes(model: nn.Module, modes: Mapping[str, bool]) -> None:
    """Give each module its mode or, where the plan says none, that of the nearest module that holds it."""
    for name, module in model.named_modules(remove_duplicate=False):
        holders = [name, *reversed(parents(name)), ""]
        module.training = next(modes[holder] for holder in holders if holder in modes)


def _check_no_meta(model: nn.Module) -> None:
    """Raise FxlrdError where a module holds a tensor without values that is no parameter and no buffer."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules") and any(
                isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(value)
            ):
                raise FxlrdError(
                    f"load: {joined(name, key)} holds a tensor on the meta device that is no parameter and no buffer: "
                    "build the architecture on a real device"
                )
