from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd.layers.compose import (
    affine,
    composed,
    fold_inputs,
    keep_channels,
    keep_outputs,
    scaled,
    takes_shift,
    weight_by_channel,
    why_not_composable,
)
from tests.support.tensors import assert_close


def filled(module: nn.Module) -> nn.Module:
    """Return the module in float64 and eval mode, with statistics that do something."""
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        module.running_mean.uniform_(-1, 1)
        module.running_var.uniform_(0.5, 2)
        if module.affine:
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.uniform_(-1, 1)
    return module.double().eval()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(6, eps=0.1)])
def test_a_norm_is_affine(norm):
    g, h = affine(filled(norm))
    x = torch.randn(5, 6).double()
    assert_close(x * g + h, norm(x))


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_takes_in_a_norm(bias):
    x = torch.randn(2, 4, 7, 7).double()
    conv, norm = filled(nn.Conv2d(4, 6, 3, 2, 1, bias=bias)), filled(nn.BatchNorm2d(6))
    assert_close(scaled(conv, *affine(norm))(x), norm(conv(x)))
    linear, norm = filled(nn.Linear(7, 6, bias=bias)), filled(nn.BatchNorm1d(6))
    assert_close(scaled(linear, *affine(norm))(x[0, 0]), norm(linear(x[0, 0])))


CONVS = [
    (nn.Conv2d(4, 9, 1), nn.Conv2d(9, 5, 1)),
    (nn.Conv2d(4, 9, 1, 2, 1), nn.Conv2d(9, 5, 1, 3, bias=False)),
    (nn.Conv2d(4, 9, 1, bias=False), nn.Conv2d(9, 5, 1, bias=False)),
    (nn.Conv2d(4, 9, (3, 5), 2, 1, 2), nn.Conv2d(9, 5, 1, 2)),
    (nn.Conv2d(4, 9, 3, padding=1, padding_mode="reflect"), nn.Conv2d(9, 5, 1)),
    (nn.Conv2d(4, 9, 1, bias=False), nn.Conv2d(9, 5, (3, 5), (2, 1), (1, 2), 2)),
    (nn.Conv2d(4, 9, 1), nn.Conv2d(9, 5, 3)),
    (nn.Conv2d(4, 9, 1), nn.Conv2d(9, 5, 3, padding=1, padding_mode="replicate")),
    (nn.Linear(11, 9), nn.Linear(9, 5)),
    (nn.Linear(11, 9, bias=False), nn.Linear(9, 5, bias=False)),
]


@pytest.mark.parametrize("pair", CONVS)
def test_two_layers_are_one(pair):
    first, second = map(filled, pair)
    x = torch.randn(2, 4, 13, 11).double()
    assert why_not_composable(first, second, first.bias is not None) is None
    both = composed(first, second)
    assert_close(both(x), second(first(x)))
    assert type(both) is type(second)
    assert (both.bias is None) == (first.bias is None and second.bias is None)
    assert not both.training


def test_a_zero_bias_does_not_stop_at_the_border():
    first, second = filled(nn.Conv2d(4, 9, 1)), filled(nn.Conv2d(9, 5, 3, padding=1))
    assert why_not_composable(first, second, shift=True).code == "border"
    assert why_not_composable(first, second, shift=False) is None
    first.bias.data.zero_()
    x = torch.randn(2, 4, 6, 6).double()
    assert_close(composed(first, second)(x), second(first(x)))


@pytest.mark.parametrize("module", [nn.Conv2d(4, 9, 3, 2, 1), nn.Conv2d(4, 9, 1, bias=False), nn.Linear(8, 9)])
def test_outputs_are_kept(module):
    kept, x = torch.tensor([0, 3, 8]), torch.randn(2, 4, 8, 8).double()
    out = filled(module)(x)
    new = keep_outputs(module, kept)(x)
    assert_close(new, out[..., kept] if isinstance(module, nn.Linear) else out[:, kept])


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(9),
        nn.BatchNorm2d(9, affine=False),
        nn.BatchNorm2d(9, eps=0.3, momentum=None),
        nn.Conv2d(9, 9, 3, 2, 1, groups=9),
        nn.Conv2d(9, 9, 3, groups=9, bias=False),
        nn.PReLU(9),
        nn.PReLU(),
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_channels_are_kept(module, count):
    kept, x = torch.arange(count) * 2, torch.randn(2, 9, 6, 6).double()
    module = filled(module)
    if isinstance(module, nn.PReLU):
        module.weight.data.uniform_(0, 1)
    new = keep_channels(module, kept, 9)
    assert_close(new(x[:, kept]), module(x)[:, kept])
    assert type(new) is type(module)
    assert not new.training
    if isinstance(module, nn.BatchNorm2d):
        assert (new.eps, new.momentum, new.affine) == (module.eps, module.momentum, module.affine)
        assert set(new.state_dict()) == set(module.state_dict())
        new.train()(x[:, kept])
        assert new.num_batches_tracked == 1
        assert module.num_batches_tracked == 0


def unbiased(norm):
    """As BatchNorm2d(bias=False), which older versions of torch do not know."""
    norm.register_parameter("bias", None)
    return norm


def test_norms_without_a_bias_are_kept():
    module, kept, x = unbiased(filled(nn.BatchNorm2d(9))), torch.tensor([1, 5]), torch.randn(2, 9, 6, 6).double()
    new = keep_channels(module, kept, 9)
    assert new.bias is None
    assert_close(new(x[:, kept]), module(x)[:, kept])


def test_norms_without_statistics_are_kept():
    module = nn.BatchNorm2d(9, track_running_stats=False).double()
    x, kept = torch.randn(2, 9, 6, 6).double(), torch.tensor([1, 5])
    assert_close(keep_channels(module, kept, 9)(x[:, kept]), module(x)[:, kept])


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("module", [nn.Conv2d(12, 5, 3, 2, 1), nn.Conv2d(12, 5, 1, bias=False), nn.Linear(12, 5)])
def test_an_interpolation_is_folded_in(module, block):
    matrix = torch.randn(12 // block, 2).double()
    x = torch.randn(3, 2 * block, 5, 5).double()
    x = x.movedim(1, -1) if isinstance(module, nn.Linear) else x
    axis = -1 if isinstance(module, nn.Linear) else 1
    full = torch.einsum("...rb,cr->...cb", x.movedim(axis, -1).unflatten(-1, (2, block)), matrix)
    expected = filled(module)(full.flatten(-2).movedim(-1, axis))
    assert_close(fold_inputs(module, matrix, block)(x), expected)


@pytest.mark.parametrize(
    ("module", "block"),
    [
        (nn.Linear(12, 7), 3),
        (nn.Conv2d(4, 7, 3), 1),
        (nn.Conv2d(4, 7, 3, padding=1, padding_mode="reflect"), 1),
    ],
)
def test_a_constant_goes_into_the_bias(module, block):
    module, matrix, shift = module.double(), torch.randn(4, 2).double(), torch.randn(4).double()
    x = torch.randn(5, 2, *([5, 5] if isinstance(module, nn.Conv2d) else [block])).double()
    rebuilt = torch.einsum("nr...,cr->nc...", x, matrix) + shift.view(-1, *[1] * (x.dim() - 2))
    assert takes_shift(module)
    flat = (lambda t: t.flatten(1)) if isinstance(module, nn.Linear) else (lambda t: t)
    assert_close(fold_inputs(module, matrix, block, shift)(flat(x)), module(flat(rebuilt)))


def test_no_constant_goes_into_a_border_of_zeros_nor_into_a_layer_without_bias():
    assert not takes_shift(nn.Conv2d(4, 7, 3, padding=1))
    assert not takes_shift(nn.Conv2d(4, 7, 3, padding="same"))
    assert not takes_shift(nn.Conv2d(4, 7, 3, bias=False))
    assert takes_shift(nn.Conv2d(4, 7, 1, padding="same"))


@pytest.mark.parametrize("block", [1, 3])
def test_importance_is_what_the_weights_make_of_a_channel(block):
    conv = nn.Conv2d(6, 5, 3).double()
    w = conv.weight.detach().flatten(2).permute(0, 2, 1).flatten(0, 1)  # outputs and positions by inputs
    f = weight_by_channel(conv)
    assert_close(f.mT @ f, w.mT @ w)
    linear = nn.Linear(6, 5).double()
    x = torch.randn(6 // block).double()
    energy = sum(
        linear.weight[:, i::block].detach().mv(x).square().sum() for i in range(block)
    )  # the same x at each place of the block
    assert_close((weight_by_channel(linear, block) @ x).square().sum(), energy)


@pytest.mark.parametrize(("outputs", "rank"), [(5, 5), (5, 2), (9, 9), (9, 3)])
def test_importance_weighs_the_outputs_also_where_some_matter_nothing(outputs, rank):
    linear = nn.Linear(6, outputs).double()
    rows = torch.randn(rank, outputs).double()
    f = weight_by_channel(linear, importance=rows.mT @ rows)
    assert len(f) <= 6
    made = rows @ linear.weight.detach()
    assert_close(f.mT @ f, made.mT @ made)


def test_nothing_is_changed_and_dtype_stays():
    conv = nn.Conv2d(4, 9, 1).to(torch.bfloat16).to(memory_format=torch.channels_last)
    before = conv.weight.clone()
    new = [
        keep_outputs(conv, torch.tensor([1, 2])),
        fold_inputs(conv, torch.randn(4, 2)),
        composed(conv, nn.Conv2d(9, 3, 1).to(torch.bfloat16)),
        scaled(conv, torch.rand(9), torch.rand(9)),
    ]
    assert all(m.weight.dtype == m.bias.dtype == torch.bfloat16 for m in new)
    assert torch.equal(conv.weight, before)
    assert all(m.training for m in new)


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (nn.Linear(4, 4), nn.Linear(4, 4), None),
        (nn.Conv2d(4, 4, 1), nn.Linear(4, 4), "conv-linear"),
        (nn.Linear(4, 4), nn.Conv2d(4, 4, 1), "conv-linear"),
        (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2), "grouped"),
        (nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 1), None),
        (nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 1, stride=2), "same-padding"),
        (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, stride=2), None),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, padding=1), "own-padding"),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), "larger-kernel"),
        (nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 3), "own-stride"),
        (nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 3), "own-stride"),
        (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), "border"),
        (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), None),
        (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), None),
    ],
)
def test_which_layers_are_one(first, second, code):
    reason = why_not_composable(first, second, shift=True)
    assert (reason and reason.code) == code
