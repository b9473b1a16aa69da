"""Where the tensors of a checkpoint go in a model (`place`, which changes nothing), and putting them there (`put`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxlrd.errors import FxlrdError
from fxlrd.saving.schema import TensorTable
from fxlrd.saving.tensors import is_dense, parents


@dataclass(frozen=True)
class Slots:
    """The places that a model has for tensors, by name."""

    registered: Mapping[str, Tensor]
    """Parameters and buffers: each must get a tensor."""
    attributes: Mapping[str, Tensor]
    """Tensors that are plain attributes of modules: each may get one."""
    runtime: Mapping[str, bool]
    """Those of both that forwards assign, of any shape: see `fxlrd.saving.runtime.runtime_tensors`."""
    devices: Mapping[str, torch.device]
    """Where tensors are to be: those of a module, or of one name. Elsewhere, on the device of what they replace."""

    def find(self, names: Sequence[str]) -> Tensor | None:
        """Return what a tensor with these names, the one it is stored under first, replaces."""
        return next((self.registered[n] for n in names if n in self.registered), self.attributes.get(names[0]))

    def keeps(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the model keeps what it has, since a stored tensor means nothing without state that is not stored."""
        own = self.registered.get(name)
        if not self.runtime.get(name) or (own is not None and own.is_meta):
            return False
        return own is None or list(own.shape) != list(shape)

    def device(self, name: str, default: torch.device) -> torch.device:
        """Return the device for a tensor: the CPU where that of the architecture is meta."""
        holders = [name, *reversed(parents(name))]
        device = next((self.devices[holder] for holder in holders if holder in self.devices), default)
        return torch.device("cpu") if device.type == "meta" else device


@dataclass(frozen=True)
class Placement:
    """Where one stored tensor goes, and as what."""

    names: tuple[str, ...]
    device: torch.device
    strides: tuple[int, ...] | None
    """None: contiguous."""
    requires_grad: bool | None
    """None for a tensor that is no Parameter."""


def place(stored: Mapping[str, Sequence[int]], slots: Slots, table: TensorTable) -> dict[str, Placement]:
    """Return where tensors of these shapes go, by the names that they are stored under.

    Raises FxlrdError for a tensor without a place, a place without a tensor, and a shape that does not fit. A tensor
    that the architecture makes by itself when it runs may have no place and no tensor, and is of any shape.
    """
    aliases: dict[str, list[str]] = {}
    for alias, name in table.same.items():
        aliases.setdefault(name, []).append(alias)
    frozen, optional = set(table.frozen), set(table.attributes)
    targets: dict[str, list[str]] = {}
    replaced: dict[str, Tensor] = {}
    for name, shape in stored.items():
        names = [name, *aliases.get(name, ())]
        old = slots.find(names)
        if (old is None and name in optional) or slots.keeps(name, shape):
            continue
        if old is None:
            raise FxlrdError(f"the model has no place for {name[:80]!r}")
        if name not in slots.runtime:
            _check_shapes(name, shape, old, {n: slots.registered[n] for n in names if n in slots.registered})
        _check_strides(name, shape, table.strides.get(name))
        targets[name] = [n for n in names if n in slots.registered or n in slots.attributes]
        replaced[name] = old
    _add_tied(targets, {n: t for n, t in slots.registered.items() if n not in slots.runtime or t.is_meta})
    return {
        name: Placement(
            names=tuple(targets[name]),
            device=slots.device(name, old.device),
            strides=table.strides.get(name),
            requires_grad=name not in frozen if isinstance(old, nn.Parameter) else None,
        )
        for name, old in replaced.items()
    }


def _check_shapes(name: str, shape: Sequence[int], old: Tensor, others: Mapping[str, Tensor]) -> None:
    if is_lazy(old) or list(shape) != list(old.shape):
        raise FxlrdError(f"{name} has shape {list(shape)}, the model takes {list(old.shape)}")
    if (other := next((n for n, t in others.items() if t.shape != old.shape), None)) is not None:
        raise FxlrdError(
            f"{other} and {name} are one tensor, but not in the model: give the architecture that was compressed"
        )


def _check_strides(name: str, shape: Sequence[int], strides: tuple[int, ...] | None) -> None:
    if strides is not None and (len(strides) != len(shape) or not is_dense(shape, strides)):
        raise FxlrdError(f"strides {list(strides)} of {name} fit no tensor of shape {list(shape)}: the plan is damaged")


def _add_tied(targets: Mapping[str, list[str]], registered: Mapping[str, Tensor]) -> None:
    """Add to a tensor's targets the other names that they have in the model: it ties what the saved model did not."""
    filled = {target: name for name, names in targets.items() for target in names}
    by_identity = {id(registered[target]): name for target, name in filled.items() if target in registered}
    for target, tensor in registered.items():
        if target in filled:
            continue
        if id(tensor) not in by_identity:
            raise FxlrdError(f"there is no tensor {target[:80]!r}")
        targets[by_identity[id(tensor)]].append(target)


def put(model: nn.Module, tensor: Tensor, placement: Placement) -> None:
    """Put a tensor where it goes, in memory of its own: not that of the file."""
    device, strides = placement.device, placement.strides
    if strides is None:
        value = tensor.to(device, copy=True)
    else:
        value = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device).copy_(tensor)
    if placement.requires_grad is not None:
        value = nn.Parameter(value, placement.requires_grad)
    for name in placement.names:
        _assign(model, name, value)


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    holder, _, key = name.rpartition(".")
    module = model.get_submodule(holder)
    if key in module._buffers:
        module._buffers[key] = value
    else:
        setattr(module, key, value)  # recurrent modules hold their parameters elsewhere as well, and update that
