from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxlrd.calibration.holdout import held_out
from fxlrd.calibration.padding import spread_out, tokens_of
from fxlrd.capturing.model import capture_any
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.layer import statistics_of
from fxlrd.graph.surgery import calls
from fxlrd.passes import Allocate, Calibrate, Decompose


class Tagger(nn.Module):
    """Linear layers for each token, as a graph or, with a question about values, in regions."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 40)
        self.asks = asks

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        if self.asks and attention_mask.sum() < 0:
            return x
        return self.second(self.first(x).relu())


def batches(filling: float) -> list[dict[str, Tensor]]:
    """Five batches of sentences of 1 to 9 tokens, filled up with ``filling``."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(5):
        lengths = torch.randint(1, 9, (8,), generator=generator)
        mask = (torch.arange(9) < lengths[:, None]).long()
        x = torch.randn(8, 9, 48, generator=generator, dtype=torch.float64)
        made.append({"x": torch.where(mask[..., None] > 0, x, filling), "attention_mask": mask})
    return made


def calibrated(asks: bool, filling: float, passes: tuple = ()):
    torch.manual_seed(0)
    model, given = Tagger(asks).double().eval(), batches(filling)
    gm = capture_any(model, Inputs.of(given[0]))
    calibrate = Calibrate(given, outputs=False, effects=40, holdout=True)
    for each in (calibrate, *passes):
        gm = each(gm).graph_module
    return model, gm


@pytest.mark.parametrize("asks", [False, True])
def test_moments_are_those_of_the_tokens(asks):
    _, gm = calibrated(asks, 3.0)
    rows = torch.cat([b["x"][b["attention_mask"].bool()] for b in batches(3.0)[:4]])
    found = statistics_of(calls(gm, "first")).input_moments
    assert found.count == len(rows)
    torch.testing.assert_close(found.second, rows.mT @ rows / len(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("asks", [False, True])
def test_what_fills_a_batch_up_changes_no_factor(asks):
    passes = Allocate(layers=0.6, merge=False), Decompose()
    (model, zeros), (_, large) = (calibrated(asks, filling, passes) for filling in (0.0, 1e3))
    shapes = [{name: p.shape for name, p in gm.named_parameters()} for gm in (zeros, large)]
    assert shapes[0] == shapes[1] != {name: p.shape for name, p in model.named_parameters()}
    for name, p in zeros.named_parameters():
        torch.testing.assert_close(p, large.get_parameter(name), rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("asks", [False, True])
def test_a_result_is_judged_by_its_tokens(asks):
    passes = Allocate(layers=0.6, merge=False), Decompose()
    errors = [held_out(gm).error(gm) for _, gm in (calibrated(asks, filling, passes) for filling in (0.0, 1e3))]
    assert errors[0] > 0.01
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, True),
        ({"attention_mask": torch.tensor([[True, False, False]])}, True),
        ({"attention_mask": torch.tensor([[1, 1, 1]])}, False),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, False),
        ({"attention_mask": torch.tensor([[0.0, -1e9, 0.0]])}, False),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, False),
        ({"attention_mask": torch.tensor([[1, 1, 0]]), "decoder_input_ids": torch.zeros(1, 3)}, False),
        ({}, False),
    ],
)
def test_what_tells_where_tokens_are(arguments, known):
    gm = capture_any(Tagger(False).double(), Inputs.of(batches(0.0)[0]))
    assert (tokens_of(gm, Inputs((), arguments)) is not None) == known


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_rows_go_back_to_where_they_were_in_their_own_precision(dtype):
    x = torch.randn(2, 3, 4)
    tokens = torch.tensor([[True, False, True], [False, True, False]])
    torch.testing.assert_close(spread_out(x[tokens], x.to(dtype), tokens), x * tokens[..., None], rtol=0, atol=0)
