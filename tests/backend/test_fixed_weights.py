"""The fingerprint of frozen weights is one object until torch counts a write or an address changes."""

import pytest
import torch
from torch import nn

from fxlrd.backend.factor_sets import fingerprint
from fxlrd.backend.fixed_weights import FixedWeights
from tests.support.backend import net


def _weights():
    model = net()
    return [*model.parameters(), *model.buffers()]


def _in_place(weights):
    with torch.no_grad():
        weights[-1].add_(1)


def _data(weights):
    weights[0].data = weights[0].data.clone()


def _swap(weights):
    torch.utils.swap_tensors(weights[0], nn.Parameter(weights[0].detach().clone()))


def _of_a_view(weights):
    weights[0].detach().view(-1)[0] = 1.0


@pytest.mark.parametrize("change", [_in_place, _data, _swap, _of_a_view])
@pytest.mark.parametrize("inference", [False, True])
def test_the_fingerprint_changes_with_any_weight(change, inference):
    weights = _weights()
    fixed = FixedWeights(weights)
    with torch.inference_mode(inference):
        before = fixed.fingerprint()
        assert fixed.fingerprint() is before
    change(weights)
    with torch.inference_mode(inference):
        after = fixed.fingerprint()
        assert after != before
        assert after == fingerprint(weights)
        assert fixed.fingerprint() is after


def test_subclasses_are_read_one_by_one():
    class Own(torch.Tensor):
        pass

    weights = [w.detach().as_subclass(Own) for w in _weights()]
    fixed = FixedWeights(weights)
    before = fixed.fingerprint()
    assert fixed.fingerprint() == before == fingerprint(weights)
    _in_place(weights)
    assert fixed.fingerprint() != before
