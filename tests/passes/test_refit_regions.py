"""refit of models that keep their own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.holdout import Holdout
from fxlrd.capturing.regions import capture_regions
from fxlrd.graph.captured import runnable
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.run import run
from fxlrd.passes import Calibrate, Decompose, Merge, Refit
from fxlrd.passes._refit_regions import RIDGE
from tests.support.refitted import assert_fitted, calls_of
from tests.support.results import reasons


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Branching(nn.Module):
    """Its control flow depends on values, so that no trace of it is the model."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.sometimes, self.never, self.twice = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.blocks[0](x)
        x = self.blocks[1](skip)
        if x.mean() > 0:
            x = x + self.sometimes(x).tanh()
        if x.mean() > 100:
            x = self.never(x)
        x = self.blocks[3](self.blocks[2](x))
        return self.head(self.twice(self.twice(x).tanh()) + skip)


def data(width: int = 10) -> list[Tensor]:
    return [torch.randn(180, width).double() + (-0.5, 0.5)[i % 2] for i in range(5)]


def compressed(model: nn.Module, batches, ranks=4, **options) -> fx.GraphModule:
    gm = Calibrate(batches, outputs=False, **options)(capture_regions(model, batches[1])).graph_module
    return Decompose(ranks=ranks)(gm).graph_module


LAYERS = [*(f"blocks.{i}.{name}" for i in range(4) for name in ("up", "down")), "sometimes", "head"]


@pytest.mark.usefixtures("without_ridge")
def test_each_layer_is_the_least_squares_fit_on_what_the_refitted_model_feeds_it():
    torch.manual_seed(0)
    model, batches = Branching().double().eval(), data()
    gm = compressed(model, batches)
    state = copy.deepcopy(model.state_dict())
    result = Refit(batches, inputs=900, guard=False)(gm)
    order = [*LAYERS[:4], "sometimes", *LAYERS[4:8], "head"]
    assert [(site.name, site.exact) for site in result.sites] == [(name, False) for name in order]
    assert reasons(result) == {"twice": "called-again"}
    for name in ("blocks.0.up", "blocks.2.down", "sometimes", "head"):
        assert_fitted(gm, result.graph_module, model, name, batches)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    old = gm.state_dict()
    changed = {k.removesuffix(".weight").removesuffix(".bias") for k, v in result.graph_module.state_dict().items()
               if not torch.equal(v, old[k])}  # fmt: skip
    assert changed == {f"{name}.last" for name in LAYERS}


def test_a_layer_that_no_input_reaches_is_left_alone():
    torch.manual_seed(0)
    model, batches = Branching().double().eval(), data()
    gm = compressed(model, batches)
    result = Refit([-each.abs() for each in batches], guard=False)(gm)
    assert reasons(result) == {"twice": "called-again", "sometimes": "not-reached"}


@pytest.mark.parametrize("guard", [True, False])
def test_a_result_that_held_out_inputs_speak_against_is_not_kept(guard):
    torch.manual_seed(0)
    model, batches = Branching().double().eval(), data()
    gm = compressed(model, batches, holdout=True)
    few = [torch.full((5, 10), 0.3).double() + 1e-3 * torch.randn(5, 10).double()]
    result = Refit(few, guard=guard)(gm)
    assert result.modified is not guard
    if guard:
        assert reasons(result)["head"] == "not-better"
        assert torch.equal(
            run(runnable(result.graph_module), Inputs((batches[0],))), run(runnable(gm), Inputs((batches[0],)))
        )


def test_what_is_kept_is_better_on_inputs_that_no_fit_saw():
    torch.manual_seed(0)
    model, batches, unseen = Branching().double().eval(), data(), Inputs((data()[0],))
    gm = compressed(model, batches, holdout=True)
    result = Refit(batches)(gm)
    assert result.modified
    was, now = ((run(runnable(g), unseen) - model(*unseen.args)).norm() for g in (gm, result.graph_module))
    assert now < was


def test_experts_that_tokens_are_sent_to_are_left_alone_where_the_compressed_model_sends_others():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 2)
            self.mix = nn.Linear(8, 8)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.mix(x)
            chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                if (chosen == i).any():
                    y[chosen == i] = expert(x[chosen == i])
            return y

    torch.manual_seed(0)
    model, batches = Routed().double().eval(), [torch.randn(60, 8).double() for _ in range(5)]
    gm = compressed(model, batches, ranks=2)
    result = Refit(batches, guard=False)(gm)
    assert reasons(result) == {"experts.0": "unmatched", "experts.1": "unmatched"}


def test_the_consumer_of_a_cut_group_in_a_region_is_refitted():
    torch.manual_seed(0)
    model, batches = Branching().double().eval(), data()
    gm = Calibrate(batches, outputs=False)(capture_regions(model, batches[1])).graph_module
    gm = Merge(ranks={f"blocks.{i}.up": 6 for i in range(4)})(gm).graph_module
    result = Refit(batches, inputs=900, guard=False)(gm)
    assert [site.name for site in result.sites] == [f"blocks.{i}.down" for i in range(4)]
    fit = [Inputs((each,)) for i, each in enumerate(batches) if i != 4]
    models = [runnable(result.graph_module), copy.deepcopy(model)]
    (z, y) = (torch.cat([pair[i] for pair in calls_of(m, "blocks.3.down", fit)]) for i, m in enumerate(models))
    new, old = (g.get_submodule("blocks.3.down").weight for g in (result.graph_module, gm))
    ridge = RIDGE * z.square().mean()
    torch.testing.assert_close((y - z @ new.mT).mT @ z / len(z), ridge * (new - old), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("measured", [[1.0, 0.9, 0.8, 0.85], [1.0, 1.02, 0.8, 0.81, 0.81]])
def test_the_first_parts_are_kept_with_which_the_error_is_the_lowest(monkeypatch, measured):
    torch.manual_seed(0)
    model, batches = Branching().double().eval(), data()
    gm = compressed(model, batches, holdout=True)
    errors = iter(measured)
    monkeypatch.setattr(Holdout, "error", lambda self, gm: next(errors))
    result = Refit(batches)(gm)
    order = [*LAYERS[:4], "sometimes", *LAYERS[4:8], "head"]
    assert [site.name for site in result.sites] == order[:5]
    assert reasons(result) == {"twice": "called-again"} | dict.fromkeys(order[5:], "not-better")
    assert result.note == "output error on held-out inputs 1 → 0.8"
    assert next(errors, None) is None
    old = gm.state_dict()
    changed = {k for k, v in result.graph_module.state_dict().items() if not torch.equal(v, old[k])}
    assert {k.rpartition(".last")[0] for k in changed} == set(order[:5])


def test_padding_says_nothing_about_the_fit():
    class Tagger(Branching):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x) * attention_mask[..., None]

    torch.manual_seed(0)
    model = Tagger().double().eval()
    mask = (torch.arange(30) < torch.randint(10, 30, (12, 1))).long()
    weights = []
    for filler in (0.0, 7.0):
        torch.manual_seed(1)
        batches = [{"x": torch.randn(12, 30, 10).double() + 0.5, "attention_mask": mask} for _ in range(5)]
        for each in batches:
            each["x"][mask == 0] = filler
        gm = Calibrate(batches, outputs=False)(capture_regions(model, batches[1])).graph_module
        result = Refit(batches, guard=False)(Decompose(ranks=4)(gm).graph_module)
        weights.append(result.graph_module.get_submodule("blocks.1.down.last").weight)
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)
