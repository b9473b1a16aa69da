from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from fxlrd import FxlrdError, Pipeline, capture
from fxlrd.calibration.holdout import held_out
from fxlrd.errors import Reason
from fxlrd.graph.facts import provenance
from fxlrd.passes import PASSES, Calibrate, Decompose, Recalibrate, Refit
from fxlrd.passes.contract import Site, Skip
from fxlrd.passes.driver import NEEDS, check_needs, start

LEFT, FIRST, WORSE = Reason("skip", "skip=0"), Reason("first", "first"), Reason("worse", "worse")


@dataclass(frozen=True)
class Double:
    """Doubles the weights of linear layers."""

    needs: ClassVar[tuple[str, ...]] = ()

    skip: tuple[str, ...] = ()

    def __call__(self, gm, progress=lambda items, label: items):
        run = start(self, gm, progress, named=self.skip)
        run.each(run.gm.graph.find_nodes(op="call_module"), lambda node: self._double(run.gm, node))
        return run.result("doubled")

    def _double(self, gm, node):
        module = gm.get_submodule(node.target)
        if not isinstance(module, nn.Linear):
            return None
        if node.target in self.skip:
            return Skip(node.target, LEFT)
        new = nn.Linear(4, 4)
        new.load_state_dict({k: 2 * v for k, v in module.state_dict().items()})
        gm.set_submodule(node.target, new)
        return Site(node.target, False, "doubled")


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()


def x():
    return torch.randn(3, 4)


def test_a_run_rewrites_a_copy_and_records_what_was_done():
    gm, bars = capture(net(), x()), []

    def progress(items, label):
        bars.append((label, len(items)))
        return items

    result = Double(skip=("0",))(gm, progress)
    assert result.sites == (Site("2", False, "doubled"),)
    assert result.skipped == (Skip("0", LEFT),)
    assert result.note == "doubled"
    assert result.modified
    assert bars == [("double", 3)]
    assert result.graph_module.get_submodule("0") is gm.get_submodule("0")
    assert torch.equal(result.graph_module.get_submodule("2").weight, 2 * gm.get_submodule("2").weight)


def test_a_run_annotates_its_copy_alone():
    gm = torch.fx.symbolic_trace(net())
    result = Double()(gm)
    assert [provenance(n).name for n in result.graph_module.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    assert all(provenance(n) is None for n in gm.graph.nodes)


def test_a_run_refuses_models_and_names_that_fit_no_layer():
    with pytest.raises(FxlrdError, match="not captured yet"):
        Double()(net())
    with pytest.raises(FxlrdError, match="unknown layer '9'"):
        Double(skip=("9",))(capture(net(), x()))


def test_an_undone_run_returns_the_graph_as_it_came_in():
    gm, data = capture(net(), x()), x()
    run = start(Double(), gm)
    run.add(Skip("0", FIRST))
    run.gm.set_submodule("2", nn.Identity())
    run.add(Site("2", False, "removed"))
    result = run.undone(WORSE, "a note")
    assert not result.modified
    assert result.skipped == (Skip("0", FIRST), Skip("2", WORSE))
    assert result.note == "a note"
    assert result.graph_module is not gm
    assert torch.equal(result.graph_module(data), gm(data))


def test_a_graph_that_is_broken_does_not_leave_the_run():
    run = start(Double(), capture(net(), x()))
    (node,) = run.gm.graph.find_nodes(op="call_module", target="2")
    node.target = "no.such.module"
    with pytest.raises(RuntimeError, match=r"no\.such\.module"):
        run.result()


def test_every_pass_declares_what_it_needs():
    for cls in PASSES.values():
        assert set(getattr(cls, "needs", ())) <= set(NEEDS)
        assert set(getattr(cls, "leaves", ())) <= set(NEEDS)


NO_DATA = "no calibration inputs; give calibration= (on the command line --calibration)"
NO_REFERENCE = "the original network is not known: run calibrate before the passes that rewrite it"


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Decompose(ranks=2), Calibrate()], f"calibrate: {NO_DATA}"),
        ([Decompose(ranks=2), Recalibrate()], f"recalibrate: {NO_DATA}"),
        ([Decompose(ranks=2), Refit(x())], f"refit: {NO_REFERENCE}"),
        ([Refit(), Calibrate()], f"refit: {NO_DATA}"),
        ([Decompose(ranks=2), Refit(x()), Calibrate(x())], f"refit: {NO_REFERENCE}"),
    ],
)
def test_needs_are_checked_before_anything_runs(passes, message):
    ran = []
    with pytest.raises(FxlrdError) as error:
        Pipeline(passes)(capture(net(), x()), callback=lambda *step: ran.append(step))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not ran


def test_a_pass_that_is_called_alone_checks_its_needs():
    gm = capture(net(), x())
    for step, message in ((Calibrate(), NO_DATA), (Recalibrate(), NO_DATA), (Refit(x()), NO_REFERENCE)):
        with pytest.raises(FxlrdError) as error:
            step(gm)
        assert message in str(error.value)


def test_needs_are_met_by_an_earlier_pass_or_an_earlier_pipeline():
    data, gm = torch.randn(40, 4), capture(net(), x())
    assert Pipeline([Calibrate(data), Decompose(ranks=2), Refit(data)])(gm).modified
    calibrated = Pipeline([Calibrate(data, holdout=True)])(gm).graph_module
    later = Pipeline([Decompose(ranks=2), Refit(data)])(calibrated)
    assert [record.name for record in later.ledger] == ["decompose", "refit"]
    assert held_out(later.graph_module) is held_out(calibrated)


def test_a_pass_that_declares_nothing_may_leave_anything():
    class Own:
        def __call__(self, gm, progress=None):
            return Calibrate(torch.randn(40, 4))(gm)

    check_needs([Own(), Refit(x())], capture(net(), x()))
    with pytest.raises(FxlrdError, match="run calibrate before"):
        check_needs([Refit(x()), Own()], capture(net(), x()))
