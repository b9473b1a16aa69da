"""Which tensor of a checkpoint goes where in a model, and putting it there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxlrd.errors import FxlrdError
from fxlrd.saving.schema import TensorTable
from fxlrd.saving.tensors import is_dense

Shape = list[int]


@dataclass(frozen=True)
class Placement:
    """Where a stored tensor goes: to ``names`` in the model, with these ``strides`` (None: contiguous).

    ``like`` is the tensor that it replaces.
    """

    names: tuple[str, ...]
    like: Tensor
    strides: tuple[int, ...] | None


def place(
    stored: Mapping[str, Shape],
    registered: Mapping[str, Tensor],
    unregistered: Mapping[str, Tensor],
    table: TensorTable,
) -> dict[str, Placement]:
    """Return where each tensor of a checkpoint goes, by the name that it is stored under.

    Args:
        stored: shapes by name.
        registered: the model's parameters and buffers, each of which needs a tensor.
        unregistered: tensors that are attributes of its modules, which may get one.
        table: the other names of the tensors, their strides, and which the model may have no place for.

    Raises:
        FxlrdError: for a tensor without a place, a place without a tensor, and for another shape.
    """
    aliases: dict[str, list[str]] = {}
    for alias, name in table.same.items():
        aliases.setdefault(name, []).append(alias)
    likes: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for name, shape in stored.items():
        candidates = [name, *aliases.get(name, ())]
        like = next((registered[n] for n in candidates if n in registered), unregistered.get(name))
        if like is None and name in table.attributes:
            continue  # the architecture makes it when it runs
        if like is None:
            raise FxlrdError(f"the model has no place for {name[:80]!r}")
        if is_lazy(like) or shape != list(like.shape):
            raise FxlrdError(f"{name} has shape {shape}, the model takes {list(like.shape)}")
        likes[name] = like
        names[name] = [n for n in candidates if n in registered or n in unregistered]
        if other := next((n for n in names[name] if n in registered and registered[n].shape != like.shape), None):
            raise FxlrdError(f"{other} and {name} are one tensor, but not in the model")
    _add_tied(names, registered)
    return {name: Placement(tuple(names[name]), like, _strides(name, stored, table)) for name, like in likes.items()}


def _add_tied(names: Mapping[str, list[str]], registered: Mapping[str, Tensor]) -> None:
    """Add places that are tied in the model to those that get a tensor."""
    filled = {place: name for name, places in names.items() for place in places}
    by_identity = {id(registered[place]): name for place, name in filled.items() if place in registered}
    for place, tensor in registered.items():
        if place in filled:
            continue
        if id(tensor) not in by_identity:
            raise FxlrdError(f"there is no tensor {place[:80]!r}")
        names[by_identity[id(tensor)]].append(place)


def _strides(name: str, stored: Mapping[str, Shape], table: TensorTable) -> tuple[int, ...] | None:
    shape, strides = stored[name], table.strides.get(name)
    if strides is not None and (len(strides) != len(shape) or not is_dense(shape, strides)):
        raise FxlrdError(f"strides {list(strides)} of {name} fit no tensor of shape {shape}: the plan is damaged")
    return strides


def own_copy(tensor: Tensor, strides: Sequence[int] | None, device: torch.device) -> Tensor:
    """Return the tensor in memory of its own, not that of the file, on ``device``, or the CPU where that is meta."""
    device = torch.device("cpu") if device.type == "meta" else device
    if strides is None:
        return tensor.to(device, copy=True)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device).copy_(tensor)


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Set the parameter, buffer or attribute of the model that has this name."""
    holder, _, key = name.rpartition(".")
    module = model.get_submodule(holder)
    if key in module._buffers:
        module._buffers[key] = value
    else:
        setattr(module, key, value)  # recurrent modules hold their parameters elsewhere as well, and update that
