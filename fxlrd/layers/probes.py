"""What is needed to find out what a module computes: a twin with random parameters, inputs, a comparison."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

EXACT = 1e-10
"""Relative difference in float64 of two ways to compute one product."""
_ROUNDINGS = 64
"""Roundings of the module's own dtype by which two ways to compute one product may differ."""


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference in a dtype of two ways to compute one product."""
    return min(_ROUNDINGS * torch.finfo(dtype).eps, 0.03)


def is_more_than_its_forward(module: nn.Module) -> bool:
    """Whether a module's class does more than a forward: a call, or a state, of its own."""
    cls = type(module)
    return (
        isinstance(module, torch.jit.ScriptModule)
        or cls.__call__ is not nn.Module.__call__
        or cls.get_extra_state is not nn.Module.get_extra_state
    )


def takes_one_argument(module: nn.Module) -> bool:
    """Whether forward has exactly one argument without a default."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return sum(p.default is p.empty for p in named) == 1


_OWN = frozenset(vars(nn.Module()))


def behaviour_key(module: nn.Module) -> Any:
    """Return what sets the behaviour of a module of one class, but for the values of its parameters and buffers."""
    attributes = {name: value for name, value in vars(module).items() if name not in _OWN}
    plain = sorted((name, repr(value)) for name, value in attributes.items() if name != "training")
    tensors = {**module._parameters, **module._buffers}
    shapes = [(name, t.shape, t.dtype, t.device) for name, t in tensors.items() if t is not None]
    return (type(module).forward, *plain, *shapes)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Return a context after which the process's random state is as before; it is written only if it has changed."""
    before = torch.get_rng_state()
    try:
        yield
    finally:
        if not torch.equal(torch.get_rng_state(), before):
            torch.set_rng_state(before)


def random_twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the module with random parameters in ``dtype``: a weight of zeros would show nothing."""
    memo: dict[int, Any] = {}
    for seed, parameter in enumerate(p for p in module._parameters.values() if p is not None):
        values = random_values((parameter.numel(),), seed).to(parameter.device, dtype)
        memo[id(parameter)] = nn.Parameter(values.view(parameter.shape))
    twin = copy.deepcopy(module, memo)
    for name, buffer in twin._buffers.items():
        if buffer is not None and buffer.is_floating_point():
            twin._buffers[name] = buffer.to(dtype)
    return twin


def random_values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return random numbers around zero, which repeat in large tensors: drawing them all takes long."""
    numbers = torch.rand(10007, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    size = math.prod(shape)
    return numbers.repeat(size // len(numbers) + 1)[:size].view(shape)


def close(a: Any, b: Tensor, tolerance: float) -> bool:
    """Whether a value is a tensor like ``b`` and differs from it by no more than a relative ``tolerance``."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach().double(), b.detach().double()
    return bool((a - b).norm() <= tolerance * b.norm())
