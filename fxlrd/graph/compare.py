"""How far outputs lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxlrd.errors import VerificationError
from fxlrd.graph.precision import TF32_EPS, uses_tf32


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
        wide = torch.complex128 if b.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, torch.zeros_like(a), a - b).abs()
        if not gap.isfinite().all():
            raise VerificationError(f"{where}: output {i} has NaN or Inf where the reference is finite")
        largest = max(largest, gap.max().item() if gap.numel() else 0.0)
        above += gap.square().sum().item()
        below += torch.where(b.isfinite(), b, torch.zeros_like(b)).abs().square().sum().item()
    return Difference(largest, (above / below) ** 0.5 if below else above**0.5)


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
