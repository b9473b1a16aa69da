"""Random numbers of a run's own: other threads draw from the process's generators undisturbed, and so does the user."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_FACTORIES = {
    _aten.rand, _aten.randn, _aten.randint, _aten.randperm, _aten.rand_like, _aten.randn_like, _aten.randint_like,
}  # fmt: skip
_OVERLOADS = {
    "default": "generator",
    "low": "low_generator",
    "low_dtype": "low_generator_dtype",
    "Tensor": "Tensor_generator",
}
"""For an overload of a factory: the one that takes a generator as well."""


class OwnGenerators(TorchDispatchMode):
    """Makes this thread's random operations draw from generators of its own, one for each device.

    The process's generators are shared by all threads: to seed and restore them would give others repeated numbers.

    Attributes:
        drawn: whether anything was drawn.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.drawn = False
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        takes_generator = any(a.name == "generator" for a in func._schema.arguments)
        overload = func if takes_generator else _with_generator(func)
        if overload is not None:
            self.drawn = True
            return overload(*args, **{**kwargs, "generator": self._generator(args, kwargs)})
        if (
            func is _aten.native_dropout.default
            and kwargs.get("train", args[2] if len(args) > 2 else True) is not False
        ):
            self.drawn = True
            return self._dropout(*args[:2])
        return func(*args, **kwargs)  # attention and such, which draw only where they drop something

    def _generator(self, args: Any, kwargs: Any) -> torch.Generator:
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        device = torch.device(kwargs.get("device") or (tensor.device if tensor is not None else "cpu"))
        if device.type not in ("cpu", "mps", "xpu", "cuda"):  # meta: nothing is drawn
            device = torch.device("cpu")
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def _dropout(self, values: Tensor, p: float) -> tuple[Tensor, Tensor]:
        mask = torch.empty_like(values, dtype=torch.bool).bernoulli_(1 - p, generator=self._generator((values,), {}))
        return values * mask * (1 / (1 - p) if p < 1 else 0), mask


def _with_generator(func: Any) -> Any:
    """Return the overload of a factory that takes a generator, or None."""
    name = _OVERLOADS.get(func._overloadname) if func.overloadpacket in _FACTORIES else None
    return getattr(func.overloadpacket, name, None) if name is not None else None
