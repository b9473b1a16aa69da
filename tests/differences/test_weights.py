from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxlrd.differences.compare import diff
from fxlrd.differences.weights import compare_weights
from tests.support.graphs import chain, graph_module


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (torch.ones(2), torch.ones(2), None),
        (torch.ones(2), torch.full((2,), 1.5), "moved by 0.5"),
        (torch.zeros(2), torch.ones(2), "was zero"),
        (torch.ones(2), torch.ones(3), "float32[2] → float32[3]"),
        (torch.ones(2), torch.ones(2).double(), "float32[2] → float64[2]"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "is another"),
        (torch.tensor([1, 1j]), torch.tensor([1, 1j]) * 2, "moved by 1"),
        (torch.ones(2), torch.ones(2, device="meta"), None),
    ],
)
def test_two_tensors(before, after, words):
    assert compare_weights(before, after) == ([] if words is None else [("values", words)])


def test_tensors_of_modules_are_compared_by_name():
    one = nn.Linear(2, 2)
    two = copy.deepcopy(one)
    with torch.no_grad():
        two.bias += 1
    two.weight.requires_grad_(False)
    kinds = [(kind, words.split(" ")[0]) for kind, words in compare_weights(one, two)]
    assert kinds == [("values", "bias"), ("trainable", "weight")]
    assert compare_weights(one, two)[1] == ("trainable", "weight is frozen")
    assert compare_weights(two, one)[1] == ("trainable", "weight trains")


def test_a_tensor_that_one_module_lacks_is_a_change():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    assert compare_weights(one, two) == [("changed", "only one side has bias")]


def test_equal_nans_are_no_difference(parts):
    with torch.no_grad():
        parts["a"].bias[0] = float("nan")
    one = graph_module(chain("a"), **parts)
    assert not diff(one, copy.deepcopy(one))


def test_sparse_weights_are_compared():
    def masked(mask):
        root = nn.Sequential(nn.ReLU())
        root.register_buffer("mask", mask)
        return root

    one = masked(torch.eye(3).to_sparse())
    assert not diff(one, copy.deepcopy(one))
    assert "mask moved by 1" in diff(one, masked(2 * torch.eye(3).to_sparse())).to_text()
    assert "mask sparse_coo → strided" in diff(one, masked(torch.eye(3))).to_text()
