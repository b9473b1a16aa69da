from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fxlrd import Pipeline, capture
from fxlrd.allocation.doubts import doubt_of_plan
from fxlrd.allocation.plan import Plan, planned
from fxlrd.calibration.holdout import INCOMPARABLE, held_out, record_calibrated
from fxlrd.passes import Calibrate, Decompose


def calibrated(holdout: bool):
    x = torch.randn(100, 24)
    gm = capture(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 20)).eval(), x)
    return Calibrate(list(x.split(10)), holdout=holdout)(gm).graph_module


@pytest.mark.parametrize(("predicted", "doubtful"), [(1e-2, True), (1.0, False), (None, False), (0.0, False)])
def test_a_plan_is_in_doubt_where_held_out_inputs_say_several_times_its_prediction(predicted, doubtful):
    gm = calibrated(holdout=True)
    planned.record(gm, Plan({"0": (4,), "2": (4,)}, predicted=predicted))
    assert doubt_of_plan(gm) is None, "nothing has been changed yet"
    gm = Decompose()(gm).graph_module
    doubt = doubt_of_plan(gm)
    assert (doubt is not None) == doubtful
    assert doubt is None or "predicted (0.01): give more calibration inputs" in doubt


def test_without_inputs_held_out_nothing_is_doubted():
    gm = calibrated(holdout=False)
    planned.record(gm, Plan({"0": (4,)}, predicted=1e-9))
    assert doubt_of_plan(Decompose()(gm).graph_module) is None


def test_outputs_of_other_shapes_are_not_an_error_of_infinity():
    gm = calibrated(holdout=True)
    planned.record(gm, Plan({"0": (4,)}, predicted=1e-2))
    inputs = held_out(gm)
    record_calibrated(gm, replace(inputs, outputs=tuple([t[1:] for t in each] for each in inputs.outputs)))
    assert doubt_of_plan(Decompose()(gm).graph_module) == INCOMPARABLE


def test_a_pipeline_says_so_once_at_its_end():
    gm = calibrated(holdout=True)
    planned.record(gm, Plan({"0": (4,)}, predicted=1e-3))
    run = Pipeline([Decompose(), Decompose(ranks={"2": 4})])(gm)
    first, last = (record.warnings for record in run.ledger)
    assert not first
    assert len(last) == 1
    assert last[0].startswith("the output error on held-out inputs is ")
