"""How far outputs lie apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxlrd.errors import VerificationError
from fxlrd.graph.precision import TF32_EPS, uses_tf32
from fxlrd.graph.run import stored

_ENTRIES = 2**18
"""Entries that are compared at a time."""


@dataclass(frozen=True)
class Difference:
    """How far outputs lie apart: largest absolute difference, and ‖a − b‖ / ‖b‖ over all of them."""

    max_abs: float
    relative: float


def difference(outputs: list[Tensor], reference: list[Tensor], where: str) -> Difference:
    """Compare output counts, shapes and dtypes, then values (in float64).

    Raises VerificationError, naming ``where``, if anything but values differs or values are not finite where
    the reference is.
    """
    if len(outputs) != len(reference):
        raise VerificationError(f"{where}: {len(outputs)} output tensors instead of {len(reference)}")
    largest = above = below = 0.0
    for i, (a, b) in enumerate(zip(outputs, reference, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise VerificationError(
                f"{where}: output {i} is {a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}"
            )
        for part, expected in zip(_parts(a), _parts(b), strict=True):
            same = (part == expected) | (part.isnan() & expected.isnan())
            gap = torch.where(same, torch.zeros_like(part), part - expected).abs()
            if not gap.isfinite().all():
                raise VerificationError(f"{where}: output {i} has NaN or Inf where the reference is finite")
            largest = max(largest, gap.max().item())
            above += gap.square().sum().item()
            below += torch.where(expected.isfinite(), expected, torch.zeros_like(expected)).abs().square().sum().item()
    return Difference(largest, (above / below) ** 0.5 if below else above**0.5)


def _parts(t: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's entries in float64, some at a time: logits of a language model are large."""
    wide = torch.complex128 if t.is_complex() else torch.float64
    dense = [t] if t.layout is torch.strided else _of_sparse(t)
    return (part.to(wide) for each in dense for part in each.flatten().split(_ENTRIES) if part.numel())


def _of_sparse(t: Tensor) -> list[Tensor]:
    """Return the dense tensors that hold a sparse one, in an order of their own."""
    return stored(t.coalesce() if t.layout is torch.sparse_coo else t)


def rounding(values: Sequence[Tensor]) -> float:
    """Return the relative difference of such tensors that rounding explains, where the same kernels made both."""
    eps = max((torch.finfo(t.dtype).eps for t in values if t.is_floating_point() or t.is_complex()), default=0.0)
    return min(1e3 * eps, 0.1)  # a thousand roundings of bfloat16 would explain anything


def rounding_of_kernels(values: Sequence[Tensor]) -> float:
    """Return the relative difference that rounding explains where other kernels, or other shapes, made the values.

    On a GPU that is TF32's where it is on, as it is for convs by default.
    """
    tf32 = any(t.dtype in (torch.float32, torch.complex64) and uses_tf32(t.device) for t in values)
    return max(rounding(values), min(1e3 * TF32_EPS, 0.1) if tf32 else 0.0)
