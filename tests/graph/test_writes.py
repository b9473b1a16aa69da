from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd.graph.writes import WritesWeightError, guarding_weights


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.mul_(2),
        lambda p: p.data.zero_(),
        lambda p: p[0].fill_(1),
        lambda p: torch.add(p.detach(), 1, out=p.detach()),
        lambda p: torch._foreach_mul_([torch.ones(2), p.detach()], 2.0),
        lambda p: p.detach().view(-1).index_fill_(0, torch.tensor([0]), 3.0),
    ],
)
def test_nothing_writes_into_a_parameter(write):
    model = nn.Linear(3, 4)
    before, version = model.weight.detach().clone(), model.weight._version
    with pytest.raises(WritesWeightError, match="weight"), guarding_weights(model) as guard, torch.no_grad():
        write(model.weight)
    assert guard.written == "weight"
    assert torch.equal(model.weight, before)
    assert model.weight._version == version


def test_a_parameter_that_was_given_other_data_has_its_own_again():
    model = nn.Linear(3, 4)
    before, address = model.weight.detach().clone(), model.weight.data_ptr()
    with guarding_weights(model) as guard:
        model.weight.data = torch.zeros(4, 3)
    assert guard.written == "weight"
    assert torch.equal(model.weight, before)
    assert model.weight.data_ptr() == address


def test_what_is_no_parameter_may_be_written():
    model = nn.BatchNorm1d(3)
    with guarding_weights(model) as guard:
        model(torch.randn(4, 3)).mul_(2)
    assert guard.written is None
