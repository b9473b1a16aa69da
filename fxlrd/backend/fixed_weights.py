"""The fingerprint of weights that are always the same tensors, as where Inductor freezes them.

A frozen ResNet-152 has 777, and reading a counter or an address through Python takes 0.06 µs. For tensors that do not
change places, torch itself compares the counters: tensors saved for a backward pass that never comes raise when they
are read after a write that torch counts. They are detached, which shares the counter, since
``torch.utils.swap_tensors`` refuses tensors that something else refers to. Addresses are read one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxlrd.backend.factor_sets import Fingerprint, address, fingerprint

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


class FixedWeights:
    """Weights that are the same tensors in every call. Their fingerprint is one object until it changes."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = tuple(weights)
        # The detached form of a subclass may have a counter of its own.
        self.plain = all(type(w) in _PLAIN for w in self.weights)
        self.latest = self._read()

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the weights as they are now."""
        saved, mark = self.latest
        if saved is not None and _unwritten(saved) and tuple(map(address, self.weights)) == mark[2]:
            return mark
        self.latest = self._read()
        return self.latest[1]

    def _read(self) -> tuple[Tensor | None, Fingerprint]:
        # Saved before the counters are read: a write between the two is then seen by the next call.
        saved = _saved(self.weights) if self.plain else None
        return saved, fingerprint(self.weights)


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, start: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return start.clone()


def _saved(weights: Sequence[Tensor]) -> Tensor:
    """Return a tensor whose node of autograd has saved the weights. While the tensor lives, reading them is faster."""
    with torch.inference_mode(False), torch.enable_grad():
        start = torch.zeros(1, requires_grad=True)
        result: Tensor = _Save.apply(start, *(w.detach() for w in weights))
        return result


def _unwritten(saved: Any) -> bool:
    """Whether no counter has changed since the weights were saved."""
    try:
        return saved.grad_fn.saved_tensors is not None
    except RuntimeError:
        return False
