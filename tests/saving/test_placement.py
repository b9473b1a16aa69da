"""Which tensor goes where, and that it is put there as it was saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd.errors import FxlrdError
from fxlrd.saving.placement import Placement, Slots, place, put
from fxlrd.saving.schema import TensorTable
from fxlrd.saving.tensors import attributes, contiguous_strides, is_dense, parents, registered

CPU, META = torch.device("cpu"), torch.device("meta")
SHAPES = {"a.weight": [2, 3], "a.bias": [2], "n.running_mean": [4]}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.n = nn.Module()
        self.n.register_buffer("running_mean", torch.zeros(4))
        self.n.plain = torch.zeros(5)


def slots(model, devices=None):
    return Slots(registered(model), dict(attributes(model)), {}, devices or {})


def table(same=None, strides=None, frozen=(), optional=()):
    return TensorTable(same or {}, strides or {}, tuple(frozen), tuple(optional))


def test_each_tensor_has_a_place():
    placements = place(SHAPES, slots(Small()), table(strides={"a.weight": (1, 2)}, frozen=["a.bias"]))
    assert placements == {
        "a.weight": Placement(("a.weight",), CPU, (1, 2), requires_grad=True),
        "a.bias": Placement(("a.bias",), CPU, None, requires_grad=False),
        "n.running_mean": Placement(("n.running_mean",), CPU, None, requires_grad=None),
    }


def test_an_attribute_gets_a_tensor_if_there_is_one():
    placements = place({**SHAPES, "n.plain": [5]}, slots(Small()), table(optional=["n.plain"]))
    assert placements["n.plain"] == Placement(("n.plain",), CPU, None, requires_grad=None)


def test_what_the_architecture_makes_by_itself_has_no_place():
    assert "n.cache" not in place({**SHAPES, "n.cache": [9]}, slots(Small()), table(optional=["n.cache"]))


def test_aliases_that_are_saved_and_ties_of_the_architecture_get_the_same_tensor():
    model = Small()
    model.b, model.c = nn.Linear(3, 2, bias=False), model.a  # b's weight is tied in the saved model only
    placements = place(SHAPES, slots(model), table(same={"b.weight": "a.weight", "x.weight": "a.weight"}))
    assert placements["a.weight"].names == ("a.weight", "b.weight", "c.weight")
    assert placements["a.bias"].names == ("a.bias", "c.bias")
    first = place({"x": [2, 3], "a.bias": [2], "n.running_mean": [4]}, slots(Small()), table(same={"a.weight": "x"}))
    assert first["x"].names == ("a.weight",)


@pytest.mark.parametrize(
    ("name", "devices", "device"),
    [
        ("a.weight", {}, CPU),
        ("a.weight", {"a.weight": CPU}, CPU),
        ("a.weight", {"a": torch.device("cuda:1")}, torch.device("cuda:1")),
        ("a.first.weight", {"a.first.weight": torch.device("cuda:2"), "a": CPU}, torch.device("cuda:2")),
        ("a.first.weight", {"a": META}, CPU),
    ],
)
def test_the_device_is_that_of_the_name_or_of_the_nearest_module(name, devices, device):
    assert Slots({}, {}, {}, devices).device(name, META) == device


@pytest.mark.parametrize(
    ("shapes", "details", "message"),
    [
        ({**SHAPES, "more": [1]}, {}, "^the model has no place for 'more'$"),
        ({"a.weight": [2, 3]}, {}, "^there is no tensor 'a.bias'$"),
        ({**SHAPES, "a.bias": [3]}, {}, r"^a.bias has shape \[3\], the model takes \[2\]$"),
        (SHAPES, {"same": {"n.running_mean": "a.bias"}}, "^n.running_mean and a.bias are one tensor, but not in"),
        (SHAPES, {"strides": {"a.bias": (2,)}}, r"^strides \[2\] of a.bias fit no tensor of shape \[2\]"),
        (SHAPES, {"strides": {"a.bias": (1, 1)}}, r"^strides \[1, 1\] of a.bias fit no tensor of shape \[2\]"),
    ],
)
def test_what_fits_nowhere_is_named(shapes, details, message):
    with pytest.raises(FxlrdError, match=message):
        place(shapes, slots(Small()), table(**details))


def test_a_tensor_is_put_under_all_its_names_in_memory_of_its_own():
    model = Small().to("meta")
    tensor = torch.randn(2, 3)
    put(model, tensor, Placement(("a.weight", "n.plain"), CPU, (1, 2), requires_grad=False))
    assert model.a.weight is model.n.plain
    assert type(model.a.weight) is nn.Parameter
    assert not model.a.weight.requires_grad
    assert model.a.weight.stride() == (1, 2)
    assert torch.equal(model.a.weight, tensor)
    mean = torch.ones(4)
    put(model, mean, Placement(("n.running_mean",), CPU, None, requires_grad=None))
    mean.zero_()
    assert model.n._buffers["running_mean"].tolist() == [1, 1, 1, 1]


def test_parents():
    assert parents("a.b.c") == ["a", "a.b"]
    assert parents("a") == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dense_strides(layout):
    tensor = torch.empty(2, 3, 4, 5).contiguous(memory_format=layout)
    assert is_dense(tensor.shape, tensor.stride())
    assert is_dense([3, 2], torch.empty(2, 3).T.stride())
    assert is_dense([3, 1], [1, 99])  # the stride of a dimension of size 1 says nothing
    assert contiguous_strides(tensor.shape) == (60, 20, 5, 1)
    for shape, strides in [([2, 3], [0, 1]), ([2, 3], [4, 1]), ([2, 3], [1, 1]), ([0], [1])]:
        assert not is_dense(shape, strides)
