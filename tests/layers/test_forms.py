"""Ranks of a layer's form."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxlrd.errors import FxlrdError, Reason
from fxlrd.layers.forms import explicit_ranks, parameters, ranks_by_ratio, ranks_text


@pytest.mark.parametrize(
    ("module", "ratio", "code"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), 2, "depthwise"),
        (nn.Conv2d(8, 16, 3, groups=8), 2, "depthwise"),
        (nn.Conv2d(3, 64, 7), 100, "too-narrow"),
        (nn.Linear(8, 8), 5, "too-narrow"),
        (nn.Linear(512, 1), 2, "too-narrow"),
        (nn.Conv2d(16, 16, 1, groups=4), 4, "too-narrow"),
    ],
)
def test_reasons_for_no_ranks(module, ratio, code):
    assert ranks_by_ratio(module, ratio).code == code


@pytest.mark.parametrize(
    ("module", "ratio", "ranks"),
    [
        (nn.Linear(2048, 1000), 2, (335,)),
        (nn.Conv2d(64, 256, 1), 2, (25,)),
        (nn.Conv2d(512, 512, 3), 2, (309, 309)),
        (nn.Conv2d(128, 128, 3, groups=2), 2, (38, 38)),
        # r1 of eq. (7) is above the thinner mode: only the other one is cut.
        (nn.Conv2d(128, 32, 3), 2, (44, None)),
        (nn.Conv2d(32, 128, 3), 2, (None, 44)),
        (nn.ConvTranspose2d(32, 128, 3), 2, (None, 44)),
        (nn.Conv3d(512, 512, (1, 3, 3)), 2, (309, 309)),
        (nn.Conv1d(64, 256, 1), 2, (25,)),
    ],
)
def test_ranks_by_ratio(module, ratio, ranks):
    assert ranks_by_ratio(module, ratio) == ranks


@settings(deadline=None)
@given(
    st.integers(1, 256),
    st.integers(1, 256),
    st.sampled_from([1, 3, (1, 3)]),
    st.integers(17, 80).map(lambda sixteenths: sixteenths / 16),
    st.sampled_from([0.5, 1, 2]),
)
def test_ranks_by_ratio_meet_the_ratio(c_in, c_out, kernel, ratio, beta):
    conv = nn.Conv2d(c_in, c_out, kernel, device="meta")
    ranks = ranks_by_ratio(conv, ratio, beta)
    if isinstance(ranks, Reason):
        assert (ranks.code == "ratio-too-large") == (min(c_in, c_out) >= 16)
        return
    assert parameters(conv, ranks) * ratio <= conv.weight.numel()
    tops = (min(c_in, c_out),) if conv.kernel_size == (1, 1) else (c_in, c_out)
    assert all(r is None or 1 <= r < top for r, top in zip(ranks, tops, strict=True))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(64, 64),
        nn.Linear(64, 50),
        nn.Conv2d(64, 50, 1),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(61, 47, 3),
        nn.Conv2d(64, 96, (1, 3), groups=2),
    ],
    ids=str,
)
def test_a_ratio_out_of_reach_of_a_wide_layer_names_one_that_works(module, beta):
    reason = ranks_by_ratio(module, 5000, beta)
    assert reason.code == "ratio-too-large"
    assert "ratio=5000" in reason.text
    assert "\n" not in str(reason)
    largest = float(re.search(r"at most ([0-9.e+]+),", reason.remedy)[1])
    assert isinstance(ranks_by_ratio(module, largest, beta), tuple)


@pytest.mark.parametrize(
    ("module", "given", "ranks"),
    [
        (nn.Linear(8, 12), 5, (5,)),
        (nn.Linear(8, 12), 500, (8,)),
        (nn.Conv2d(8, 12, 3), 5, (5, 5)),
        (nn.Conv2d(8, 12, 3), 10, (8, 10)),
        (nn.Conv2d(8, 12, 3), (None, 4), (None, 4)),
        (nn.Conv2d(8, 12, 3, groups=2), [9, 9], (4, 6)),
    ],
)
def test_explicit_ranks(module, given, ranks):
    assert explicit_ranks(module, given) == ranks


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (nn.Linear(8, 12), 0),
        (nn.Linear(8, 12), -1),
        (nn.Linear(8, 12), 2.5),
        (nn.Linear(8, 12), (2.5,)),
        (nn.Linear(8, 12), (None,)),
        (nn.Linear(8, 12), (4, 4)),
        (nn.Linear(8, 12), "4"),
        (nn.Conv2d(8, 12, 3), (4,)),
        (nn.Conv2d(8, 12, 3), (4, 0)),
        (nn.Conv2d(8, 12, 3), (None, None)),
    ],
)
def test_bad_explicit_ranks(module, given):
    with pytest.raises(FxlrdError, match=r"^ranks=") as caught:
        explicit_ranks(module, given)
    assert "\n" not in str(caught.value)


def test_ranks_as_text():
    assert ranks_text((204,)) == "204"
    assert ranks_text((None, 44)) == "-x44"
