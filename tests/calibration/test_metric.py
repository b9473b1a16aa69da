from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fxlrd import capture
from fxlrd.calibration import metric
from fxlrd.calibration.metric import drawn, logits_among, logits_of, squared_error
from fxlrd.errors import FxlrdError
from fxlrd.passes import Calibrate


def fisher(z):
    """diag(p) − p·pᵀ of one row of logits."""
    p = z.softmax(-1)
    return p.diag() - torch.outer(p, p)


def spread(z):
    return sum(float(row @ fisher(row) @ row) for row in z)


@dataclass
class Output:
    start_logits: torch.Tensor
    states: torch.Tensor


@pytest.mark.parametrize(
    ("value", "softmax", "right"),
    [
        (torch.zeros(2, 3), None, (False,)),
        (torch.zeros(2, 3), True, (True,)),
        ({"logits": torch.zeros(2, 3)}, False, (False,)),
        (({"logits": [torch.zeros(2, 3), torch.zeros(2, 4)]}, torch.zeros(2, 3)), None, (True, True, False)),
        (Output(torch.zeros(2, 3), torch.zeros(2, 3)), None, (True, False)),
        ({"logits": torch.zeros(2, 1), "class_logits": torch.zeros(2, 3).long()}, None, (False, False)),
        (8 * torch.eye(5), None, (True,)),
        ((8 * torch.eye(5), torch.zeros(5)), None, (False, False)),
    ],
    ids=["unnamed", "said so", "said not", "nested", "dataclass", "one class, whole numbers", "classifier", "two"],
)
def test_logits_are_what_is_named_so(value, softmax, right):
    assert logits_of(value, softmax) == right


def test_what_is_drawn_has_the_metric_of_the_softmax():
    z, draws = torch.randn(2, 3, dtype=torch.float64), 10_000
    generator = torch.Generator().manual_seed(0)
    v = torch.stack([drawn(z, True, generator) for _ in range(draws)]).flatten(1)
    exact = torch.block_diag(*map(fisher, z)) / spread(z)
    noise = 4 * v.square().amax() / math.sqrt(draws)
    torch.testing.assert_close(v.mT @ v / draws, exact, rtol=0, atol=float(noise))
    torch.testing.assert_close(v.unflatten(1, z.shape).sum(-1), torch.zeros(draws, 2).double(), rtol=0, atol=1e-12)


def test_the_error_of_logits_is_twice_the_divergence_of_their_probabilities():
    z, other = torch.randn(2, 4, 5, dtype=torch.float64)
    p, q = z.softmax(-1), other.softmax(-1)
    right = 2 * float((p * (p / q).log()).sum()) / spread(z)
    assert squared_error([other], [z], [True]) == pytest.approx(right, rel=1e-12)
    assert squared_error([z + 7], [z], [True]) < 1e-15
    step = 1e-4 * (other - z)
    near = sum(float(d @ fisher(row) @ d) for d, row in zip(step, z, strict=True)) / spread(z)
    assert squared_error([z + step], [z], [True]) == pytest.approx(near, rel=1e-3)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 5, 3, 3)])
def test_rows_are_worked_on_some_at_a_time(shape, monkeypatch):
    z, other = torch.randn(2, *shape, dtype=torch.float64)
    at_once = squared_error([other], [z], [True])
    monkeypatch.setattr(metric, "_ENTRIES", 5)
    assert squared_error([other], [z], [True]) == pytest.approx(at_once, rel=1e-12)
    v = drawn(z, True, torch.Generator().manual_seed(0))
    assert v.shape == z.shape
    assert v.sum(1 if z.dim() == 4 else -1).abs().max() < 1e-12


def test_logits_of_maps_have_their_classes_first():
    z, other = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    rows = [t.movedim(1, -1).reshape(-1, 3) for t in (other, z)]
    assert squared_error([other], [z], [True]) == pytest.approx(squared_error(rows[:1], rows[1:], [True]), rel=1e-12)


@pytest.mark.parametrize("masked", [math.nan, math.inf], ids=["all alike", "words that are masked"])
def test_logits_that_say_nothing_are_no_division_by_zero(masked):
    z = torch.zeros(3, 4, dtype=torch.float64)
    if masked == math.inf:
        z[:, 1:] = -math.inf
    v = drawn(z, True, torch.Generator().manual_seed(0))
    assert squared_error([z], [z], [True]) == 0.0
    assert masked == math.inf or v.isfinite().all()


def test_calibrate_records_which_outputs_are_logits():
    x = torch.randn(40, 6)
    gm = capture(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), x[:2])
    for asked, right in (("", (False,)), ("softmax", (True,)), ("squared", (False,))):
        assert logits_among(Calibrate(x, effects=40, metric=asked)(gm).graph_module) == right
    with pytest.raises(FxlrdError, match="calibrate: metric=fisher: give squared or softmax"):
        Calibrate(x, metric="fisher")


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_infinitely_far(logits, value):
    z = torch.randn(4, 5)
    changed = z.clone()
    changed[1, 2] = value
    assert squared_error([changed], [z], [logits]) == math.inf


def test_what_no_half_can_hold_is_drawn_in_float32():
    z = torch.full((4, 3, 512, 512), 200.0).half()
    v = drawn(z, False, torch.Generator().manual_seed(0))
    assert v.dtype == torch.float32
    assert float(v.abs().max()) == pytest.approx(1 / float(z.double().norm()), rel=1e-6)
    assert bool(drawn(torch.zeros(2, 3).half(), False, torch.Generator()).isfinite().all())
