"""Block terms of a Tucker core: two rotations after which its diagonal blocks hold as much energy as possible.

    core (r2×r1×K)  →  Q·core·Pᵀ,   maximise  f(P, Q) = Σⱼ ‖Qⱼ·core·Pⱼᵀ‖²

over orthogonal P (r1×r1) and Q (r2×r2) with N row blocks Pⱼ, Qⱼ of equal height. Cutting the rotated core to its
diagonal blocks then loses 1 − f/‖core‖² of its energy. For orthogonal P and Q these blocks are also the best ones.

The search starts from higher-order singular bases of the core with its K positions weighted at random. If the core
is block-diagonal in some hidden bases, each of their vectors lies in one block (random weights separate equal
singular values), and it remains to find which: a balanced assignment of channels by the energies ‖core[i, j]‖².
From the best starts, steps in P and Q alternate. For fixed P, f is convex in Q, so that the orthogonal factor of its
gradient [Qⱼ·Mⱼ], Mⱼ = core·PⱼᵀPⱼ·coreᵀ, never lowers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 200
"""Largest number of alternating steps in the final search."""

_STARTS = 8
_CLIMBED, _FIRST_STEPS = 3, 10
"""The best ``_CLIMBED`` starts are followed for ``_FIRST_STEPS`` steps, then the best of them alone."""
_SETTLED = 1e-5, 1e-2
"""A step that gains less than the first share of all energy and the second of the lost energy ends the search."""
_ROUNDING = 1e-13


class Blocks(NamedTuple):
    """Orthogonal ``p`` (r1×r1), ``q`` (r2×r2), the diagonal blocks ``cores`` (N, R2, R1, K) of Q·core·Pᵀ, and the
    share of the core's energy in them (``retained``) beside that of a cut without rotation (``unrotated``).
    """

    p: Tensor
    q: Tensor
    cores: Tensor
    retained: float
    unrotated: float


class _Point(NamedTuple):
    energy: float
    p: Tensor
    q: Tensor


def block_term(core: Tensor, groups: int, steps: int = STEPS) -> Blocks:
    """Rotate ``core`` (r2, r1, K) and cut it to ``groups`` diagonal blocks. Both ranks are multiples of it.

    With ``steps=0`` it is cut without rotation. Runs in float64; the same core gives the same blocks every time.
    """
    core = core.double()
    total = core.square().sum().item()
    eye = partial(torch.eye, dtype=core.dtype, device=core.device)
    plain = _Point(_energy(core, groups), eye(core.shape[1]), eye(core.shape[0]))
    best = plain
    if plain.energy < (1 - _ROUNDING) * total and steps > 0:
        starts = sorted(_starts(core, groups), key=lambda s: -s.energy)[:_CLIMBED]
        climbed = [_climb(core, s, groups, min(steps, _FIRST_STEPS)) for s in (plain, *starts)]
        last = _climb(core, max(climbed, key=lambda s: s.energy), groups, steps)
        best = max(plain, last, key=lambda s: s.energy)
    cores = _diagonal(_rotated(core, best.p, best.q), groups)
    retained, unrotated = (min(s.energy / total, 1.0) if total else 1.0 for s in (best, plain))
    return Blocks(best.p, best.q, cores, retained, unrotated)


def _starts(core: Tensor, groups: int) -> Iterator[_Point]:
    random = torch.Generator().manual_seed(0)
    for i in range(_STARTS):
        weights = torch.rand(core.shape[2], generator=random, dtype=core.dtype) if i else torch.ones(core.shape[2])
        weighted = core * weights.to(core)
        p, q = _singular(weighted.transpose(0, 1)), _singular(weighted)
        energies = _rotated(core, p, q).square().sum(-1)
        rows, columns = _assign(energies, groups)
        p, q = p[columns], q[rows]
        yield _Point(_energy(_rotated(core, p, q), groups), p, q)


def _rotated(core: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return Q·core·Pᵀ."""
    return torch.einsum("ai,ijk,bj->abk", q, core, p)


def _singular(unfolded: Tensor) -> Tensor:
    """Return the left singular vectors of a mode as rows, strongest first."""
    m = unfolded.flatten(1)
    return torch.linalg.eigh(m @ m.mT)[1].flip(-1).mT


def _climb(core: Tensor, start: _Point, groups: int, steps: int) -> _Point:
    """Alternate steps in Q and P until a step gains too little."""
    total = core.square().sum().item()
    by_row = core.transpose(1, 2).contiguous()  # r2, K, r1
    by_column = core.permute(1, 2, 0).contiguous()  # r1, K, r2
    energy, p, q = start
    for _ in range(steps):
        q, _ = _step(by_row @ p.mT, q, groups)
        p, now = _step(by_column @ q.mT, p, groups)
        if now - energy < max(min(_SETTLED[0] * total, _SETTLED[1] * (total - now)), _ROUNDING * total):
            break
        energy = now
    return _Point(_energy(_rotated(core, p, q), groups), p, q)


def _step(projected: Tensor, q: Tensor, groups: int) -> tuple[Tensor, float]:
    """Return the orthogonal factor of the gradient of f in Q, and f before; ``projected`` (r2, K, r1) is core·Pᵀ."""
    a = projected.unflatten(2, (groups, -1)).permute(2, 0, 1, 3).flatten(2)  # N, r2, K·R1
    blocks = q.unflatten(0, (groups, -1))  # N, R2, r2
    gradient = ((blocks @ a) @ a.mT).flatten(0, 1)
    u, _, vh = torch.linalg.svd(gradient)
    return u @ vh, (gradient * q).sum().item()


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
