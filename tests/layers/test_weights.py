"""The weight of a layer, and layers with other weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxlrd.layers.kinds import TRANSPOSED
from fxlrd.layers.weights import from_blocks, resized, weight_blocks
from tests.support.layers import convs, linears


@settings(deadline=None)
@given(st.one_of(convs(), linears()))
def test_a_layer_of_the_same_size_is_the_same(module):
    bias = None if module.bias is None else module.bias.detach()
    new = resized(module, from_blocks(module, weight_blocks(module)), bias)
    assert repr(new) == repr(module)
    assert torch.equal(new.weight, module.weight)
    assert new.weight.is_contiguous() == module.weight.is_contiguous()


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_a_transposed_layer_takes_the_size_of_its_weight(kind):
    like = kind(8, 12, 3, stride=2, groups=2, output_padding=1)
    new = resized(like, torch.randn(6, 5, *like.kernel_size), None, groups=3)
    assert (new.in_channels, new.out_channels, new.groups) == (6, 15, 3)
    assert (new.stride, new.output_padding) == (like.stride, like.output_padding)
