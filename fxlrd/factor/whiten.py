"""Factors fitted to data: they minimise the error of a layer's output instead of that of its weight.

With the second moments G = E[x·xᵀ] of a layer's inputs, and the importance Γ of the directions of its output:

    E‖Γ^½·(W − W')·x‖² = ‖Kᵀ·(W − W')·R‖²,    K·Kᵀ = Γ,  R·Rᵀ = G

For a matrix, the best W' of rank r is therefore K⁻ᵀ·[Kᵀ·W·R]·R⁻¹ with the truncated SVD between. Any roots will do:
those of another kind turn the whitened weight, and leave its singular values. Cholesky's cost the least. A
k×k conv has no such closed form. It starts from the Tucker-2 of the weight whitened channel by channel. With the
moments G of whole patches (channels × kernel positions), alternating steps then lower the exact error:

    first fixed            core and last are a reduced-rank regression, which has a closed form
    core and last fixed    first is a linear least squares problem, solved by conjugate gradients

Directions without any variance would be divided by zero: a share of the mean variance (``RIDGE``, plus the caller's
``ridge``) is added to G and Γ. Everything runs in float64. Factors are balanced (SVD)
or have orthonormal outer factors (Tucker-2), as those of `svd` and `tucker2`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxlrd.factor.basis import left_basis
from fxlrd.factor.svd import Pair, svd
from fxlrd.factor.tucker import Triple, tucker2

RIDGE = 1e-5
"""Share of the mean variance that is added to every direction."""

_NOTHING = 1e-30
"""Variance of a channel that is always zero: negligible beside any other, but its root has an inverse."""

_ENOUGH = 1e-3
"""The alternation stops when a round lowers the error by less than this share, or after ``_ROUNDS``."""

_ROUNDS = 8
_STEPS = 10
"""Conjugate gradient steps a round."""


class Root(NamedTuple):
    """A root R of a matrix of moments R·Rᵀ, and its inverse R⁻¹ (…, C, C)."""

    root: Tensor
    inverse: Tensor


def regularised(second: Tensor, ridge: float = 0.0) -> Tensor:
    """Return ``second`` (…, C, C), symmetric, with a share of the mean variance added to every direction."""
    second = second.double()
    mean = second.diagonal(dim1=-2, dim2=-1).mean(-1)
    floor = (mean * (RIDGE + ridge)).clamp_min(_NOTHING)[..., None]
    added = (second + second.mT) / 2
    added.diagonal(dim1=-2, dim2=-1).add_(floor)
    return added


def root(second: Tensor, ridge: float = 0.0) -> Root:
    """Return the root of ``second`` (…, C, C), symmetric and positive semidefinite, `regularised`.

    It is lower triangular, unless rounding has left moments that are not positive definite in spite of the share added.
    """
    moments = regularised(second, ridge)
    lower, failed = torch.linalg.cholesky_ex(moments)
    if not bool(failed.any()):
        identity = torch.eye(moments.shape[-1]).to(moments)
        return Root(lower, torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False))
    values, vectors = torch.linalg.eigh(moments)
    least = (RIDGE + ridge) * moments.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    size = torch.maximum(values, least.clamp_min(_NOTHING)).sqrt()[..., None, :]
    return Root(vectors * size, (vectors / size).mT)


def whitened_svd(weight: Tensor, rank: int, input_root: Root | None, output_root: Root | None = None) -> Pair:
    """Return first (G, R, C) and last (G, S, R) of ``weight`` (G, S, C), optimal for the moments, for each of G groups.

    ``input_root`` (G, C, C) is the root of the inputs' second moments, ``output_root`` (G, S, S) that of Γ; None
    stands for the identity. The error is relative, of the output weighted by Γ.
    """
    w = weight.detach().double()
    if input_root is not None:
        w = w @ input_root.root
    if output_root is not None:
        w = output_root.root.mT @ w
    pair = svd(w, rank)
    first = pair.first if input_root is None else pair.first @ input_root.inverse
    last = pair.last if output_root is None else output_root.inverse.mT @ pair.last
    return Pair(*_balanced(first, last), pair.error)


def _balanced(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with the same product, each with the square roots of its singular values."""
    q_last, r_last = torch.linalg.qr(last)
    q_first, r_first = torch.linalg.qr(first.mT)
    u, s, v = torch.linalg.svd(r_last @ r_first.mT, full_matrices=False)
    half = s.sqrt()
    return half[..., :, None] * (v @ q_first.mT), (q_last @ u) * half[..., None, :]


def whitened_tucker2(
    weight: Tensor,
    rank_in: int | None,
    rank_out: int | None,
    input_root: Root | None,
    output_root: Root | None = None,
    patches: Tensor | None = None,
) -> Triple:
    """Return the Tucker-2 factors of ``weight`` (G, S, C, k…) fitted to the moments; shapes are those of `tucker2`.

    ``input_root`` (G, C, C) is by channel, ``output_root`` as in `whitened_svd`. ``patches`` (C·K, C·K), for G = 1
    only, are the second moments of the patches that the kernel is applied to, channel-major: the factors are refined
    on them. The error is relative, of the output weighted by Γ: exact with ``patches``, otherwise as if kernel
    positions were uncorrelated.
    """
    w = weight.detach().double()
    whitened = w
    if input_root is not None:
        whitened = torch.einsum("gsc...,gcd->gsd...", whitened, input_root.root)
    if output_root is not None:
        whitened = torch.einsum("gst,gsc...->gtc...", output_root.root, whitened)
    triple = tucker2(whitened, rank_in, rank_out, sweeps=2)
    first, core, last, error = triple
    if first is not None and input_root is not None:
        first = first @ input_root.inverse
    elif input_root is not None:
        core = torch.einsum("gor...,grc->goc...", core, input_root.inverse)
    if patches is not None and bool(patches.count_nonzero()):
        scaled = w if output_root is None else torch.einsum("gst,gsc...->gtc...", output_root.root, w)
        first, core, last, error = _refined(scaled, first, core, last, patches)
    if last is not None and output_root is not None:
        last = output_root.inverse.mT @ last
    elif output_root is not None:
        core = torch.einsum("gst,gsr...->gtr...", output_root.inverse, core)
    return Triple(*_orthonormal(first, core, last), error)


def _orthonormal(
    first: Tensor | None, core: Tensor, last: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return factors with the same product; ``first`` has orthonormal rows, ``last`` orthonormal columns."""
    if first is not None:
        q, r = torch.linalg.qr(first.mT)
        first, core = q.mT, torch.einsum("gor...,gqr->goq...", core, r)
    if last is not None:
        last, r = torch.linalg.qr(last)
        core = torch.einsum("gpo,gor...->gpr...", r, core)
    return first, core, last


def _refined(w: Tensor, first: Tensor | None, core: Tensor, last: Tensor | None, patches: Tensor) -> Triple:
    """Alternate between (core, last) and first on the patches' moments, and return the best factors and their error."""
    width, kernel = w.shape[2], w.shape[3:]
    moments = patches.double()
    moments = moments + torch.eye(len(moments), dtype=moments.dtype, device=moments.device) * (
        moments.diagonal().mean() * RIDGE
    )
    target = w[0].flatten(1)  # S × C·K
    total = _energy(target, moments)
    u = first[0] if first is not None else None
    best: tuple[float, Tensor | None, Tensor, Tensor | None] | None = None
    for _ in range(_ROUNDS):
        c, v = _regressed(target, u, moments, width, last.shape[2] if last is not None else None)
        product = c if v is None else v @ c  # S × r1·K
        error = _energy(target - _widened(product, u, width), moments)
        done = best is not None and error > best[0] * (1 - _ENOUGH)
        if best is None or error < best[0]:
            best = error, u, c, v
        if u is None or done:
            break
        u = _input_factor(target, u, c, v, moments)
    assert best is not None
    error, u, c, v = best
    return Triple(
        None if u is None else u[None],
        c.unflatten(1, (-1, *kernel))[None],
        None if v is None else v[None],
        max(error / total, 0.0) ** 0.5 if total > 0 else 0.0,
    )


def _energy(weight: Tensor, moments: Tensor) -> float:
    return float((weight @ moments * weight).sum())


def _widened(product: Tensor, u: Tensor | None, width: int) -> Tensor:
    """Return B·(U⊗1): the factors as one matrix on patches, S × C·K."""
    if u is None:
        return product
    return torch.einsum("srk,rc->sck", product.unflatten(1, (len(u), -1)), u).flatten(1)


def _cut(moments: Tensor, u: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Return G·(U⊗1)ᵀ and (U⊗1)·G·(U⊗1)ᵀ."""
    if u is None:
        return moments, moments
    cross = torch.einsum("nck,rc->nrk", moments.unflatten(1, (width, -1)), u).flatten(1)
    return cross, torch.einsum("ckn,rc->rkn", cross.unflatten(0, (width, -1)), u).flatten(0, 1)


def _regressed(
    target: Tensor, u: Tensor | None, moments: Tensor, width: int, rank: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return the best core (r2 × r1·K) and last (S × r2, orthonormal) for ``u``."""
    cross, inner = _cut(moments, u, width)
    scale = inner.diagonal().clamp_min(1e-300).rsqrt()
    lower, failed = torch.linalg.cholesky_ex(inner * scale[:, None] * scale)
    if failed.item():  # some channels are always zero
        lower = torch.linalg.cholesky(
            inner * scale[:, None] * scale + 1e-8 * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        )
    fitted = torch.cholesky_solve((target @ cross * scale).mT, lower).mT  # M·scale⁻¹
    if rank is None:
        return fitted * scale, None
    v = left_basis(fitted @ lower, rank)
    return v.mT @ fitted * scale, v


def _input_factor(target: Tensor, u: Tensor, core: Tensor, last: Tensor | None, moments: Tensor) -> Tensor:
    """Return a better U (r1 × C) for core and last: conjugate gradient steps on its normal equations."""
    rank, width = u.shape
    # With orthonormal columns, ‖T − V·c·U‖² = ‖Vᵀ·T − c·U‖² + const.
    goal = target if last is None else last.mT @ target
    blocks = core.unflatten(1, (rank, -1))  # r2 × r1 × K

    def back(d: Tensor) -> Tensor:
        return torch.einsum("srk,sck->rc", blocks, (d @ moments).unflatten(1, (width, -1)))

    def apply(p: Tensor) -> Tensor:
        return back(torch.einsum("srk,rc->sck", blocks, p).flatten(1))

    residual = back(goal) - apply(u)
    step = residual.clone()
    size = (residual * residual).sum()
    start = size
    for _ in range(_STEPS):
        if not bool(size > 1e-16 * start):
            break
        along = apply(step)
        length = size / (step * along).sum()
        u = u + length * step
        residual = residual - length * along
        after = (residual * residual).sum()
        step = residual + after / size * step
        size = after
    return u
