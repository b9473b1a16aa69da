"""What configures a module."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from fxlrd.layers.kinds import BATCH_NORMS, CONVS, LAYERS, OPTIONS, TRANSPOSED, kernel_options, make, options

EXAMPLES = [
    nn.Linear(3, 5),
    nn.Linear(3, 5, bias=False),
    *(conv(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect") for conv in CONVS),
    nn.Conv2d(4, 6, (1, 3), padding="same", bias=False),
    *(conv(4, 6, 3, stride=2, output_padding=1, groups=2, bias=False) for conv in TRANSPOSED),
    *(norm(4, eps=0.1, momentum=None) for norm in BATCH_NORMS),
    nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    nn.PReLU(3),
    nn.Identity(),
]


@pytest.mark.parametrize("module", EXAMPLES, ids=str)
def test_options_make_the_same_module(module):
    state = torch.get_rng_state()
    new = make(type(module), options(module))
    assert torch.equal(torch.get_rng_state(), state)
    assert options(new) == options(module)
    assert repr(new) == repr(module)
    wanted = {name: t.shape for name, t in module.state_dict().items()}
    assert {name: t.shape for name, t in new.state_dict().items()} == wanted
    assert all(t.is_meta for t in new.state_dict().values())


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_are_all_arguments_of_the_constructor(kind):
    arguments = set(inspect.signature(kind).parameters) - {"self", "device", "dtype", "args", "kwargs", "init"}
    assert set(OPTIONS[kind]) | {"bias"} == arguments | {"bias"}  # a BatchNorm has bias in newer versions of torch


def test_a_norm_without_bias():
    norm = nn.BatchNorm1d(3)
    norm.register_parameter("bias", None)
    assert make(nn.BatchNorm1d, options(norm)).bias is None
    assert make(nn.BatchNorm1d, options(norm)).weight is not None


def test_the_options_of_a_subclass_are_those_of_its_stock_class():
    class Mine(nn.Linear):
        pass

    assert options(Mine(3, 5)) == options(nn.Linear(3, 5))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind is not nn.Linear])
def test_the_kernels_options_are_all_that_no_channel_count_sets(kind):
    conv = kind(4, 6, 3, stride=2)
    rest = {"in_channels": 2, "out_channels": 3, "groups": 1, "bias": False}
    assert options(make(kind, kernel_options(conv) | rest)) == options(conv) | rest
