from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fxlrd import FxlrdError, capture
from fxlrd.allocation.factored import Factored
from fxlrd.allocation.measured import (
    WITHIN,
    WORK,
    Scale,
    affordable,
    goals_of,
    measured,
    trial_of_group,
    trial_of_layer,
    within_reason,
)
from fxlrd.allocation.measures import Params, curve_of, forms_of
from fxlrd.allocation.merges import mergings
from fxlrd.allocation.trials import Trial, measure
from fxlrd.app import fashion
from fxlrd.calibration.holdout import held_out
from fxlrd.capturing.model import capture_any
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.layer import layers_of
from fxlrd.passes import Allocate, Calibrate, allocate
from fxlrd.progress import quiet


def test_a_scale_passes_through_what_was_measured_and_rises_with_what_was_predicted():
    scale = Scale.of([1e-4, 1e-2], [3e-4, 0.2])
    assert scale(1e-4) == pytest.approx(3e-4)
    assert scale(1e-2) == pytest.approx(0.2)
    assert scale(1e-3) == pytest.approx(1e-3 * math.sqrt(3 * 20))
    assert scale(1e-6) == pytest.approx(3e-6)
    assert scale(1.0) == pytest.approx(20.0)
    assert scale(0.0) == 0.0
    for errors in ([1e-5, 1e-1], [1e-1, 1e-5], [1e-3, 1e-3]):
        values = [Scale.of([1e-4, 1e-2], errors)(10**e) for e in (-6, -4, -3.5, -3, -2, 0)]
        assert values == sorted(values)


def test_a_scale_of_what_was_not_measured_is_that_of_the_others():
    known = [Scale.of([1e-3], [2e-3]), Scale.of([1e-3], [4e-3]), Scale.of([1e-3], [math.inf])]
    nothing, far = Scale.of([1e-3], [0.0]), Scale.of([1e-3], [1e4])
    scaled = [scale(1e-3) for scale in within_reason(dict(enumerate([*known, nothing, far]))).values()]
    assert scaled == pytest.approx([2e-3, 4e-3, 4e-3, 1e-15, 4e-3 * WITHIN])


def trials(layers: int, blocks: int) -> list[Trial]:
    names = [f"blocks.{i}.{name}" for i in range(blocks) for name in "abcdef"[:layers]]
    return [Trial(name, (name,), (1e-2, 1e-1), (dict, dict)) for name in names]


def test_large_models_are_run_on_few_inputs_and_their_blocks_in_part():
    every = trials(3, 10)
    assert affordable(every, WORK / 610) == (dict(enumerate(every)), 10)
    for work, stride, expected in ((WORK / 455, 1, 15), (WORK / 30, 1, 1), (WORK / 10, 3, 1), (WORK, 10, 1)):
        chosen, inputs = affordable(every, work)
        assert inputs == expected
        assert all(len(trial.changes) == len(trial.predicted) == 1 for trial in chosen.values())
        blocks = sorted({trial.name.split(".")[1] for trial in chosen.values()})
        assert blocks == sorted({*(str(i) for i in range(0, 10, stride)), "9"})
        assert len(chosen) == 3 * len(blocks)


def test_what_measuring_needs():
    gm = capture(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(8, 16))
    with pytest.raises(FxlrdError, match=r"^allocate: measured=4 needs calibrate\{holdout=true\} before it"):
        Allocate(params=0.5, measured=4)(gm)
    with pytest.raises(FxlrdError, match="measured=-1 is no number of inputs"):
        Allocate(params=0.5, measured=-1)
    few = Calibrate(torch.randn(3, 16), effects=3, holdout=True)(gm).graph_module
    (warning,) = Allocate(params=0.5, measured=4)(few).warnings
    assert warning.startswith("allocate: errors are predicted, not measured: too few calibration inputs")


def test_the_forms_of_each_layer_with_a_choice_are_tried(monkeypatch):
    """A layer of width 2 has one form beside its own, one of width 1 has none."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2), nn.ReLU(), nn.Linear(2, 1))
    x = torch.randn(64, 16)
    gm = Calibrate(x, effects=16, holdout=True)(capture(model, x[:8])).graph_module
    tried, forms = [], {}

    def spy(gm, items, groups, trials, *rest):
        tried.extend(trial for trial in trials if trial.name in items)
        forms.update({name: len(choices) for name, choices in items.items()})
        return measured(gm, items, groups, trials, *rest)

    monkeypatch.setattr(allocate, "measured", spy)
    Allocate(params=0.7, measured=8, merge=False)(gm)
    assert forms == {"0": 8, "2": 2, "4": 1}
    assert [trial.name for trial in tried] == ["0", "2"]


def order_agrees(gm, unseen: Inputs, inputs: int) -> float:
    """Return Spearman's correlation of errors at other ranks than those measured, with true ones on unseen inputs."""
    layers = [layer for layer in layers_of(gm) if layer.why_left_alone() is None]
    items = {layer.name: forms_of(layer, Params(), curve_of(layer)) for layer in layers}
    cuttable = [layer for layer in layers if len(items[layer.name]) > 1]
    groups = mergings(gm, [*items], Params(), (), quiet)

    def trials(share):
        goals = goals_of([share])
        of_layers = [trial_of_layer(layer, items[layer.name], goals, Factored()) for layer in cuttable]
        return of_layers + [trial_of_group(gm, name, group, goals) for name, group in groups.items()]

    items, groups = measured(gm, items, groups, trials(0.5), held_out(gm), inputs, quiet)
    others = [*trials(0.35), *trials(0.7)]
    expected = [error for trial in others for error in trial.predicted]
    true = [error for errors in measure(gm, [unseen], others, quiet) for error in errors]
    ranks = torch.tensor([expected, true]).argsort(1).argsort(1).double()
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.mark.slow
def test_measured_curves_of_the_embedded_network_order_changes_as_they_are_on_other_inputs():
    images = fashion.calibration()
    gm = capture(fashion.trained(), images[:8])
    gm = Calibrate(images[:160].split(16), outputs=False, effects=32, holdout=True)(gm).graph_module
    assert order_agrees(gm, Inputs((fashion.test()[0][:64],)), 32) >= 0.95


class Pooled(nn.Module):
    """A sentence encoder: the mean over the tokens, before which errors of single tokens add up."""

    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 48, "intermediate_size": 144, "num_hidden_layers": 3, "num_attention_heads": 4}
        self.bert = BertModel(BertConfig(vocab_size=200, initializer_range=0.2, **sizes), add_pooling_layer=False)

    def forward(self, input_ids):
        return self.bert(input_ids=input_ids).last_hidden_state.mean(1)


@pytest.mark.slow
def test_measured_curves_of_a_transformer_order_changes_as_they_are_on_other_inputs():
    ids = torch.randint(200, (160, 12), generator=torch.Generator().manual_seed(0))
    gm = capture_any(Pooled().eval(), Inputs.of({"input_ids": ids[:8]}))
    batches = [{"input_ids": rows} for rows in ids[:96].split(16)]
    gm = Calibrate(batches, outputs=False, effects=64, holdout=True)(gm).graph_module
    assert order_agrees(gm, Inputs.of({"input_ids": ids[96:]}), 16) >= 0.95
