"""Block terms of a Tucker core: two rotations after which its diagonal blocks hold as much energy as possible.

    core (r2×r1×K)  →  Q·core·Pᵀ,   maximise  f(P, Q) = Σⱼ ‖Qⱼ·core·Pⱼᵀ‖²

over orthogonal P (r1×r1) and Q (r2×r2) with N row blocks Pⱼ, Qⱼ of equal height. Cutting the rotated core to its
diagonal blocks then loses 1 − f/‖core‖² of its energy; for orthogonal P and Q the blocks are also the best ones.

Start: the core's own higher-order singular bases. If the core is block-diagonal in some hidden bases, each of
their vectors lies in one block (for distinct singular values), and what is left to find is which: a balanced
assignment of channels by the energies ‖core[i, j]‖². From there, alternating steps in P and Q. For fixed P, f is
convex in Q, so that the orthogonal factor of its gradient [Qⱼ·Mⱼ], Mⱼ = core·PⱼᵀPⱼ·coreᵀ, never lowers it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 200
"""Most alternating steps from each start."""

_SETTLED = 1e-5
"""A step that wins less than this share of the energy ends the search."""


class Blocks(NamedTuple):
    """Orthogonal ``p`` (r1×r1), ``q`` (r2×r2), the diagonal blocks ``cores`` (N, R2, R1, K) of Q·core·Pᵀ, and the
    share of the core's energy in them (``kept``) beside the share of a cut without rotation (``plain``).
    """

    p: Tensor
    q: Tensor
    cores: Tensor
    kept: float
    plain: float


def block_term(core: Tensor, groups: int, steps: int = STEPS) -> Blocks:
    """Rotate ``core`` (r2, r1, K) and cut it to ``groups`` diagonal blocks. Both ranks are multiples of it."""
    core = core.double()
    total = core.square().sum().item()
    plain = _energy(core, groups)
    identity = torch.eye(core.shape[1], dtype=core.dtype), torch.eye(core.shape[0], dtype=core.dtype)
    best = (plain, *identity)
    if groups > 1 and total > 0:
        p0, q0 = _singular(core.transpose(0, 1)), _singular(core)
        energies = torch.einsum("ai,ijk,bj->abk", q0, core, p0).square().sum(-1)
        rows, columns = _assign(energies, groups)
        for p, q in ((p0[columns], q0[rows]), (p0, q0), identity):
            found = _climb(core, p, q, groups, steps)
            best = max(best, found, key=lambda b: b[0])
    kept, p, q = best
    cores = _diagonal(torch.einsum("ai,ijk,bj->abk", q, core, p), groups)
    return Blocks(p, q, cores, kept / total if total else 1.0, plain / total if total else 1.0)


def _singular(unfolded: Tensor) -> Tensor:
    """Return the left singular vectors of a mode as rows, strongest first."""
    m = unfolded.flatten(1)
    return torch.linalg.eigh(m @ m.mT)[1].flip(-1).mT


def _climb(core: Tensor, p: Tensor, q: Tensor, groups: int, steps: int) -> tuple[float, Tensor, Tensor]:
    """Alternate steps in Q and P while they pay; returns (energy, p, q)."""
    total = core.square().sum().item()
    energy = -1.0
    for _ in range(steps):
        q = _step(torch.einsum("ijk,bj->ibk", core, p), q, groups)
        p = _step(torch.einsum("ijk,ai->jak", core, q), p, groups)
        now = _energy(torch.einsum("ai,ijk,bj->abk", q, core, p), groups)
        if now - energy < _SETTLED * total:
            energy = now
            break
        energy = now
    return energy, p, q


def _step(projected: Tensor, q: Tensor, groups: int) -> Tensor:
    """Return the orthogonal factor of the gradient of f in Q; ``projected`` (r2, r1, K) is core·Pᵀ."""
    a = projected.unflatten(1, (groups, -1)).movedim(1, 0).flatten(2)  # N, r2, R1·K
    blocks = q.unflatten(0, (groups, -1))  # N, R2, r2
    gradient = ((blocks @ a) @ a.mT).flatten(0, 1)
    u, _, vh = torch.linalg.svd(gradient)
    return u @ vh


def _assign(energies: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return row and column orders that gather ``energies`` (r2×r1) into diagonal blocks of equal size."""
    unit = torch.nn.functional.normalize(energies, dim=1)
    seeds = [int(energies.sum(1).argmax())]
    for _ in range(groups - 1):  # each next seed shares the least with those before
        seeds.append(int((unit @ unit[seeds].mT).amax(1).argmin()))
    rows = _balanced(unit @ unit[seeds].mT, groups)
    columns = rows
    for _ in range(20):
        columns = _balanced(_gather(energies.mT, rows, groups), groups)
        again = _balanced(_gather(energies, columns, groups), groups)
        if torch.equal(again, rows):
            break
        rows = again
    return rows.argsort(stable=True), columns.argsort(stable=True)


def _gather(energies: Tensor, labels: Tensor, groups: int) -> Tensor:
    """Return each row's energy in the columns of each group."""
    return torch.stack([energies[:, labels == n].sum(1) for n in range(groups)], dim=1)


def _balanced(gains: Tensor, groups: int) -> Tensor:
    """Label rows with groups of equal size, largest gains first."""
    room = [len(gains) // groups] * groups
    labels = torch.full((len(gains),), -1)
    for index in gains.flatten().argsort(descending=True).tolist():
        row, group = divmod(index, groups)
        if labels[row] < 0 and room[group]:
            labels[row] = group
            room[group] -= 1
    return labels


def _diagonal(core: Tensor, groups: int) -> Tensor:
    """Return the diagonal blocks (N, R2, R1, K)."""
    blocks = core.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))  # N, R2, N, R1, K
    return torch.stack([blocks[n, :, n] for n in range(groups)])


def _energy(core: Tensor, groups: int) -> float:
    return _diagonal(core, groups).square().sum().item()
