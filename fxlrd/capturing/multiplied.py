"""Which parameters a model multiplies with that are no weights of conv or linear layers.

Such are the experts of a mixture in one tensor of three dimensions, the packed projection of an attention, the matrices
of a recurrent layer. What tells them from embeddings, norms and position tables is their use: a matrix product or a
convolution reads them, or a view, a cast or a selection of whole matrices of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxlrd.errors import Reason
from fxlrd.graph.captured import Unreached
from fxlrd.graph.guards import owners
from fxlrd.layers.folded import is_layer

_PRODUCTS = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "matmul", "linear", "mkldnn_linear", "_trilinear"),
    *("_grouped_mm", "_scaled_mm", "_scaled_grouped_mm", "convolution", "_convolution", "mkldnn_convolution"),
    *("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"),
}
_SELECTING = {"index", "index_select", "gather"}
"""Operations that take entries by their index: of a table of vectors, rows of an embedding, which are no matrices."""
_PREPARING = {
    *("clone", "_to_copy", "cat", "stack", "add", "sub", "mul", "div", "constant_pad_nd", "_unsafe_view"),
    *("_weight_norm_interface", "norm"),
    *_SELECTING,
}


class _Extent(NamedTuple):
    """The part of a storage, from byte to byte, that the values of some parameters are in."""

    start: int
    end: float
    names: frozenset[str]


class NotingMultiplied(TorchDispatchMode):
    """Notes in ``names`` the parameters of a model that are multiplied with something that is computed from inputs."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._extents: dict[StorageWeakRef, list[_Extent]] = {}
        for name, parameter in model.named_parameters():
            self._add(parameter, frozenset([name]), _start(parameter) + parameter.numel() * parameter.element_size())
        for buffer in model.buffers():
            self._add(buffer, frozenset(), _start(buffer) + buffer.numel() * buffer.element_size())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, and note which parameters it reads."""
        output = func(*args, **(kwargs or {}))
        operation = getattr(getattr(func, "overloadpacket", None), "__name__", "")
        if operation in _PRODUCTS:
            self._note_product(_floating(tree_leaves((args, kwargs))))
        elif operation in _PREPARING:
            self._note_prepared(operation, _floating(tree_leaves((args, kwargs))), output)
        return output

    def _note_product(self, operands: Iterable[Tensor]) -> None:
        read = [self._names_in(t) for t in operands]
        if None in read:  # else it makes a weight of weights
            self.names.update(*(names for names in read if names))

    def _note_prepared(self, operation: str, operands: Iterable[Tensor], output: Any) -> None:
        operands = list(operands)
        read = [names for t in operands if (names := self._names_in(t)) is not None]
        tables = operation in _SELECTING and any(t.dim() < 3 for t in operands)
        if len(read) == len(operands) and any(read) and not tables:
            for made in _floating(tree_leaves(output)):
                self._add(made, frozenset().union(*read))

    def _names_in(self, tensor: Tensor) -> frozenset[str] | None:
        """Return the parameters that the tensor's values are of; None for one that is computed from inputs."""
        storage = _storage(tensor)
        extents = self._extents.get(storage, ()) if storage is not None else ()
        return next((e.names for e in extents if e.start <= _start(tensor) < e.end), None)

    def _add(self, tensor: Tensor, names: frozenset[str], end: float = float("inf")) -> None:
        if (storage := _storage(tensor)) is not None:
            self._extents.setdefault(storage, []).append(_Extent(_start(tensor), end, names))


def _floating(values: Iterable[Any]) -> Iterator[Tensor]:
    return (v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def _start(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size() if tensor.layout is torch.strided else 0


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    """Return what identifies a tensor's storage for as long as it is held, also once the storage is freed."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (RuntimeError, NotImplementedError):  # a sparse tensor, or a subclass without a storage
        return None


def without_layer(
    model: nn.Module, multiplied: Iterable[str], closed: Mapping[str, Reason] | None = None
) -> dict[str, Unreached]:
    """Return the ``multiplied`` parameters of two dimensions or more that no conv or linear layer holds, by name.

    ``closed`` are the reasons of attentions that could not be opened, by name.
    """
    layers = [name for name, module in model.named_modules(remove_duplicate=False) if is_layer(module)]
    names_of = owners(model)
    entries = {}
    for name, parameter in model.named_parameters():
        names = names_of[id(parameter)]
        held = any(_inside(other, layer) for other in names for layer in layers)
        if name in multiplied and parameter.dim() >= 2 and not held:
            holder = type(model.get_submodule(name.rpartition(".")[0])).__name__
            around = (reason for module, reason in (closed or {}).items() if _inside(name, module))
            reason = next(around, None) or _reason(parameter, holder)
            entries[name] = Unreached(reason, holder, tuple(parameter.shape), parameter.numel())
    return entries


def _inside(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _reason(parameter: Tensor, holder: str) -> Reason:
    text = f"{holder} multiplies with it directly, it belongs to no conv or linear layer"
    if parameter.dim() > 2:
        return Reason("no-layer", text, "let a Linear hold each of its matrices")
    return Reason("no-layer", text)
