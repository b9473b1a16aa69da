"""Weights of a model that is changed in place go as soon as their layer is decomposed.

They move to a temporary file, from which they come back if anything fails afterwards. In their place stand parameters
of the same shape without data, on the meta device, wherever a module has them: in the user's model, in copies that
share its parameters, in graphs. A weight that somebody else holds stays in memory and is not touched.
"""

from __future__ import annotations

import gc
import io
import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor, fx, nn

from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.facts import Fact


@dataclass(frozen=True)
class _Stored:
    """A parameter that has moved to the file: what modules have it by which name, and what it was."""

    places: tuple[tuple[nn.Module, str], ...]
    parameter: weakref.ref[nn.Parameter]
    stand_in: nn.Parameter
    device: torch.device
    start: int


class Originals:
    """The parameters of a model that are let go of, and the file that has them."""

    def __init__(self, file: IO[bytes], model: nn.Module, others: Iterable[nn.Module], stay: Collection[int]) -> None:
        self._file = file
        self._stored: list[_Stored] = []
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        own = {id(p) for p in model.parameters()}.difference(stay)
        for module in {id(m): m for root in (model, *others) for m in root.modules()}.values():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in own:
                    self._places.setdefault(id(parameter), []).append((module, name))

    def let_go(self, layer: nn.Module) -> None:
        """Move the parameters of a layer to the file. Those that share memory stay, and all if the disk is full."""
        for parameter in list(layer._parameters.values()):
            if parameter is not None and id(parameter) in self._places and _is_alone(parameter):
                try:
                    self._store(parameter)
                except OSError:
                    return

    def _store(self, parameter: nn.Parameter) -> None:
        start = self._file.seek(0, io.SEEK_END)
        _write(self._file, parameter)
        places = tuple(self._places.pop(id(parameter)))
        stand_in = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for module, name in places:
            module._parameters[name] = stand_in
        self._stored.append(_Stored(places, weakref.ref(parameter), stand_in, parameter.device, start))

    def bring_back(self) -> None:
        """Put all parameters back: the same ones where somebody holds them, else ones with the same values."""
        for each in self._stored:
            parameter = each.parameter()
            if parameter is None:
                data = torch.empty_like(each.stand_in, device=each.device, requires_grad=False)
                _read(self._file, each.start, data)
                parameter = nn.Parameter(data, each.stand_in.requires_grad)
            for module, name in each.places:
                module._parameters[name] = parameter
        self._stored.clear()


originals: Fact[Originals] = Fact("originals", Originals)
"""What lets go of weights as layers are decomposed: on the graph module."""


@contextmanager
def letting_go(gm: fx.GraphModule, model: nn.Module) -> Iterator[None]:
    """Return a context in which passes over ``gm`` let go of the weights of ``model`` that they need no longer.

    Those stay that the user's forward asks for their dtype, device or shape. If anything is raised inside, all weights
    are back afterwards.
    """
    gc.collect()  # copies of the model that capture has made hold on to weights in cycles
    capture = captured_or_bare(gm)
    stay = {id(p) for name in capture.described for p in gm.get_submodule(name).parameters()}
    with tempfile.TemporaryFile() as file:
        held = Originals(file, model, [gm] if capture.model is None else [gm, capture.model], stay)
        originals.record(gm, held)
        try:
            yield
        except BaseException:
            held.bring_back()
            raise
        finally:
            originals.drop(gm)


def _is_alone(parameter: nn.Parameter) -> bool:
    """Whether the parameter is all that its memory holds, and nothing hangs on it that would be lost."""
    if type(parameter) is not nn.Parameter or parameter.grad is not None or vars(parameter):
        return False
    return parameter.untyped_storage().nbytes() == parameter.nbytes


_CHUNK = 2**24
"""Entries that are copied at once."""


def _write(file: IO[bytes], tensor: Tensor) -> None:
    for part in _in_memory_order(tensor).split(_CHUNK):
        file.write(part.cpu().view(torch.uint8).numpy().data)


def _read(file: IO[bytes], start: int, tensor: Tensor) -> None:
    file.seek(start)
    for part in _in_memory_order(tensor).split(_CHUNK):
        part.copy_(torch.frombuffer(bytearray(file.read(part.nbytes)), dtype=part.dtype))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return all entries as one dimension, in the order of their addresses."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), 0)
