from __future__ import annotations

import pytest
import torch

from fxlrd.errors import VerificationError
from fxlrd.graph.compare import Difference, difference


def test_difference_of_values():
    a, b = torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])
    found = difference([a], [b], "here")
    assert (found.max_abs, found.relative) == (0.5, 0.1)
    assert difference([a, b], [a, b], "here") == Difference(0, 0)
    assert difference([torch.ones(2)], [torch.zeros(2)], "here").relative == 2**0.5
    assert difference([], [], "here") == Difference(0, 0)
    assert difference([torch.ones(0)], [torch.ones(0)], "here") == Difference(0, 0)
    assert difference([torch.tensor([3 + 4j])], [torch.tensor([0j])], "here").max_abs == 5
    assert difference([torch.tensor([True, False])], [torch.tensor([True, True])], "here").max_abs == 1


def test_difference_is_taken_in_float64():
    one = torch.ones(1, dtype=torch.float16)
    assert difference([one + 2**-10], [one], "here").max_abs == 2**-10
    assert difference([torch.full((1,), 6e4).half()], [torch.full((1,), -6e4).half()], "here").max_abs == 2 * 6e4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value):
    bad, good = torch.tensor([1.0, value]), torch.tensor([1.0, 2.0])
    assert difference([bad], [bad.clone()], "here") == Difference(0, 0)
    for outputs, reference in ((bad, good), (good, bad), (-bad if value == value else good, bad)):
        with pytest.raises(VerificationError, match=r"^here: output 0 "):
            difference([outputs], [reference], "here")


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        ([torch.ones(2)], [torch.ones(2)] * 2, "here: 1 output tensors instead of 2"),
        ([torch.ones(2, 1)], [torch.ones(2)], "here: output 0 is torch.float32[2, 1] instead of torch.float32[2]"),
        (
            [torch.ones(2), torch.ones(2).double()],
            [torch.ones(2), torch.ones(2)],
            "here: output 1 is torch.float64[2] instead of torch.float32[2]",
        ),
    ],
)
def test_difference_compares_counts_shapes_and_dtypes_first(found, wanted, message):
    with pytest.raises(VerificationError) as caught:
        difference(found, wanted, "here")
    assert str(caught.value) == message


def test_large_outputs_are_compared_to_the_last_entry():
    b = torch.ones(3, 2**19 + 1)
    a = b.clone()
    a[-1, -1] = 3
    found = difference([a], [b], "here")
    assert found.max_abs == 2
    assert found.relative == pytest.approx((4 / b.numel()) ** 0.5, rel=1e-12)
    a[-1, -1] = torch.nan
    with pytest.raises(VerificationError, match="NaN"):
        difference([a], [b], "here")
