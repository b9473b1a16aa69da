from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.fx.passes.infra.pass_manager import PassManager

from fxlrd import FxlrdError, Pipeline, VerificationError, capture
from fxlrd.graph.facts import provenance
from fxlrd.graph.surgery import fork
from fxlrd.passes import Allocate, Calibrate, Decompose
from fxlrd.passes.contract import PassResult, Site


def model():
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)).double().eval()


def x():
    return torch.randn(5, 32).double()


@dataclass(frozen=True)
class Lie:
    """Claims to be exact while it scales a layer."""

    by: float = 1.0

    def __call__(self, gm, progress=None):
        gm = fork(gm)
        old = gm.get_submodule("2")
        new = nn.Linear(48, 32).double()
        new.load_state_dict({k: v * self.by for k, v in old.state_dict().items()})
        gm.set_submodule("2", new)
        return PassResult(gm, (Site("2", True, "as before"),))


@dataclass(frozen=True)
class Widen:
    """Changes the output's dtype."""

    def __call__(self, gm, progress=None):
        gm = fork(gm)
        output = next(n for n in gm.graph.nodes if n.op == "output")
        with gm.graph.inserting_before(output):
            output.replace_input_with(output.args[0], gm.graph.call_method("float", (output.args[0],)))
        gm.recompile()
        return PassResult(gm, (Site("2", False, "narrower"),))


def test_presets():
    assert str(Pipeline.preset("lrd")) == "decompose"
    assert str(Pipeline.preset("ranks").with_options(ratio=3.0)) == "decompose{ratio=3},snap"
    with pytest.raises(FxlrdError, match="did you mean ranks"):
        Pipeline.preset("rank")
    with pytest.raises(FxlrdError, match="no pass of decompose has this option"):
        Pipeline.preset("lrd").with_options(search="grid")
    with pytest.raises(FxlrdError, match="takes passes"):
        Pipeline(["decompose"])


def test_the_ledger_says_what_was_done_and_how_far_outputs_moved():
    net, data = model(), x()
    gm = capture(net, data)
    done = Pipeline([Decompose(ranks=4), Decompose(ranks=4)])(gm)
    first, second = done.ledger
    assert done.modified
    assert [s.name for s in first.sites] == ["0", "2"]
    assert not first.exact
    assert second.sites == ()
    assert second.step_error == 0
    assert second.relative_error == first.relative_error
    moved = done.graph_module(data) - net(data)
    assert first.max_abs_error == pytest.approx(moved.abs().max().item(), rel=1e-12)
    assert first.relative_error == pytest.approx((moved.norm() / net(data).norm()).item(), rel=1e-12)
    assert first.params == sum(p.numel() for p in done.graph_module.parameters())


def test_a_pass_that_only_says_it_is_exact_is_caught():
    gm = capture(model(), x())
    Pipeline([Lie(1.0)])(gm)
    with pytest.raises(VerificationError, match="lie: said to be exact"):
        Pipeline([Lie(1 + 1e-11)])(gm)
    assert Pipeline([Lie(1.1)])(gm, verify=False).ledger[0].relative_error is None


def test_a_changed_dtype_is_caught_even_in_an_approximate_pass():
    with pytest.raises(VerificationError, match=r"output 0 is torch.float32\[5, 32\] instead of torch.float64"):
        Pipeline([Widen()])(capture(model(), x()))


def test_the_callback_sees_each_step_and_the_input_stays():
    seen = []
    gm = capture(model(), x())
    code = gm.code
    done = Pipeline([Decompose(ranks=4), Decompose()])(gm, callback=lambda *step: seen.append(step))
    assert [type(p).__name__ for _, p, _ in seen] == ["Decompose", "Decompose"]
    assert seen[0][2] is seen[1][0]
    assert seen[1][2] is done.graph_module
    assert gm.code == code


def test_a_callback_that_raises_names_the_pass():
    def callback(before, step, after):
        raise KeyError("mine")

    with pytest.raises(FxlrdError, match=r"^decompose: the callback after this pass fails: KeyError: 'mine'$") as error:
        Pipeline([Decompose(ranks=4)])(capture(model(), x()), callback=callback)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_plain_traced_module_works_too_with_and_without_inputs():
    net, data = model(), x()
    gm = torch.fx.symbolic_trace(net)
    blind = Pipeline([Decompose(ranks=99)])(gm)
    assert blind.ledger[0].relative_error is None
    seen = Pipeline([Decompose(ranks=99)])(gm, data)
    assert seen.ledger[0].relative_error < 1e-12
    assert all(provenance(n) is None for n in gm.graph.nodes), "the user's graph is not annotated"


def test_a_training_mode_graph_comes_back_in_training_mode():
    gm = capture(nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5)), torch.randn(2, 32)).train()
    done = Pipeline([Decompose()])(gm)
    assert done.graph_module.training
    assert done.graph_module.get_submodule("1").training
    assert gm.training


def test_a_model_that_is_no_graph_is_refused():
    with pytest.raises(FxlrdError, match="not captured yet"):
        Pipeline([Decompose()])(model())


def test_torchs_own_pass_manager_runs_the_passes():
    net, data = model(), x()
    result = PassManager(passes=[Decompose(ranks=99)], run_checks_after_each_pass=True)(capture(net, data))
    assert result.modified
    torch.testing.assert_close(result.graph_module(data), net(data), rtol=1e-9, atol=1e-9)


def test_auto_in_text_form_and_the_passes_of_a_budget():
    text = str(Pipeline.preset("auto"))
    assert text.split(",")[-1] == "recalibrate"
    assert str(Pipeline.parse(text)) == text
    budget = Pipeline.preset("auto").with_options(latency=0.0, flops=0.4)
    assert "allocate{flops=0.4,measured=32}" in str(budget)
    assert Pipeline.parse("allocate{params=0.5,merge=false,skip=a|b}").passes == (
        Allocate(params=0.5, merge=False, skip=("a", "b")),
    )


def test_the_ledger_has_what_a_pass_says_of_the_whole():
    gm = capture(model(), x())
    done = Pipeline([Calibrate(torch.randn(400, 32).double()), Allocate(params=0.8, merge=False), Decompose()])(gm)
    assert [record.note for record in done.ledger][::2] == ["", ""]
    assert "of params; predicted output error" in done.ledger[1].note
    assert done.ledger[1].sites == ()
    assert done.ledger[1].step_error == 0, "a plan changes nothing"
    assert done.ledger[2].params <= 0.8 * done.ledger[0].params


class BfloatBody(nn.Module):
    """A bfloat16 body and a float32 head, as detectors have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ReLU()).bfloat16()
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)).float())


def test_rounding_is_that_of_the_coarsest_dtype_on_the_way():
    model, x = BfloatBody().eval(), torch.randn(4, 8, 9, 9).bfloat16()
    with torch.no_grad():
        model.body[1].running_var.uniform_(0.5, 2)
    result = Pipeline.parse("merge{mode=exact,norms=true}")(capture(model, x))
    (record,) = result.ledger
    assert [site.name for site in record.sites] == ["body.0"]
    assert 0 < record.relative_error < 0.05
