from __future__ import annotations

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd import Budget, FxlrdError
from tests.support.attention import Block, values
from tests.support.experts import Experts

X = torch.linspace(-1, 1, 96).reshape(12, 8)


def refusal(model, inputs, budget, skip=()):
    with pytest.raises(FxlrdError) as error:
        fxlrd.compress(model, inputs, budget=budget, calibration=[inputs], skip=skip, measure=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_budget_that_experts_stand_in_the_way_of_names_them_and_their_share():
    blocks = nn.Sequential(nn.Linear(8, 8), *(Experts() for _ in range(2)))
    text = refusal(blocks, X, Budget(params=0.5))
    params = sum(p.numel() for p in blocks.parameters())
    stays = text.partition("what stays as it is: ")[2]
    assert stays.startswith(f"*.experts.gate_up ({2 * 768 / params:.0%} of the parameters: ExpertWeights multiplies")
    assert f"*.experts.down ({2 * 384 / params:.0%} of" in stays


def test_embeddings_stand_in_the_way_of_parameters_only():
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    tokens = torch.arange(64)
    assert "what stays as it is: 0 (49% of the parameters: Embedding)" in refusal(model, tokens, Budget(params=0.1))
    assert "Embedding" not in refusal(model, tokens, Budget(flops=0.01))


def test_a_layer_to_skip_stands_in_the_way_and_one_that_can_be_cut_does_not():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 96))
    text = refusal(model, torch.linspace(-1, 1, 256).reshape(8, 32), Budget(params=0.1), skip="1")
    assert text.endswith("what stays as it is: 1 (75% of the parameters: skip=1)")


def test_projections_of_an_attention_are_cut_or_left_alone_one_by_one():
    model, x = Block().eval(), values(2, 5, 8)
    text = refusal(model, x, Budget(params=0.1), skip="attn.v_proj")
    assert text.endswith("what stays as it is: attn.v_proj (12% of the parameters: skip=attn.v_proj)")
