"""Which code reads the weights of a model while it runs, beside the modules that hold them, and what it reads."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxlrd.errors import Reason
from fxlrd.graph.guards import hooked
from fxlrd.layers.described import only_describes
from fxlrd.layers.folded import is_layer

_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass
class Reads:
    """What code beside a module's own forward read, by the module's name.

    Attributes:
        values: for each module of which values of a parameter or buffer were read, which code did.
        described: the layers of which a parameter was asked for, be it for its dtype, device or shape.
    """

    values: dict[str, Reason] = field(default_factory=dict)
    described: set[str] = field(default_factory=set)


@dataclass
class _Watched:
    name: str
    module: nn.Module
    depth: int = 0
    """Calls of its forward that are running."""


def noting_reads(model: nn.Module, reads: Reads, when: str = "") -> TorchFunctionMode:
    """Return a context in which what a copy of a model reads while it runs is noted in ``reads``.

    The modules of the copy get subclasses of their classes. ``when`` ends the reasons: ", in training mode".
    """
    by_tensor: dict[int, list[tuple[str, _Watched]]] = {}
    for name, module in model.named_modules():
        if has_weights(module) and not hooked(module):
            watched = _Watched(name, module)
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    by_tensor.setdefault(id(tensor), []).append((key, watched))
            _instrument(watched, reads, when)
    return _NotingValues(by_tensor, reads, when)


def has_weights(module: nn.Module) -> bool:
    """Whether a pass may put another module in the place of this one: a layer, a norm, an activation with weights."""
    own = module._parameters or module._buffers
    return is_layer(module) or (bool(own) and type(module).__module__.startswith("torch.nn.modules"))


def _instrument(watched: _Watched, reads: Reads, when: str) -> None:
    """Give the module a subclass of its class that notes when other code gets its parameters and buffers."""
    cls = type(watched.module)
    parts = {*watched.module._parameters, *watched.module._buffers}
    layer = is_layer(watched.module)

    class Instrumented(cls):  # type: ignore[misc, valid-type]
        @functools.wraps(cls.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            watched.depth += 1
            try:
                return super().forward(*args, **kwargs)
            finally:
                watched.depth -= 1

        def __getattribute__(self, attribute: str) -> Any:
            if attribute in parts and not watched.depth and not _is_method_of(sys._getframe(1), self):
                if layer:
                    reads.described.add(watched.name)
                else:  # what takes the place of a norm has no descriptions
                    reads.values.setdefault(watched.name, _reason(attribute, sys._getframe(1), when))
            return super().__getattribute__(attribute)

    for attribute in ("__name__", "__qualname__", "__module__"):
        setattr(Instrumented, attribute, getattr(cls, attribute))
    watched.module.__class__ = Instrumented


class _NotingValues(TorchFunctionMode):
    """Notes which torch functions get a weight while the forward of no module that holds it runs."""

    def __init__(self, by_tensor: Mapping[int, Sequence[tuple[str, _Watched]]], reads: Reads, when: str) -> None:
        super().__init__()
        self.by_tensor, self.reads, self.when = by_tensor, reads, when

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((*args, *kwargs.values())):
            holders = self.by_tensor.get(id(tensor), ())
            if holders and not any(watched.depth for _, watched in holders) and not only_describes(func, args, tensor):
                self._note(holders)
        return func(*args, **kwargs)

    def _note(self, holders: Sequence[tuple[str, _Watched]]) -> None:
        frame = _users_frame()
        for key, watched in holders:
            if not _is_method_of(frame, watched.module):
                self.reads.values.setdefault(watched.name, _reason(key, frame, self.when))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (item for item in value if isinstance(item, Tensor))


def _users_frame() -> FrameType:
    """Return the innermost frame outside of this file and of torch, but for torch's modules."""
    frame: FrameType = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__
        or (frame.f_code.co_filename.startswith(_TORCH) and f"{os.sep}modules{os.sep}" not in frame.f_code.co_filename)
    ):
        frame = frame.f_back
    return frame


def _is_method_of(frame: FrameType, module: nn.Module) -> bool:
    return frame.f_locals.get("self") is module


def _reason(key: str, frame: FrameType, when: str) -> Reason:
    reader = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
    return Reason("weight-read", f"its {key} is read by {reader} directly{when}")
