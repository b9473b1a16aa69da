"""A layer's form at some ranks, fitted to the weight."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxlrd.factor.svd import relative_error
from fxlrd.layers.build import decomposed, skeleton
from fxlrd.layers.forms import parameters
from fxlrd.layers.kinds import Conv
from fxlrd.layers.weights import resized
from tests.support.layers import (
    assert_same_outputs,
    channels_last,
    convs,
    described,
    image,
    linears,
    rebuilt,
    with_ranks,
)

# torch warns of its own way to pad an even kernel to the same size.
same_padding = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@same_padding
@settings(deadline=None, max_examples=300)
@given(with_ranks(convs(), full=True), st.booleans())
def test_conv_at_full_rank_gives_the_same_outputs(case, last):
    conv, ranks = case
    form, error = decomposed(conv, ranks)
    x = channels_last(image(conv)) if last else image(conv)
    assert error <= 1e-12
    assert_same_outputs(form(x), conv(x), 1e-9)
    assert_same_outputs(form(x[0]), conv(x[0]), 1e-9)


@settings(deadline=None)
@given(with_ranks(linears(), full=True), st.sampled_from([(), (3,), (2, 3), (2, 1, 3), (0,)]))
def test_linear_at_full_rank_gives_the_same_outputs(case, batch):
    linear, ranks = case
    form, error = decomposed(linear, ranks)
    x = torch.randn(*batch, linear.in_features, dtype=torch.float64)
    assert error <= 1e-12
    assert_same_outputs(form(x), linear(x), 1e-9)


@same_padding
@settings(deadline=None, max_examples=150)
@given(with_ranks(st.one_of(convs(), linears())), st.integers(1, 3))
def test_form_is_the_layer_with_the_rebuilt_weight(case, sweeps):
    module, ranks = case
    form, error = decomposed(module, ranks, sweeps)
    stand_in = copy.deepcopy(module)
    with torch.no_grad():
        stand_in.weight.copy_(rebuilt(module, form))
    x = image(module) if isinstance(module, Conv) else torch.randn(3, 2, module.in_features, dtype=torch.float64)
    assert_same_outputs(form(x), stand_in(x), 1e-9)
    assert error == pytest.approx(relative_error(module.weight, stand_in.weight), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(with_ranks(st.one_of(convs(), linears())))
def test_parameters_and_skeleton_are_those_of_the_form(case):
    module, ranks = case
    form, _ = decomposed(module, ranks)
    weights = [part.weight for part in form]
    assert parameters(module, ranks) == sum(w.numel() for w in weights)
    bare = skeleton(module, ranks)
    assert repr(bare) == repr(form)
    assert described(bare) == described(form)


def test_roles_and_the_place_of_stride_padding_and_bias():
    form, _ = decomposed(nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2), (2, 3))
    assert [name for name, _ in form.named_children()] == ["first", "core", "last"]
    assert (form.core.stride, form.core.padding, form.core.dilation) == ((2, 2), (1, 1), (2, 2))
    assert [part.bias is None for part in form] == [True, True, False]
    form, _ = decomposed(nn.Conv2d(6, 8, 1, stride=2), (2,))
    assert [name for name, _ in form.named_children()] == ["first", "last"]
    assert (form.first.stride, form.last.stride) == ((2, 2), (1, 1))
    assert [part.bias is None for part in form] == [True, False]
    form, _ = decomposed(nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (2, 3))
    assert [type(part) for part in form] == [nn.Conv2d, nn.ConvTranspose2d, nn.Conv2d]
    assert (form.core.stride, form.core.padding, form.core.output_padding) == ((2, 2), (1, 1), (1, 1))
    assert [part.bias is None for part in form] == [True, True, False]
    form, _ = decomposed(nn.ConvTranspose1d(6, 8, 1, stride=2, output_padding=1), (2,))
    assert [type(part) for part in form] == [nn.Conv1d, nn.ConvTranspose1d]
    assert (form.first.stride, form.last.stride, form.last.output_padding) == ((1,), (2,), (1,))
    form, _ = decomposed(nn.Conv2d(6, 8, 3), (None, 3))
    assert [name for name, _ in form.named_children()] == ["core", "last"]
    form, _ = decomposed(nn.Conv2d(6, 8, 3), (2, None))
    assert [name for name, _ in form.named_children()] == ["first", "core"]
    assert [part.bias is None for part in form] == [True, False]


MODULES = [
    pytest.param(lambda: nn.Conv2d(8, 12, 3, padding=1), (4, 5), id="tucker2"),
    pytest.param(lambda: nn.Conv2d(8, 12, 3, groups=2), (2, None), id="grouped"),
    pytest.param(lambda: nn.Conv2d(8, 12, 1), (4,), id="conv1x1"),
    pytest.param(lambda: nn.Linear(8, 12), (4,), id="linear"),
    pytest.param(lambda: nn.Conv1d(8, 12, 3, stride=2), (4, 5), id="conv1d"),
    pytest.param(lambda: nn.Conv3d(8, 12, (1, 3, 3)), (None, 5), id="conv3d"),
    pytest.param(lambda: nn.ConvTranspose2d(8, 12, 2, stride=2), (4, 5), id="transposed"),
    pytest.param(lambda: nn.ConvTranspose1d(8, 12, 1, groups=2), (3,), id="transposed1x1"),
]


@pytest.mark.parametrize(("make", "ranks"), MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_carried(make, ranks, dtype):
    module = make().to(dtype)
    for form in (decomposed(module, ranks)[0], skeleton(module, ranks)):
        assert {p.dtype for p in form.parameters()} == {dtype}


@pytest.mark.parametrize(("make", "ranks"), MODULES)
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
def test_requires_grad_is_carried(make, ranks, weight, bias):
    module = make()
    module.weight.requires_grad_(weight)
    module.bias.requires_grad_(bias)
    form, _ = decomposed(module, ranks)
    assert {part.weight.requires_grad for part in form} == {weight}
    assert form[-1].bias.requires_grad is bias


@pytest.mark.parametrize(("make", "ranks"), MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_train_flag_is_carried(make, ranks, training):
    form, _ = decomposed(make().train(training), ranks)
    assert {m.training for m in form.modules()} == {training}


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        (nn.Conv2d, torch.channels_last),
        (nn.ConvTranspose2d, torch.channels_last),
        (nn.Conv3d, torch.channels_last_3d),
        (nn.ConvTranspose3d, torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_memory_format_is_carried(kind, last, is_last):
    memory_format = last if is_last else torch.contiguous_format
    conv = kind(8, 12, 3).to(memory_format=memory_format)
    for form in (decomposed(conv, (4, 5))[0], skeleton(conv, (4, 5))):
        assert all(part.weight.is_contiguous(memory_format=memory_format) for part in form)
        assert form.core.weight.is_contiguous() != is_last
    again = resized(conv, conv.weight.detach().clone(memory_format=torch.contiguous_format), None)
    assert again.weight.is_contiguous() != is_last


@pytest.mark.parametrize(("make", "ranks"), MODULES)
def test_random_state_and_layer_are_left_alone(make, ranks):
    module = make()
    state = torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    form, _ = decomposed(module, ranks)
    skeleton(module, ranks)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for p in form.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_gradient_reaches_every_factor():
    form, _ = decomposed(nn.Conv2d(8, 12, 3), (4, 5))
    form(torch.randn(1, 8, 5, 5)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in form.parameters())
