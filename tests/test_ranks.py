from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fxlrd.errors import FxlrdError
from fxlrd.ranks import svd_rank, tucker1_rank, tucker2_rank

CHANNELS = st.integers(1, 2048)
KERNELS = st.sampled_from([2, 3, 5, 7, (1, 3), (3, 2), (1, 7)])
# Ratios that a float holds exactly, so that the bound can be checked in exact arithmetic.
RATIOS = st.integers(17, 1600).map(lambda sixteenths: sixteenths / 16)


# The 2x column of the paper's Table 2 (ResNet-152).
@pytest.mark.parametrize(
    ("c_in", "c_out", "kernel_size", "rank"),
    [
        (64, 64, 1, 16),
        (64, 64, 3, 38),
        (64, 256, 1, 25),
        (2048, 512, 1, 204),
        (512, 512, 3, 309),
        (512, 2048, 1, 204),
        (2048, 1000, 1, 335),
    ],
)
def test_ranks_of_the_paper(c_in, c_out, kernel_size, rank):
    found = svd_rank(c_in, c_out, 2) if kernel_size == 1 else tucker2_rank(c_in, c_out, kernel_size, 2)
    assert found == rank


@pytest.mark.parametrize("ratio", [1, 0, -2, 0.5, True, float("nan"), float("inf"), "2", None])
@pytest.mark.parametrize(
    "call",
    [
        lambda ratio: svd_rank(64, 64, ratio),
        lambda ratio: tucker2_rank(64, 64, 3, ratio),
        lambda ratio: tucker1_rank(64, 64, 3, ratio),
    ],
    ids=["svd", "tucker2", "tucker1"],
)
def test_bad_ratio(call, ratio):
    with pytest.raises(FxlrdError) as caught:
        call(ratio)
    assert str(caught.value) == f"ratio={ratio!r}: a compression ratio is a finite number above 1, such as 2"


@pytest.mark.parametrize("beta", [0, -1, float("nan"), float("inf"), "1", None])
def test_bad_beta(beta):
    with pytest.raises(FxlrdError) as caught:
        tucker2_rank(64, 64, 3, 2, beta)
    assert f"beta={beta}" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(CHANNELS, CHANNELS, RATIOS)
def test_svd_rank_is_the_largest_that_meets_the_ratio(c_in, c_out, ratio):
    rank = svd_rank(c_in, c_out, ratio)
    allowed = c_in * c_out / Fraction(ratio)
    assert rank * (c_in + c_out) <= allowed < (rank + 1) * (c_in + c_out)


@given(CHANNELS, CHANNELS, KERNELS, RATIOS, st.sampled_from([1, 0.5, 2, 1.25]))
@example(8, 16, 3, 1.5, 1)  # rank 8 has exactly the parameters allowed: the root is a whole number
@example(32, 64, 3, 1.5, 1)
@example(96, 96, 3, 1.6875, 1)
def test_tucker2_rank_is_the_largest_that_meets_the_ratio(c_in, c_out, kernel_size, ratio, beta):
    rank = tucker2_rank(c_in, c_out, kernel_size, ratio, beta)
    area = _area(kernel_size)

    def parameters(r):
        return Fraction(beta) * area * r * r + (c_in + Fraction(beta) * c_out) * r

    assert parameters(rank) <= c_in * c_out * area / Fraction(ratio) < parameters(rank + 1)


@given(CHANNELS, CHANNELS, KERNELS, RATIOS)
def test_tucker1_rank_is_the_largest_that_meets_the_ratio(c_kept, c_cut, kernel_size, ratio):
    rank = tucker1_rank(c_kept, c_cut, kernel_size, ratio)
    area = _area(kernel_size)
    each = c_cut + area * c_kept
    assert rank * each <= c_kept * c_cut * area / Fraction(ratio) < (rank + 1) * each


def test_kernel_area_is_what_counts():
    assert tucker2_rank(48, 80, (1, 9), 2) == tucker2_rank(48, 80, 3, 2) == tucker2_rank(48, 80, (3, 3), 2)


def _area(kernel_size):
    return kernel_size**2 if isinstance(kernel_size, int) else kernel_size[0] * kernel_size[1]
