from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import efficientnet_b0, resnet18

from fxlrd import Pipeline, capture
from fxlrd.allocation.merges import mergeable
from fxlrd.allocation.plan import Plan, planned, sketch
from fxlrd.graph import cost
from fxlrd.graph.captured import propagate
from fxlrd.graph.guards import why_not_replaceable
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import calls
from fxlrd.passes import Calibrate, Decompose, Merge


def groups_of(gm, *producers: str) -> dict:
    return {name: mergeable(gm, calls(gm, name)[0], why_not_replaceable(gm, norms=True), ()) for name in producers}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if name.endswith("weight")}


def check(model: nn.Module, x: torch.Tensor, plan: Plan) -> None:
    """The sketch has the shapes, dtypes and layouts of what merge and decompose make of the plan."""
    gm = Calibrate(x)(capture(model, x)).graph_module
    planned.record(gm, plan)
    real = Pipeline([Merge(), Decompose()])(gm).graph_module
    before = copy.deepcopy(gm.state_dict())
    drawn = sketch(gm, plan, groups_of(gm, *plan.retained))
    assert shapes(drawn) == shapes(real)
    assert cost.depth(drawn) == cost.depth(real)
    outputs = propagate(drawn, Inputs.of(x))
    propagate(real, Inputs.of(x))
    assert all(bool(t.isfinite().all()) for t in outputs)
    assert cost.flops(drawn) == cost.flops(real)
    for node, other in zip(drawn.graph.nodes, real.graph.nodes, strict=True):
        a, b = node.meta["tensor_meta"], other.meta["tensor_meta"]
        assert (a.shape, a.dtype, a.memory_format) == (b.shape, b.dtype, b.memory_format)
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items()), "the graph is not written into"


@pytest.mark.slow
def test_the_sketch_of_a_residual_network():
    plan = Plan({"layer2.1.conv2": (20, 24), "layer4.1.conv1": (None, 64), "fc": (32,)}, {"layer1.0.conv1": 24})
    check(resnet18().eval(), torch.randn(2, 3, 32, 32), plan)


@pytest.mark.slow
def test_the_sketch_of_a_squeeze_excitation_in_channels_last():
    plan = Plan({"features.8.0": (64,)}, {"features.3.0.block.0.0": 72})
    model = efficientnet_b0().eval().to(memory_format=torch.channels_last)
    check(model, torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last), plan)


def test_the_sketch_of_a_chain_cut_on_both_sides():
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 12), nn.ReLU(), nn.Linear(12, 5)),
    )
    check(model.double().eval(), torch.randn(4, 3, 9, 9).double(), Plan({}, {"2": 8, "5": 4, "8": 6}))


def test_a_plan_is_left_on_the_graph_alone():
    gm = capture(nn.Linear(4, 4), torch.randn(1, 4))
    assert planned(gm) is None
    planned.record(gm, Plan({"0": (2,)}))
    assert planned(gm).ranks == {"0": (2,)}
    assert planned(Decompose()(gm).graph_module) == planned(gm), "passes pass it on"
