"""A model changed in place: weights go as layers are decomposed, and come back if anything fails afterwards."""

from __future__ import annotations

import copy
import weakref
from unittest import mock

import pytest
import torch
from torch import nn

from fxlrd import VerificationError
from fxlrd.layers.build import decomposed
from tests.support.compression import quick
from tests.support.models import classifier
from tests.support.tensors import images


def image() -> torch.Tensor:
    return images(2, dtype=torch.float32)


def weights_left(model: nn.Module, **options):
    """Return, for each layer when it is decomposed, how many of the original weights before it are in memory."""
    weights = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][1:]
    left = []

    def noting(*arguments):
        left.append(sum(each() is not None for each in weights[: len(left)]))
        return decomposed(*arguments)

    with mock.patch("fxlrd.passes.decompose.decomposed", noting):
        quick(model, image(), inplace=True, **options)
    return left


def test_each_weight_goes_as_its_layer_is_decomposed():
    assert weights_left(nn.Sequential(*classifier(), nn.Linear(20, 64), nn.Linear(64, 64))) == [0, 0, 0, 0]


def test_weights_stay_while_later_passes_or_timings_read_them():
    assert weights_left(nn.Sequential(*classifier()), pipeline="decompose,freeze")[1:] == [1]


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_result_is_that_of_a_copy(channels_last):
    model = classifier()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    expected = quick(copy.deepcopy(model), image(), inplace=True, pipeline="decompose{ratio=2},decompose{ratio=2}")
    result = quick(model, image(), inplace=True, ratio=2.0)
    assert result.model is model
    assert result.report.to_dict()["layers"] == expected.report.to_dict()["layers"]
    for (name, weight), other in zip(model.state_dict().items(), expected.model.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
        assert weight.device.type == "cpu"


@pytest.mark.parametrize("error", [KeyboardInterrupt, VerificationError("no")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_come_back_if_something_fails(error, dtype):
    model = classifier().to(dtype).to(memory_format=torch.channels_last)
    model[7].bias.requires_grad_(False)
    before, strides = copy.deepcopy(model.state_dict()), [p.stride() for p in model.parameters()]
    held = model[3].weight
    with (
        mock.patch("fxlrd.installation._checked", side_effect=error),
        pytest.raises((KeyboardInterrupt, VerificationError)),
    ):
        quick(model, image().to(dtype), inplace=True, ratio=2.0)
    assert model[3].weight is held
    assert not model[7].bias.requires_grad
    assert model[7].weight.requires_grad
    assert [p.stride() for p in model.parameters()] == strides
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_weight_that_somebody_holds_or_that_is_a_part_of_a_tensor_is_not_touched():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    both = torch.randn(2, 64, 64)
    model[2].weight = nn.Parameter(both[0])
    model[4].weight.grad = torch.ones(64, 64)
    held, before = [m.weight for m in (model[0], model[2], model[4])], [m.weight.clone() for m in model[::2]]
    quick(model, torch.randn(2, 64), inplace=True, ratio=2.0)
    assert all(torch.equal(weight, value) for weight, value in zip(held, before, strict=True))


def test_a_full_disk_leaves_the_weights_in_memory():
    model = classifier()
    with mock.patch("fxlrd.graph.originals._write", side_effect=OSError("no space left")):
        quick(model, image(), inplace=True, ratio=2.0)
    assert hasattr(model[3], "first")
    assert all(not p.is_meta for p in model.parameters())
