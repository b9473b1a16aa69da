from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx.passes.infra.pass_manager import PassManager

import fxlrd
from fxlrd import FxlrdError, capture
from fxlrd.passes import Branch, Decompose, Freeze
from fxlrd.passes.freeze import freeze_factors
from tests.support.tensors import images


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, bias=False),
        nn.Conv2d(32, 16, 3),
        nn.Conv2d(16, 16, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


RANKS = {"3": (8, 8), "4": (8, None), "5": (None, 8), "6": 4, "9": 4}
FIRST = {"3.first.weight", "3.last.weight", "4.first.weight", "5.last.weight", "6.first.weight", "9.first.weight"}
SECOND = {"3.core.weight", "4.core.weight", "5.core.weight", "6.last.weight", "9.last.weight"}
REST = {"0.weight", "0.bias", "1.weight", "1.bias", "3.last.bias", "4.bias", "5.last.bias", "9.last.bias"} - {"4.bias"}


def decomposed(x: torch.Tensor):
    return Decompose(ranks=RANKS)(capture(small().eval(), x)).graph_module


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SECOND),
        ({"epoch": 1}, SECOND),
        ({"schedule": "sequential"}, SECOND),
        ({"schedule": "sequential", "epoch": 1}, FIRST),
        ({"schedule": "sequential", "epoch": 2}, SECOND),
        ({"schedule": "sequential", "epoch": 7}, FIRST),
    ],
)
def test_what_trains_is_what_is_declared(options, expected):
    x = images(4, size=12, dtype=torch.float32)
    gm = decomposed(x)
    result = Freeze(**options)(gm)
    after = result.graph_module
    assert trained(after) == expected | REST
    assert [s.name for s in result.sites] == list(RANKS)
    assert all(site.exact for site in result.sites)
    assert torch.equal(after(x), gm(x)), "bit by bit"
    after.train()(x).square().sum().backward()
    assert {name for name, p in after.named_parameters() if p.grad is not None} == expected | REST


def test_notes_name_the_factors():
    notes = {s.name: s.note for s in Freeze()(decomposed(images(4, size=12, dtype=torch.float32))).sites}
    assert notes["3"] == "trains core"
    assert notes["6"] == "trains last"
    notes = {s.name: s.note for s in Freeze("sequential", 1)(decomposed(images(4, size=12, dtype=torch.float32))).sites}
    assert notes["3"] == "trains first and last"


def test_the_input_graph_trains_as_before_and_shares_its_tensors():
    gm = decomposed(images(4, size=12, dtype=torch.float32))
    everything = {name for name, _ in gm.named_parameters()}
    after = Freeze()(gm).graph_module
    assert trained(gm) == everything
    for (name, a), (other, b) in zip(gm.named_parameters(), after.named_parameters(), strict=True):
        assert name == other
        assert a.data_ptr() == b.data_ptr()
    again = Freeze("sequential", 1)(after).graph_module
    assert trained(again) == FIRST | REST
    assert trained(after) == SECOND | REST


def test_branched_cores_train():
    gm = Branch(groups=2)(decomposed(images(4, size=12, dtype=torch.float32))).graph_module
    assert trained(Freeze()(gm).graph_module) == SECOND | REST


def test_a_step_moves_what_trains_and_nothing_else():
    gm = Freeze()(decomposed(images(4, size=12, dtype=torch.float32))).graph_module
    before = {name: p.detach().clone() for name, p in gm.named_parameters()}
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    gm(images(4, size=12, dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in gm.named_parameters() if not torch.equal(p, before[name])}
    assert moved == SECOND | REST
    assert {"3.last.bias", "9.last.bias"} <= moved, "biases train on"


@pytest.mark.slow
def test_under_compile():
    x = images(4, size=12, dtype=torch.float32)
    gm = Freeze()(decomposed(x)).graph_module
    compiled = torch.compile(gm, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gm(x), rtol=1e-5, atol=1e-5)
    compiled(x).square().sum().backward()
    assert {name for name, p in gm.named_parameters() if p.grad is not None} == SECOND | REST
    torch._dynamo.reset()


def test_after_loading(tmp_path):
    x = images(4, size=12, dtype=torch.float32)
    result = fxlrd.compress(small().eval(), x, pipeline=[Decompose(ranks=RANKS), Freeze()], measure=False)
    assert trained(result.model) == SECOND | REST
    torch.save(result.model.state_dict(), tmp_path / "state.pt")
    fresh = fxlrd.compress(small().eval(), x, pipeline=[Decompose(ranks=RANKS)], measure=False, inplace=True).model
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert freeze_factors(fresh) == sorted(SECOND)
    assert trained(fresh) == SECOND | REST
    assert torch.equal(fresh(x), result.model(x))
    assert freeze_factors(fresh, "sequential", 1) == sorted(FIRST)
    assert trained(fresh) == FIRST | REST
    assert trained(copy.deepcopy(fresh)) == FIRST | REST


def test_through_compress():
    x = images(4, size=12, dtype=torch.float32)
    model = small().eval()
    result = fxlrd.compress(model, x, preset="freeze", ratio=2.0, measure=False)
    assert result.report.passes[-1]["name"] == "freeze"
    assert result.report.passes[-1]["exact"]
    assert result.report.passes[-1]["step_error"] == 0
    assert all(p.requires_grad for p in model.parameters())
    inplace = fxlrd.compress(model, x, preset="freeze", ratio=2.0, measure=False, inplace=True).model
    assert trained(inplace) == trained(result.model)
    assert len(trained(inplace)) < len(list(inplace.parameters()))


def test_nothing_decomposed_is_nothing_modified():
    x = images(4, size=12, dtype=torch.float32)
    gm = capture(small().eval(), x)
    result = Freeze()(gm)
    assert not result.modified
    assert result.skipped[0].reason.code == "nothing-decomposed"
    assert torch.equal(result.graph_module(x), gm(x))
    assert len(trained(gm)) == len(list(gm.parameters()))


class Pair(nn.Module):
    """A user's own module whose parts happen to be called first and last."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_modules_that_only_sound_like_factors_are_left_alone():
    norms = nn.Sequential()
    norms.add_module("first", nn.ReLU())
    norms.add_module("last", nn.ReLU())
    model = nn.Sequential(Pair(), norms)
    assert freeze_factors(model) == []
    assert len(trained(model)) == 4
    result = Freeze()(capture(model.eval(), torch.randn(2, 8)))
    assert not result.modified
    assert len(trained(result.graph_module)) == 4
    assert freeze_factors(result.graph_module) == []


@pytest.mark.parametrize("call", [lambda: Freeze("papers"), lambda: freeze_factors(small(), "papers")])
def test_schedules_that_are_none(call):
    with pytest.raises(FxlrdError, match="unknown freezing schedule 'papers': did you mean paper") as error:
        call()
    assert "\n" not in str(error.value)


def test_modes_copies_and_the_pass_manager():
    x = images(4, size=12, dtype=torch.float32)
    gm = Freeze()(decomposed(x)).graph_module
    reference = gm(x)
    assert not any(m.training for m in gm.modules())
    gm.train()
    assert all(m.training for m in gm.modules())
    assert torch.equal(gm.eval()(x), reference)
    assert trained(copy.deepcopy(gm)) == SECOND | REST
    managed = PassManager(passes=[Decompose(ranks=RANKS), Freeze()])(capture(small().eval(), x))
    assert managed.modified
    assert trained(managed.graph_module) == SECOND | REST
