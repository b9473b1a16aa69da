"""Modules that answer with what they gave before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxlrd.calibration.answers import Answers


class Spoiling(nn.Module):
    """Writes into what its layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += 1
        y = self.b(y)
        return y.mul_(2)


def test_modules_give_what_they_gave_though_code_wrote_into_it():
    torch.manual_seed(0)
    model, x = Spoiling().eval(), torch.randn(4, 3)
    y = model(x)
    answers = Answers(model)
    for _ in range(2):
        with answers.given(0, "ab"):
            assert torch.equal(model(x), y)
    model.a, model.b = nn.Linear(3, 3), nn.Linear(3, 3)
    with answers.given(0, "ab"):
        assert torch.equal(model(x), y)
    with answers.given(1, "ab"):
        assert not torch.equal(model(x), y)
    answers.forget(0)
    with answers.given(0, "ab"):
        assert not torch.equal(model(x), y)
    assert not any("forward" in vars(module) for module in model.modules())


def test_nothing_is_remembered_after_the_end_of_it_nor_beyond_the_limit():
    torch.manual_seed(0)
    model, x = Spoiling().eval(), torch.randn(4, 3)
    ended = Answers(model)
    with ended.given(0, "ab") as end:
        model.a(x)
        end()
        model.b(x)
    assert set(ended.known[0]) == {"a"}
    of_one = Answers(model, limit=4 * 3 * 4)
    for i in range(2):
        with of_one.given(i, "ab"):
            model(x)
    assert [set(outputs) for outputs in of_one.known.values()] == [{"a"}, set()]
    of_one.forget(0)
    with of_one.given(1, "ab"):
        model(x)
    assert set(of_one.known[1]) == {"a"}


def test_a_forward_of_the_modules_own_is_put_back():
    model, x = Spoiling().eval(), torch.randn(4, 3)
    model.a.forward = own = lambda x: x + 1
    with Answers(model).given(0, "ab"):
        model(x)
    assert model.a.forward is own
