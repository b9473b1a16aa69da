from __future__ import annotations

import pytest
import torch

from fxlrd.factor.block_term import Blocks, block_term
from tests.support.cases import cases


def orthogonal(n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n).double())[0]


def planted(groups: int, r2: int, r1: int, positions: int, noise: float = 0.0, equal: bool = False):
    """Return a core that is block-diagonal in hidden bases, and the energy share of its blocks in those."""
    core = torch.zeros(groups * r2, groups * r1, positions).double()
    for n in range(groups):
        block = torch.randn(r2, r1, positions).double()
        core[n * r2 : (n + 1) * r2, n * r1 : (n + 1) * r1] = block / block.norm() if equal else block
    extra = torch.randn_like(core)
    core += noise * core.norm() / extra.norm() * extra
    return rotated(core, orthogonal(groups * r1), orthogonal(groups * r2)), energy(core, groups)


def rotated(core: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ai,ijk,bj->abk", q, core, p)


def energy(core: torch.Tensor, groups: int) -> float:
    rows, columns = (torch.arange(n) * groups // n for n in core.shape[:2])
    mask = rows[:, None] == columns[None, :]
    return (core.square().sum(-1)[mask].sum() / core.square().sum()).item()


def decaying(r2: int, r1: int, positions: int = 9) -> torch.Tensor:
    """Return a core whose singular values fall like those of trained layers, roughly as 1/i."""
    rows, columns = (1 / torch.arange(1, n + 1).double().sqrt() for n in (r2, r1))
    return torch.randn(r2, r1, positions).double() * rows[:, None, None] * columns[None, :, None]


def check(core: torch.Tensor, blocks: Blocks, groups: int) -> None:
    """Check what holds of any result."""
    for basis in (blocks.p, blocks.q):
        torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis)).double(), rtol=1e-9, atol=1e-9)
    turned = rotated(core, blocks.p, blocks.q)
    for n, block in enumerate(blocks.cores):
        r2, r1 = block.shape[:2]
        torch.testing.assert_close(block, turned[n * r2 : (n + 1) * r2, n * r1 : (n + 1) * r1], rtol=1e-9, atol=1e-9)
    assert blocks.retained == pytest.approx(energy(turned, groups), rel=1e-9)
    assert blocks.unrotated == pytest.approx(energy(core, groups), rel=1e-9)
    assert blocks.retained >= blocks.unrotated


SIZES = [(1, 1), (2, 2), (3, 5), (5, 3), (8, 8), (1, 4), (12, 4)]


@pytest.mark.parametrize("equal", [False, True], ids=["", "equal"])
@pytest.mark.parametrize("size", cases(SIZES, slow=[(8, 8), (12, 4)]))
@pytest.mark.parametrize("groups", cases([2, 4, 8], slow=[8]))
def test_hidden_blocks_are_found(groups, size, equal):
    for seed in range(5):
        torch.manual_seed(seed)
        core, _ = planted(groups, *size, 9, equal=equal)
        blocks = block_term(core, groups)
        check(core, blocks, groups)
        assert blocks.retained > 1 - 1e-9, seed


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_wide_hidden_blocks_are_found(groups):
    core, _ = planted(groups, 96 // groups, 64 // groups, 9)
    assert block_term(core, groups).retained > 1 - 1e-9


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_hidden_blocks_are_found_under_noise(groups, noise):
    for seed in range(3):
        torch.manual_seed(seed)
        core, share = planted(groups, 4, 6, 9, noise)
        assert block_term(core, groups).retained >= share - 1e-2 * (1 - share), seed


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_one_position_is_diagonal_in_its_singular_bases(groups):
    core = torch.randn(16, 24, 1).double()
    assert block_term(core, groups).retained > 1 - 1e-9


@pytest.mark.parametrize("r", cases([16, 48], slow=[48]))
def test_rotated_blocks_of_trained_spectra_retain_clearly_more_than_unrotated_ones(r):
    for seed in range(3):
        torch.manual_seed(seed)
        core = decaying(r, r)
        gains = []
        for groups in (2, 4, 8):
            blocks = block_term(core, groups)
            check(core, blocks, groups)
            gains.append((1 - blocks.retained) / (1 - blocks.unrotated))
        assert gains[0] < 0.7
        assert gains[1] < 0.75
        assert gains[2] < 0.75


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (8, 24)])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_never_worse_than_the_unrotated_cut(groups, size):
    core = torch.randn(*size, 9).double()
    check(core, block_term(core, groups), groups)
    diagonal = torch.zeros_like(core)
    for n in range(groups):
        rows, columns = (slice(n * s // groups, (n + 1) * s // groups) for s in size)
        diagonal[rows, columns] = core[rows, columns]
    blocks = block_term(diagonal, groups)
    check(diagonal, blocks, groups)
    assert blocks.retained > 1 - 1e-12


def test_without_steps_the_core_is_cut_unrotated():
    core = torch.randn(8, 12, 9).double()
    blocks = block_term(core, 4, steps=0)
    check(core, blocks, 4)
    assert blocks.retained == blocks.unrotated
    assert torch.equal(blocks.cores[1], core[2:4, 3:6])


def test_one_group_is_the_core_itself():
    core = torch.randn(5, 7, 9).double()
    blocks = block_term(core, 1)
    assert torch.equal(blocks.cores[0], core)
    assert blocks.retained == blocks.unrotated == 1


def test_a_core_of_zeros():
    blocks = block_term(torch.zeros(4, 4, 9), 2)
    assert blocks.retained == blocks.unrotated == 1
    assert not blocks.cores.any()


def test_the_same_core_gives_the_same_blocks_and_the_global_random_state_stays():
    core = torch.randn(8, 8, 9)
    torch.manual_seed(1)
    first = block_term(core, 4)
    state = torch.random.get_rng_state()
    again = block_term(core, 4)
    assert torch.equal(first.cores, again.cores)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_scale_does_not_matter():
    core = decaying(16, 16)
    retained = block_term(core, 4).retained
    assert block_term(core * 2.0**30, 4).retained == pytest.approx(retained, rel=1e-9)
    assert block_term(core * 2.0**-30, 4).retained == pytest.approx(retained, rel=1e-9)
