"""A layer's form fitted to data."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from fxlrd.calibration.patches import patches
from fxlrd.factor.ridge import GRID, best_ridge
from fxlrd.factor.whiten import RIDGE
from fxlrd.layers.build import decomposed
from fxlrd.layers.fit import IMPORTANCE_RIDGE, Moments, Statistics, metrics, roots
from fxlrd.layers.forms import full_ranks
from fxlrd.layers.kinds import CONVS, Conv, channel_axis, channels_per_group, kernel_area, spatial_dims
from tests.support.layers import assert_same_outputs, described, rebuilt


def fitted_to(module, x, importance=None, by_patch=True):
    """What calibration on ``x`` alone would have the layer's factors fitted to."""
    read = x.movedim(channel_axis(module, x.dim()), -1).flatten(0, -2)
    saw = Statistics(Moments.empty(read.shape[1], x.device), None, importance)
    saw.input_moments.add(read)
    by_patch = by_patch and isinstance(module, CONVS) and kernel_area(module) > 1
    if by_patch and channels_per_group(module)[2] == 1:
        saw.patch_moments = Moments.empty(module.weight[0].numel(), x.device)
        saw.patch_moments.add(patches(module, x))
    return saw.fit(module)


def regularised(g, share):
    return g + torch.eye(len(g), dtype=g.dtype) * g.diagonal().mean() * share


def data(module, count=8):
    """Inputs whose channels depend on each other and have means."""
    shape = (count, *(9, 8, 5)[: spatial_dims(module)]) if isinstance(module, Conv) else (20 * count,)
    mixed = torch.randn(shape[0], *shape[1:], width(module)).double()
    mixed = mixed @ torch.randn(mixed.shape[-1], mixed.shape[-1]).double() * torch.logspace(0, -1, mixed.shape[-1]) + 1
    return mixed.movedim(-1, channel_axis(module, mixed.dim())).to(module.weight.dtype).contiguous()


def width(module):
    c_in, _, groups = channels_per_group(module)
    return c_in * groups


def double(make):
    return make().double()


def output_means(module, x):
    y = module(x).detach()
    made_by = module[-1] if isinstance(module, nn.Sequential) else module
    return y.movedim(channel_axis(made_by, y.dim()), -1).flatten(0, -2).mean(0)


FITTED = [
    pytest.param(lambda: nn.Linear(8, 12), (4,), id="linear"),
    pytest.param(lambda: nn.Linear(12, 8, bias=False), (3,), id="no bias"),
    pytest.param(lambda: nn.Conv2d(8, 12, 1), (4,), id="conv1x1"),
    pytest.param(lambda: nn.Conv2d(8, 12, 1, groups=2, bias=False), (2,), id="grouped conv1x1"),
    pytest.param(lambda: nn.Conv2d(8, 12, 3, padding=1), (4, 5), id="padded"),
    pytest.param(lambda: nn.Conv2d(8, 12, (3, 2), stride=2, padding=2, bias=False), (4, None), id="strided"),
    pytest.param(lambda: nn.Conv2d(8, 12, 3, padding="same", padding_mode="reflect"), (None, 3), id="reflect"),
    pytest.param(lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2, padding_mode="circular"), (2, 2), id="circular"),
    pytest.param(lambda: nn.Conv1d(8, 12, 3, padding=1), (4, 5), id="conv1d"),
    pytest.param(lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1, padding_mode="reflect"), (4, 5), id="strided conv1d"),
    pytest.param(lambda: nn.Conv3d(8, 12, (2, 3, 1), padding=1, dilation=(2, 1, 1)), (4, None), id="conv3d"),
    pytest.param(lambda: nn.Conv3d(8, 12, 1), (4,), id="conv1x1x1"),
]


@pytest.mark.parametrize(("make", "ranks"), FITTED)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_bias_keeps_the_mean_of_the_output(make, ranks, weighted):
    module = double(make)
    x = data(module)
    importance = torch.randn(20, 12).double().mT.cov() if weighted else None
    if importance is not None:
        importance = importance[: len(module.weight), : len(module.weight)]
    form, _ = decomposed(module, ranks, fit=fitted_to(module, x, importance))
    torch.testing.assert_close(output_means(form, x), output_means(module, x), rtol=0, atol=1e-10)
    plain, _ = decomposed(module, ranks)
    assert (output_means(plain, x) - output_means(module, x)).abs().max() > 1e-3
    assert form[-1].bias is not None
    assert all(part.bias is None for part in form[:-1])


def test_without_patches_the_mean_is_kept_where_there_is_no_padding():
    conv = nn.Conv2d(6, 8, 3, groups=2).double()
    x = data(conv)[..., :1, :1].expand(-1, -1, 9, 8)  # each image even, so that its border is like the rest
    form, _ = decomposed(conv, (2, 2), fit=fitted_to(conv, x, by_patch=False))
    torch.testing.assert_close(output_means(form, x), output_means(conv, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("make", "ranks"), FITTED)
def test_the_error_is_that_of_the_output_about_its_mean(make, ranks):
    module = double(make)
    x = data(module)
    fit = fitted_to(module, x)
    form, error = decomposed(module, ranks, fit=fit)
    change = (module.weight - rebuilt(module, form)).detach()
    # What is added to the variance of each number that is read, within its group.
    groups, positions = channels_per_group(module)[2], module(x).numel() / len(module.weight)
    covariance, ridge = fit.covariance, fit.ridge
    if fit.patch_covariance is not None:
        covariance, ridge = fit.patch_covariance, fit.patch_ridge
    variances = covariance.diagonal().unflatten(0, (groups, -1))
    more = ridge * variances + RIDGE * (1 + ridge) * variances.mean(1, keepdim=True)

    def size(outputs, weight):
        rows = weight.detach().flatten(1).unflatten(0, (groups, -1))
        added = torch.einsum("gsc,gc->", rows.square(), more) * positions
        centred = outputs.movedim(channel_axis(module, outputs.dim()), -1).flatten(0, -2)
        return (centred - centred.mean(0)).square().sum() + added

    found = (size((form(x) - module(x)).detach(), change) / size(module(x).detach(), module.weight)).sqrt().item()
    assert error == pytest.approx(found, rel=1e-8)
    plain, _ = decomposed(module, ranks)
    lost = (module.weight - rebuilt(module, plain)).detach()
    assert error < (size((plain(x) - module(x)).detach(), lost) / size(module(x).detach(), module.weight)).sqrt()


@pytest.mark.parametrize(("make", "ranks"), [p for p in FITTED if len(p.values[1]) == 1])
def test_the_error_is_weighted_by_what_matters(make, ranks):
    module = double(make)
    groups = channels_per_group(module)[2]
    importance = torch.randn(len(module.weight), 40).double().cov()
    fit = fitted_to(module, data(module), importance)
    form, error = decomposed(module, ranks, fit=fit)

    def size(weight):
        w = weight.detach().flatten(1).unflatten(0, (groups, -1))
        total = 0.0
        for i in range(groups):
            ins, outs = (slice(i * n, (i + 1) * n) for n in (w.shape[2], w.shape[1]))
            g = regularised(fit.regularised[ins, ins], RIDGE)
            gamma = regularised(importance[outs, outs], RIDGE + IMPORTANCE_RIDGE)
            total += torch.einsum("st,sc,cd,td->", gamma, w[i], g, w[i]).item()
        return total

    assert error == pytest.approx((size(module.weight - rebuilt(module, form)) / size(module.weight)) ** 0.5, rel=1e-9)


TRANSPOSED = [
    pytest.param(lambda: nn.ConvTranspose2d(8, 12, 2, stride=2), (4, 5), id="up"),
    pytest.param(lambda: nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2, bias=False), (2, None), id="grouped"),
    pytest.param(lambda: nn.ConvTranspose2d(8, 12, (1, 2), stride=(1, 2)), (None, 5), id="one side"),
    pytest.param(lambda: nn.ConvTranspose1d(8, 12, 1), (4,), id="up1d"),
    pytest.param(lambda: nn.ConvTranspose3d(8, 12, 1, stride=(1, 2, 3), output_padding=(0, 1, 2)), (4,), id="apart"),
]
"""No output is reached by two taps: what is predicted from channels alone is exact then."""


@pytest.mark.parametrize(("make", "ranks"), TRANSPOSED)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_transposed_conv_is_fitted_to_what_each_output_sees(make, ranks, weighted):
    module = double(make)
    x = data(module)
    importance = torch.randn(12, 40).double().cov() if weighted else None
    form, error = decomposed(module, ranks, fit=fitted_to(module, x, importance))
    torch.testing.assert_close(output_means(form, x), output_means(module, x), rtol=0, atol=1e-10)
    plain, worse = decomposed(module, ranks)
    assert (output_means(plain, x) - output_means(module, x)).abs().max() > 1e-3
    if weighted:
        return
    # About the mean of what is read, so that every tap's own mean is out of it; the ridge is a share of that.
    fit = fitted_to(module, x)
    axis = channel_axis(module, x.dim())
    centred = x - fit.mean.view(-1, *[1] * (x.dim() - axis - 1))
    groups = channels_per_group(module)[2]
    variances = fit.covariance.diagonal().unflatten(0, (groups, -1))
    more = fit.ridge * variances + RIDGE * (1 + fit.ridge) * variances.mean(1, keepdim=True)
    without = torch.zeros(12).double()

    def size(weight):
        with torch.no_grad():
            stand_in = copy.deepcopy(module)
            stand_in.weight.copy_(weight)
            stand_in.bias = nn.Parameter(without)
            squares = weight.unflatten(0, (groups, -1)).flatten(2).square().sum(2)
            added = (squares * more).sum() * (x.numel() / width(module))
            return stand_in(centred).square().sum() + added

    weight = module.weight.detach()
    found = (size(weight - rebuilt(module, form)) / size(weight)).sqrt().item()
    assert error == pytest.approx(found, rel=1e-8)
    assert found < (size(weight - rebuilt(module, plain)) / size(weight)).sqrt()
    assert worse > 0


def test_where_taps_overlap_a_transposed_conv_keeps_the_mean_all_the_same():
    # As many positions are made as read times the stride: each input reaches all of the kernel.
    conv = nn.ConvTranspose2d(6, 8, 3, stride=2, padding_mode="zeros").double()
    x = nn.functional.pad(data(conv, 64) - 1, (1, 1, 1, 1))  # nothing is cut off that is not zero
    form, _ = decomposed(conv, (3, 4), fit=fitted_to(conv, x))
    made, lost = conv(x), (form(x) - conv(x)).detach()
    scale = x[0, 0].numel() * 4 / made[0, 0].numel()
    added = form.last.bias.detach() - conv.bias.detach()
    torch.testing.assert_close(lost.mean((0, 2, 3)), added * (1 - scale), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("make", "ranks"), [*FITTED, *TRANSPOSED])
def test_at_full_rank_a_fit_changes_nothing(make, ranks):
    module = double(make)
    full, x = full_ranks(module), data(module)
    fit = fitted_to(module, x, torch.eye(module(x).shape[channel_axis(module, x.dim())]).double())
    form, error = decomposed(module, full, fit=fit)
    assert described(form) == described(decomposed(module, full)[0])
    assert error <= 1e-12
    assert_same_outputs(form(x), module(x), 1e-9)


@pytest.mark.parametrize("ranks", [(8, None), (None, 12)])
def test_one_mode_alone_at_full_rank_loses_nothing(ranks):
    conv = nn.Conv2d(8, 12, 3, padding=1).double()
    x = data(conv)
    form, error = decomposed(conv, ranks, fit=fitted_to(conv, x))
    assert error < 1e-7, "the square root of rounding"
    assert_same_outputs(form(x), conv(x), 1e-7)


@pytest.mark.usefixtures("without_ridge")
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("kernel", "ranks"), [(1, (2,)), (3, (2, 3)), ((1, 3), (None, 2))])
def test_each_group_is_fitted_alone(kind, kernel, ranks):
    conv = kind(8, 12, kernel, groups=2).double()
    x, importance = data(conv), torch.randn(12, 40).double().cov()
    form, _ = decomposed(conv, ranks, fit=fitted_to(conv, x, importance))
    for ins, outs in ((slice(4), slice(6)), (slice(4, 8), slice(6, 12))):
        alone = kind(4, 6, kernel).double()
        alone.weight.data = conv.weight.detach()[ins if alone.transposed else outs]
        alone.bias.data = conv.bias.detach()[outs]
        fit = fitted_to(alone, x[:, ins], importance[outs, outs], by_patch=False)
        wanted, _ = decomposed(alone, ranks, fit=fit)
        assert_same_outputs(form(x)[:, outs], wanted(x[:, ins]), 1e-9)


def test_the_roots_are_those_of_the_groups():
    conv = nn.Conv2d(6, 4, 1, groups=2).double()
    x, importance = data(conv), torch.randn(4, 40).double().cov()
    fit = fitted_to(conv, x, importance)
    reads, weights = roots(conv, fit)
    for i in range(2):
        ins, outs = slice(3 * i, 3 * i + 3), slice(2 * i, 2 * i + 2)
        wanted = regularised(fit.regularised[ins, ins], RIDGE)
        torch.testing.assert_close(reads.root[i] @ reads.root[i].mT, wanted, rtol=1e-10, atol=1e-10)
        wanted = regularised(importance[outs, outs], RIDGE + IMPORTANCE_RIDGE)
        torch.testing.assert_close(weights.root[i] @ weights.root[i].mT, wanted, rtol=1e-10, atol=1e-10)
    assert roots(conv, fit._replace(importance=None))[1] is None


@pytest.mark.parametrize(
    ("poor", "make", "ranks", "dtype", "importance"),
    [
        (torch.zeros_like, lambda: nn.Conv2d(8, 12, 1, groups=2, bias=False), (2,), torch.bfloat16, 1.0),
        (lambda x: x[:1], lambda: nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), (2, None), torch.float32, None),
        (lambda x: x * 1e6, lambda: nn.Conv2d(8, 12, 3, padding=1), (4, 5), torch.bfloat16, 0.0),
    ],
    ids=["zeros", "one sample", "huge"],
)
def test_poor_data_give_a_finite_form_of_moderate_size(poor, make, ranks, dtype, importance):
    """Three cases of what tests/factor/test_whiten.py proves for all poor data."""
    module = make().to(dtype)
    x = poor(data(module))
    _, c_out, groups = channels_per_group(module)
    gamma = None if importance is None else importance * torch.eye(c_out * groups)
    form, error = decomposed(module, ranks, fit=fitted_to(module, x, gamma))
    assert 0 <= error <= 1
    assert {p.dtype for p in form.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in form.parameters())
    weight = rebuilt(module, form).double()
    assert 0.05 * module.weight.double().norm() < weight.norm() < 20 * module.weight.double().norm()


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_new_bias_is_trained_if_the_weight_is(weight, bias):
    linear = nn.Linear(8, 12, bias).requires_grad_(weight)
    x = data(linear)
    before = {name: p.detach().clone() for name, p in linear.named_parameters()}
    form, _ = decomposed(linear, (4,), fit=fitted_to(linear, x))
    assert {p.requires_grad for p in form.parameters()} == {weight}
    assert all(torch.equal(p, before[name]) for name, p in linear.named_parameters())
    assert form.training


def test_factors_that_are_fitted_share_their_size():
    linear = nn.Linear(8, 12).double()
    form, _ = decomposed(linear, (4,), fit=fitted_to(linear, data(linear)))
    first, last = (torch.linalg.svdvals(part.weight.detach()) for part in form)
    torch.testing.assert_close(first, last, rtol=1e-9, atol=0)
    conv = nn.Conv2d(8, 12, 3).double()
    form, _ = decomposed(conv, (4, 5), fit=fitted_to(conv, data(conv)))
    for part, axis in ((form.first, 0), (form.last, 1)):
        flat = part.weight.detach()[..., 0, 0].movedim(axis, 0)
        torch.testing.assert_close(flat @ flat.mT, torch.eye(len(flat)).double(), rtol=0, atol=1e-12)


def test_moments_of_two_calls_are_those_of_all_positions():
    x = torch.randn(60, 12).double()
    a, b = (Moments.empty(12, x.device) for _ in range(2))
    a.add(x[:30])
    b.add(x[30:])
    both = a + b
    torch.testing.assert_close(both.second, x.mT @ x / 60)
    torch.testing.assert_close(both.mean, x.mean(0))
    rows = torch.cat([x[30 - a.held_out.count : 30], x[60 - b.held_out.count :]])
    assert both.held_out.count == len(rows) > 0
    assert torch.equal(both.held_out.rows, rows)


def test_the_ridge_is_that_which_predicts_the_rows_held_out_about_the_mean_of_the_others():
    x = torch.randn(24, 12).double() @ torch.randn(12, 12).double() + torch.linspace(5, 9, 12)
    moments = Moments.empty(12, x.device)
    moments.add(x)
    held = moments.held_out.count
    fitted, others = x[:-held], x[-held:]
    about = others - fitted.mean(0)
    expected = best_ridge(fitted.mT.cov(correction=0), about)
    with mock.patch("fxlrd.layers.fit.best_ridge", side_effect=best_ridge) as called:
        assert moments.ridge == expected
    covariance, rows = called.call_args.args
    torch.testing.assert_close(covariance, fitted.mT.cov(correction=0), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(rows, about, rtol=1e-11, atol=1e-11)


def test_one_position_says_least():
    x = torch.randn(1, 5).double()
    moments = Moments.empty(5, x.device)
    moments.add(x)
    assert moments.ridge == GRID[-1]
    torch.testing.assert_close(moments.second, x.mT @ x)
    torch.testing.assert_close(moments.mean, x[0])


def test_statistics_of_two_calls_drop_what_one_of_them_has_not():
    x, importance = torch.randn(10, 3).double(), torch.eye(4).double()
    moments = Moments.empty(3, x.device)
    moments.add(x)
    full, uncalled = Statistics(moments, moments, importance), Statistics(called=False)
    assert full + uncalled is full
    assert uncalled + full is full
    assert not (uncalled + uncalled).called
    twice = full + Statistics(moments, None, 2 * importance)
    assert twice.input_moments is moments  # of one tensor, which both calls read
    assert twice.patch_moments is None
    assert torch.equal(twice.importance, 3 * importance)
    assert (full + Statistics(moments)).importance is None
    other = Moments.empty(3, x.device)
    other.add(2 * x)
    assert (full + Statistics(other)).input_moments.count == 20


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_are_what_roots_are_the_roots_of(weighted):
    conv = nn.Conv2d(6, 4, 1, groups=2).double()
    fit = fitted_to(conv, data(conv), torch.randn(4, 40).double().cov() if weighted else None)
    for metric, factor in zip(metrics(conv, fit), roots(conv, fit), strict=True):
        assert (metric is None) == (factor is None)
        if metric is not None:
            torch.testing.assert_close(factor.root @ factor.root.mT, metric, rtol=1e-10, atol=1e-10)


def test_channels_that_are_always_the_same_need_no_ridge():
    generator = torch.Generator().manual_seed(0)
    jitter = torch.randint(0, 2, (400, 6), generator=generator) * torch.finfo(torch.float64).eps
    moments = Moments.empty(6, torch.device("cpu"))
    moments.add(torch.linspace(1, 2, 6, dtype=torch.float64) * (1 + jitter))
    assert moments.ridge == 0, "how they vary is rounding, which no fit is to follow"
