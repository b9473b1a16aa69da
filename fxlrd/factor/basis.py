"""Dominant column spaces, fast: the eigenvectors of a Gram matrix instead of a full SVD.

For M (m×n) the left singular vectors are the eigenvectors of M·Mᵀ, an m×m problem for any n. The price: forming
M·Mᵀ squares the condition number, so that a working precision ε resolves singular values only down to √ε·σ₁.
Projecting on the computed basis U (orthonormal to ε in any case) leaves

    ‖M − U·Uᵀ·M‖² ≤ optimal tail² + 2·R·‖E‖,   ‖E‖ ≈ ε·σ₁²  (rounding of the Gram matrix)

so the excess matters only where the tail itself is that small. It is checked afterwards. Where it could exceed
``EXCESS`` of the tail, the next more exact method runs: working precision, then float64, then a true SVD.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXCESS = 1e-4
"""Largest relative excess of the truncation error over the optimal one that is accepted."""

_RANGE = 30
"""Tensors whose largest entry is within this power of two of 1 need no scaling."""

_ENTRIES = 2**22
"""Entries of a matrix that are converted at once."""

_ROUNDING = 8.0
"""Measured ‖E‖ stays below this multiple of ε·σ₁² for the sizes of network layers (tests/factor)."""


def working(tensor: Tensor) -> Tensor:
    """Return the tensor, detached, in the precision of the algebra: float64 for a float64 tensor, else float32."""
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def magnitude(tensor: Tensor) -> float:
    """Return the power of two just above the largest entry (1 for zeros): dividing by it is exact."""
    if tensor.is_contiguous():  # then the fastest way; of others it takes a copy
        least, most = torch.aminmax(tensor)
        largest = max(-least.item(), most.item())
    else:
        largest = torch.linalg.vector_norm(tensor, math.inf).item()
    return math.ldexp(1.0, math.frexp(largest)[1])


def within_range(matrix: Tensor) -> tuple[Tensor, float]:
    """Return the tensor divided by a power of two such that squares of its entries stay within range, and that power.

    Nearly all tensors are returned as they are: a copy would take as much memory again.
    """
    peak = magnitude(matrix)
    return (matrix, 1.0) if 2.0**-_RANGE <= peak <= 2.0**_RANGE else (matrix / peak, peak)


_EVEN = 2.0**-6
"""Rows whose largest entries differ by less than this factor lose little more than a rounding of their own."""


def basis_of(matrix: Tensor, rank: int) -> Tensor:
    """Return the `left_basis` U (…, m, rank) of ``matrix`` (…, m, n); with rank m, U·Uᵀ·matrix retains each row.

    Singular vectors retain rows up to the rounding of the largest one, in which rows far smaller are lost: channels
    whose scales a BatchNorm evens out afterwards. So at rank m, where there are such rows, U is the permutation that
    sorts rows by their largest entries, in descending order: with it nothing is rounded at all.
    """
    if rank < matrix.shape[-2]:
        return left_basis(matrix, rank)
    peaks = torch.linalg.vector_norm(matrix, ord=math.inf, dim=-1)
    nonzero = torch.where(peaks > 0, peaks, torch.inf)
    if bool((nonzero.amin(-1) >= _EVEN * peaks.amax(-1)).all()):
        return left_basis(matrix, rank)
    order = peaks.argsort(dim=-1, descending=True, stable=True)
    return torch.nn.functional.one_hot(order, rank).mT.to(matrix.dtype)


def left_basis(matrix: Tensor, rank: int) -> Tensor:
    """Return U (…, m, rank), orthonormal, spanning the dominant left singular space of ``matrix`` (…, m, n).

    Columns are in descending order of singular value. The truncation error is within a relative ``EXCESS`` of that
    of an exact SVD (module docstring). ``rank`` must lie in 1…m.
    """
    m = matrix.shape[-2]
    peak = torch.linalg.vector_norm(matrix, math.inf, dim=(-2, -1), keepdim=True)
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    if not bool(((peak > 2.0**-_RANGE) & (peak < 2.0**_RANGE)).all()):
        matrix = matrix / peak  # its squares stay within range
    # On an accelerator float32 products may run in TF32, which the bound above does not cover.
    exact_products = matrix.device.type == "cpu" or matrix.dtype == torch.float64
    for dtype in dict.fromkeys((matrix.dtype, torch.float64) if exact_products else (torch.float64,)):
        values, vectors = torch.linalg.eigh(_gram(matrix, dtype))
        if rank == m or _accurate(values, rank):
            return vectors[..., m - rank :].flip(-1).to(matrix.dtype)
    u: Tensor = torch.linalg.svd(matrix.double(), full_matrices=False)[0]
    if u.shape[-1] < rank:  # fewer columns than the requested rank: complete the basis
        u = torch.linalg.qr(u, mode="complete")[0]
    return u[..., :rank].to(matrix.dtype)


def _gram(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return M·Mᵀ in ``dtype``, without a copy of M in it: some columns at a time."""
    if matrix.dtype == dtype:
        return matrix @ matrix.mT
    columns = max(1, _ENTRIES // matrix[..., 0].numel())
    gram: Tensor | None = None
    for block in matrix.split(columns, -1):
        wide = block.to(dtype)
        gram = wide @ wide.mT if gram is None else gram + wide @ wide.mT
    assert gram is not None
    return gram


def _accurate(values: Tensor, rank: int) -> bool:
    """Whether the Gram eigenvalues (ascending) prove the truncation to be within EXCESS of the optimal one."""
    cut = values.shape[-1] - rank
    tail = values[..., :cut].clamp_min(0).sum(-1)
    excess = 2 * rank * _ROUNDING * torch.finfo(values.dtype).eps * values[..., -1]
    return bool((excess <= 2 * EXCESS * tail).all())
