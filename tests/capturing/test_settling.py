"""Models whose forward writes into their own weights: the user's stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd import FxlrdError
from tests.support.compression import decisions


class Rescaling(nn.Module):
    """Scales a weight down in its first call in eval mode, and its output up in each, as RWKV does."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.rescaled = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), False

    def forward(self, x):
        if not self.rescaled:
            with torch.no_grad():
                self.second.weight.div_(4)
            self.rescaled = True
        return self.second(self.first(x)) * 4


class Clipping(nn.Linear):
    def forward(self, x):
        self.weight.data = self.weight.data.clamp(-0.05, 0.05)
        return super().forward(x)


class Shrinking(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)


def state(model):
    return {name: (p.detach().clone(), p.data_ptr(), p._version) for name, p in model.named_parameters()}


def assert_unchanged(model, before):
    for name, p in model.named_parameters():
        value, address, version = before[name]
        assert torch.equal(p, value), name
        assert (p.data_ptr(), p._version) == (address, version), name


@pytest.mark.parametrize("model", [Rescaling(), nn.Sequential(nn.Linear(16, 16), Clipping(16, 16))])
def test_a_forward_that_changes_its_weights_once_is_compressed_and_the_users_weights_stay(model):
    model = model.double().eval()
    before, x = state(model), torch.randn(4, 16).double()
    result = fxlrd.compress(model, x, pipeline="decompose{ranks=16}", measure=False)
    assert_unchanged(model, before)
    assert "svd" in decisions(result).values()
    expected = copy.deepcopy(model)
    for other in (x, x * 2, x - 1):
        torch.testing.assert_close(result.model(other), expected(other), rtol=1e-12, atol=1e-12)


def test_in_place_such_a_model_is_refused():
    model = Rescaling().eval()
    before = state(model)
    with pytest.raises(FxlrdError, match=r"inplace: calling the Rescaling changes its weight second.weight"):
        fxlrd.compress(model, torch.randn(4, 16), ratio=2, inplace=True, measure=False)
    assert_unchanged(model, before)


def test_a_forward_that_changes_its_weights_at_every_call_is_refused_in_one_line():
    model = nn.Sequential(nn.Linear(16, 16), Shrinking(16, 16)).eval()
    before = state(model)
    with pytest.raises(FxlrdError, match=r"^Sequential: its forward writes into .* 1.weight .* every call") as e:
        fxlrd.compress(model, torch.randn(4, 16), ratio=2, measure=False)
    assert "\n" not in str(e.value)
    assert_unchanged(model, before)
