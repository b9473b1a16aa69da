"""Dominant column spaces, fast: the eigenvectors of a Gram matrix instead of a full SVD.

For M (m×n) the left singular vectors are the eigenvectors of M·Mᵀ, an m×m problem whatever n is. What it
costs: forming M·Mᵀ squares the condition number, so that a working precision ε resolves singular values only
down to √ε·σ₁. Projecting on the computed basis U (orthonormal to ε in any case) leaves

    ‖M − U·Uᵀ·M‖² ≤ optimal tail² + 2·R·‖E‖,   ‖E‖ ≈ ε·σ₁²  (rounding of the Gram matrix)

so the excess matters only where the tail itself is that small. It is checked after the fact; where it could
exceed ``EXCESS`` of the tail, the next more exact method runs: working precision, float64, then a true SVD.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXCESS = 1e-4
"""Largest relative excess of the truncation error over the optimal one that is let through."""

_ROUNDING = 8.0
"""Measured ‖E‖ stays below this multiple of ε·σ₁² for the sizes of network layers (tests/factor)."""


def working(tensor: Tensor) -> Tensor:
    """Return the tensor in the precision that the algebra runs in: float32, or float64 if it came so."""
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def magnitude(tensor: Tensor) -> float:
    """Return the power of two just above the largest entry (1 for zeros): dividing by it is exact."""
    return math.ldexp(1.0, math.frexp(tensor.abs().amax().item())[1])


def left_basis(matrix: Tensor, rank: int) -> Tensor:
    """Return U (…, m, rank), orthonormal, spanning the dominant left singular space of ``matrix`` (…, m, n).

    Columns come in descending order of singular value. Exact SVD quality within a relative ``EXCESS`` of the
    truncation error (module docstring). ``rank`` must lie in 1…m.
    """
    m = matrix.shape[-2]
    peak = matrix.abs().amax((-2, -1), keepdim=True)
    matrix = matrix / torch.where(peak > 0, peak, torch.ones_like(peak))  # its squares stay within range
    # TF32 may be switched on for float32 products on an accelerator, which the bound above knows nothing of.
    exact_products = matrix.device.type == "cpu" or matrix.dtype == torch.float64
    candidates = (matrix, matrix.double()) if exact_products and matrix.dtype != torch.float64 else ()
    for operand in candidates or (matrix.double(),):
        values, vectors = torch.linalg.eigh(operand @ operand.mT)
        if rank == m or _accurate(values, rank):
            return vectors[..., m - rank :].flip(-1).to(matrix.dtype)
    u: Tensor = torch.linalg.svd(matrix.double(), full_matrices=False)[0]
    if u.shape[-1] < rank:  # fewer columns than the rank asked for: complete the basis
        u = torch.linalg.qr(u, mode="complete")[0]
    return u[..., :rank].to(matrix.dtype)


def _accurate(values: Tensor, rank: int) -> bool:
    """Whether the Gram eigenvalues (ascending) prove the truncation to be within EXCESS of the optimal one."""
    cut = values.shape[-1] - rank
    tail = values[..., :cut].clamp_min(0).sum(-1)
    excess = 2 * rank * _ROUNDING * torch.finfo(values.dtype).eps * values[..., -1]
    return bool((excess <= 2 * EXCESS * tail).all())
