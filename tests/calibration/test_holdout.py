from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxlrd import capture
from fxlrd.calibration.holdout import (
    INCOMPARABLE,
    Disabled,
    Holdout,
    TooFew,
    Verdict,
    first_held_out,
    held_out,
    held_out_of,
    keep_if_better,
    let_go,
    outputs,
    record_calibrated,
    reference,
)
from fxlrd.graph.inputs import Inputs

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


def net():
    return nn.Sequential(nn.Linear(6, 3)).eval()


def test_held_out_inputs_and_the_graph_as_it_was_are_recorded():
    gm = capture(net(), X)
    assert reference(gm) is None
    assert held_out(gm) == Disabled()
    record_calibrated(gm, held_out_of(gm, [Inputs((X,)), Inputs((X + 1,))]))
    assert isinstance(held_out(gm), Holdout)
    assert held_out(gm).error(gm) == 0
    assert copy.deepcopy(held_out(gm)) is held_out(gm)
    assert torch.equal(held_out(gm).outputs[1][0], gm(X + 1))
    assert torch.equal(reference(gm)(X), gm(X))
    for _ in range(2):
        let_go(gm)
        assert reference(gm) is None
        assert held_out(gm) == Disabled()


def test_without_held_out_inputs_it_says_whether_there_were_to_be_some():
    gm = capture(net(), X)
    for recorded in (held_out_of(gm, []), Disabled()):
        record_calibrated(gm, recorded)
        assert held_out(gm) == recorded
        assert reference(gm) is not None
    assert held_out_of(gm, []) == TooFew()


def test_a_change_is_kept_if_it_lowers_the_error_on_held_out_inputs():
    gm = capture(net().double(), X.double())
    judge = held_out_of(gm, [Inputs((X.double(),))])
    near, far = copy.deepcopy(gm), copy.deepcopy(gm)
    with torch.no_grad():
        near.get_submodule("0").bias += 1e-3
        far.get_submodule("0").bias += 1e-2
    was, now = judge.error(far), judge.error(near)
    assert keep_if_better(judge, far, near) == Verdict(True, f"output error on held-out inputs {was:.3g} → {now:.3g}")
    worse = keep_if_better(judge, near, far)
    assert worse == Verdict(False, f"output error on held-out inputs {now:.3g} → {was:.3g}: not kept")
    assert not keep_if_better(judge, near, near).keep, "equal is not better"
    assert keep_if_better(Disabled(), near, far) == keep_if_better(TooFew(), near, far) == Verdict(True)


def test_where_no_error_is_known_it_is_said_what_to_do():
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return (y := self.fc(x))[y[:, 0] > 0]

    gm = capture(Boxes().double(), X.double())
    judge = held_out_of(gm, [Inputs((X.double(),))])
    fewer, none = copy.deepcopy(gm), copy.deepcopy(gm)
    with torch.no_grad():
        fewer.fc.bias -= 1
        none.fc.bias -= 2
    assert keep_if_better(judge, fewer, none) == Verdict(False, f"{INCOMPARABLE}: not kept")


class Outputs(nn.Module):
    """Several outputs, one of whole numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 3), nn.Linear(6, 2), nn.Dropout()

    def forward(self, x):
        return self.a(self.drop(x)), {"b": self.b(x), "top": self.a(x).argmax(1)}


def test_the_error_is_relative_for_each_output_and_batch():
    gm = capture(Outputs().double(), X.double())
    batches = [Inputs((X.double()[:9],)), Inputs((X.double()[9:] * 3,))]
    judge = held_out_of(gm, batches)
    moved = copy.deepcopy(gm)
    with torch.no_grad():
        moved.a.bias += 1e-3
        moved.b.weight *= 1.01
    squares = 0.0
    for each in batches:
        pairs = list(zip(outputs(moved, each), outputs(gm, each), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs if not b.is_floating_point())
        squares += sum(float((a - b).norm() / b.norm()) ** 2 for a, b in pairs if b.is_floating_point())
    assert judge.error(moved) == pytest.approx((squares / 2) ** 0.5, rel=1e-12)
    assert judge.error(gm) == 0
    record_calibrated(gm, judge)
    assert held_out(copy.deepcopy(gm)).error(moved) > 0, "a copy keeps what the original gave"


class Masked(nn.Module):
    """Logits of which some are ruled out."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x).masked_fill(x[:, :3] > 0, float("-inf"))


def test_outputs_that_are_infinite_on_purpose_do_not_count():
    gm = capture(Masked().double(), X.double())
    judge = held_out_of(gm, [Inputs((X.double(),)), Inputs((X.double().neg(),))])
    moved = copy.deepcopy(gm)
    with torch.no_grad():
        moved.fc.weight *= 1.25
        moved.fc.bias *= 1.25
    assert judge.error(moved) == pytest.approx(0.25, rel=1e-12)


def test_outputs_are_those_of_eval_mode_without_gradients():
    gm = capture(Outputs(), X)
    gm.train()
    found = outputs(gm, Inputs((X,)))
    assert gm.drop.training
    assert not any(t.requires_grad for t in found)
    assert torch.equal(found[0], gm.eval()(X)[0])


@pytest.mark.parametrize(
    ("forward", "cut"),
    [
        (lambda fc, x: fc(x), True),
        (lambda fc, x: fc(x.view(3, 4, 6)), False),  # fails on other numbers of rows
        (lambda fc, x: fc(x - x.mean(0)), False),  # each row's output depends on all rows
    ],
)
def test_held_out_rows_are_cut_only_where_they_are_examples(forward, cut):
    cls = type("Model", (nn.Module,), {"forward": lambda self, x: forward(self.fc, x)})
    model = cls()
    model.fc = nn.Linear(6, 3)
    gm = capture(model.eval().double(), X.double())
    whole = Inputs((X.double(),))
    found = first_held_out(gm, held_out_of(gm, [whole, whole]), 8)
    assert [len(each.args[0]) for each in found] == [8 if cut else 12]


def test_a_vector_without_a_batch_is_held_out_whole():
    gm = capture(net(), X[0])
    assert [each.args[0].shape for each in first_held_out(gm, held_out_of(gm, [Inputs((X[0],))]), 4)] == [(6,)]


def test_the_first_batches_have_so_many_rows_of_outputs():
    outputs = tuple([torch.zeros(2, 5, 7)] for _ in range(4))
    held = Holdout(tuple(Inputs((torch.zeros(2),)) for _ in range(4)), outputs)
    assert [len(held.first(rows).inputs) for rows in (1, 10, 11, 39, 40, 41, 99)] == [1, 1, 2, 4, 4, 4, 4]


def test_outputs_of_the_original_are_made_when_they_are_asked_for_and_once(monkeypatch):
    gm, made = capture(net().double(), X.double()), []
    monkeypatch.setattr("fxlrd.calibration.holdout.outputs", lambda *args: made.append(1) or outputs(*args))
    held = held_out_of(gm, [Inputs((X.double() + i,)) for i in range(3)])
    assert not made
    held.first(1)
    assert len(made) == 1
    assert held.error(gm) == held.error(gm) == 0
    assert len(made) == 3 + 6  # and the graph's own, twice
