"""The error of a form by output channel, and full rank by channel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd.layers.build import decomposed
from fxlrd.layers.channels import channel_error
from fxlrd.layers.fit import Fit
from fxlrd.layers.forms import full_ranks
from fxlrd.layers.kinds import TRANSPOSED

LAYERS = [
    lambda: nn.Linear(32, 32),
    lambda: nn.Linear(20, 32),
    lambda: nn.Linear(32, 20),
    lambda: nn.Conv1d(12, 16, 3),
    lambda: nn.Conv2d(16, 12, 3, groups=2),
    lambda: nn.Conv2d(16, 12, 1),
    lambda: nn.ConvTranspose2d(12, 16, 3),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_rank_retains_channels_of_all_sizes(make, dims, dtype):
    torch.manual_seed(0)
    layer = make().to(dtype)
    with torch.no_grad():
        for dim in dims:
            layer.weight.select(dim, 3).mul_(1e6)
            layer.weight.select(dim, 2).mul_(1e-5)
            layer.weight.select(dim, 1).zero_()
    factors, _ = decomposed(layer, full_ranks(layer))
    assert channel_error(layer, factors) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("fitted", [False, True])
def test_the_worst_channel_is_that_of_the_outputs(make, fitted):
    torch.manual_seed(0)
    layer = make().double()
    with torch.no_grad():
        layer.weight[: len(layer.weight) // 2] *= 3
    full = full_ranks(layer)
    factors, _ = decomposed(layer, tuple(max(1, r // 2) for r in full))
    convolved, channels = layer.weight.dim() > 2, layer.weight.shape[isinstance(layer, TRANSPOSED) ^ 1]
    channels *= getattr(layer, "groups", 1)
    root = torch.randn(channels, channels).double() if fitted else torch.eye(channels).double()
    # One impulse for each direction of the input: their outputs are the columns of the weight.
    x = root.T.clone()
    if convolved:
        spatial = layer.weight.dim() - 2
        x = nn.functional.pad(x.view(channels, channels, *(1,) * spatial), (2, 2) * spatial)
    zero = torch.zeros_like(x)
    want, got = (f(x) - f(zero) for f in (layer, factors))
    axes = [i for i in range(want.dim()) if i != 1]
    error = ((got - want).square().sum(axes) / want.square().sum(axes)).sqrt().max().item()
    fit = Fit(root @ root.T, torch.zeros(channels).double()) if fitted else None
    assert channel_error(layer, factors, fit) == pytest.approx(error, rel=1e-9)


def test_patches_count_where_they_were_measured():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3).double()
    factors, _ = decomposed(layer, (4, 4))
    covariance, mean = torch.eye(8).double(), torch.zeros(8).double()
    plain = channel_error(layer, factors)
    fit = Fit(covariance, mean, patch_covariance=torch.eye(72).double(), patch_mean=torch.zeros(72).double())
    assert channel_error(layer, factors, fit) == pytest.approx(plain, rel=1e-12)


def test_a_large_channel_before_a_norm_does_not_hide_the_others():
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32)), torch.randn(512, 32)
    with torch.no_grad():
        model[0].weight[3] *= 1e6
        model.train()(x)
    model[1].momentum = None
    model[1].reset_running_stats()
    with torch.no_grad():
        want = model(x), model.eval()(x)
    full, half = (fxlrd.compress(model, x, pipeline=f"decompose{{ranks={rank}}}", measure=False) for rank in (32, 16))
    assert ((full.model(x) - want[1]).norm() / want[1].norm()).item() < 1e-5
    assert full.report.layers[0]["channel_error"] < 1e-6
    row = half.report.layers[0]
    assert row["error"] < 1e-5
    assert row["channel_error"] > 0.1
    assert f"{row['channel_error']:.3g}" in half.report.to_table()
