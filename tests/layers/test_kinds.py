"""What configures a module."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from fxlrd.layers.kinds import (
    BATCH_NORMS,
    CONVS,
    LAYERS,
    OPTIONS,
    TRANSPOSED,
    is_stock,
    kernel_options,
    kernel_text,
    make,
    op,
    options,
)

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


class Helper:
    """A mixin without anything that layers have."""

    def helper(self):
        return 3


@pytest.mark.parametrize(
    ("attributes", "stock"),
    [
        ({"__init__": lambda self: None, "reset_parameters": lambda self: None}, True),
        ({"__constants__": ["in_features"], "__doc__": "A layer.", "own": 3, "helper": lambda self: 3}, True),
        ({"forward": lambda self, x: x}, False),
        ({"__getattr__": lambda self, name: None}, False),
        ({"train": lambda self, mode: self}, False),
        ({"__call__": property(lambda self: None)}, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),
)
@pytest.mark.parametrize("mixin", [(), (Helper,)], ids=["", "mixin"])
def test_a_subclass_is_stock_unless_it_redefines_a_method(attributes, stock, mixin):
    kind = type("Own", (*mixin, nn.Linear), attributes)
    assert is_stock(kind.__new__(kind)) is stock
    further = type("Further", (kind,), {})
    assert is_stock(further.__new__(further)) is stock


@pytest.mark.parametrize("kind", LAYERS)
def test_stock_types_are_stock(kind):
    assert is_stock(kind.__new__(kind))


def test_kernels_and_types_as_text():
    assert kernel_text(nn.Conv2d(2, 2, (3, 5))) == "3×5"
    assert kernel_text(nn.Linear(2, 2)) == "1×1"
    assert (op(nn.Conv2d(2, 2, 1)), op(nn.Linear(2, 2))) == ("Conv2d", "Linear")
    assert kernel_text(nn.ConvTranspose1d(2, 2, 5)) == "5"
    assert op(nn.ConvTranspose1d(2, 2, 5)) == "ConvTranspose1d"
