from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxlrd import FxlrdError, capture
from fxlrd.allocation.plan import Plan, planned
from fxlrd.graph.captured import propagate
from fxlrd.graph.facts import provenance
from fxlrd.graph.inputs import Inputs
from fxlrd.layers.kinds import LAYERS
from fxlrd.passes import Calibrate, Decompose
from tests.support.models import CalledTwice
from tests.support.results import reasons, roles


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(48, 64, 1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 40),
    )


def image(size: int = 17) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


def test_each_layer_becomes_its_form():
    gm = capture(small(), image())
    result = Decompose(ratio=2)(gm)
    assert result.modified
    found = roles(result.graph_module)
    assert found["0"] == ["original"]
    assert found["3"] == ["first", "core", "last"]
    assert found["4"] == found["7"] == ["first", "last"]
    assert [s.name for s in result.sites] == ["3", "4", "7"]
    assert reasons(result) == {"0": "stem"}
    first = result.graph_module.get_submodule("4.first")
    assert first.stride == (2, 2), "a 1x1 conv's stride saves most on its first factor"
    assert result.graph_module.get_submodule("4.last").stride == (1, 1)


def test_full_rank_is_exact():
    model, x = small().double().eval(), image().double()
    result = Decompose(ranks=999, skip=("0",))(capture(model, x))
    assert len(result.sites) == 3
    torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-9, atol=1e-9)


def test_nothing_to_do_modifies_nothing():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU())
    gm = capture(model, torch.randn(1, 8, 5, 5))
    result = Decompose()(gm)
    assert not result.modified
    assert reasons(result)["0"] == "depthwise"
    assert [n.op for n in result.graph_module.graph.nodes] == [n.op for n in gm.graph.nodes]


def test_the_input_graph_and_its_model_stay_as_they_are():
    model = small()
    before = copy.deepcopy(model.state_dict())
    gm = capture(model, image())
    code = gm.code
    Decompose()(gm)
    assert gm.code == code
    assert [type(m) for m in model] == [type(m) for m in small()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_shared_module_is_replaced_once_for_all_its_calls():
    model, x = CalledTwice(nn.Linear(32, 32)).double().eval(), torch.randn(3, 32).double()
    result = Decompose(ranks=32)(capture(model, x))
    assert [s.name for s in result.sites] == ["a"]
    assert roles(result.graph_module)["a"] == ["first", "last"] * 2
    torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-9, atol=1e-9)


def test_one_module_under_two_names_is_one_site():
    shared = nn.Linear(32, 32)
    model, x = nn.Sequential(shared, nn.ReLU(), shared).double().eval(), torch.randn(3, 32).double()
    result = Decompose(ranks=32)(capture(model, x))
    assert [s.name for s in result.sites] == ["0"]
    torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-9, atol=1e-9)


def test_tied_weights_are_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 32)
            self.inner = nn.Linear(32, 32)
            self.head = nn.Linear(32, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.inner(self.embed(x)))

    result = Decompose()(capture(Tied(), torch.randint(50, (2, 4))))
    assert [s.name for s in result.sites] == ["inner"]
    assert reasons(result) == {"head": "shared-parameter"}


def test_skip_takes_names_globs_and_modules_around():
    model = nn.Sequential(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), nn.Linear(32, 32), nn.Linear(32, 32))
    gm = capture(model, torch.randn(2, 32))
    assert [s.name for s in Decompose(skip=("0", "2"))(gm).sites] == ["1"]
    assert [s.name for s in Decompose(skip=("*.1",))(gm).sites] == ["0.0", "1", "2"]
    assert [s.name for s in Decompose(skip="1")(gm).sites] == ["0.0", "0.1", "2"]
    with pytest.raises(FxlrdError, match="unknown layer '9'"):
        Decompose(skip=("9",))(gm)


def test_ranks_by_name():
    gm = capture(small(), image())
    result = Decompose(ranks={"3": (8, 16), "7": 5})(gm)
    assert [s.note for s in result.sites] == ["tucker2 at rank 8x16", "svd at rank 5"]
    assert reasons(result)["4"] == "unnamed"
    with pytest.raises(FxlrdError, match=r"^4: ranks="):
        Decompose(ranks={"4": (8, 8)})(gm)
    with pytest.raises(FxlrdError, match="at least 1"):
        Decompose(ranks=0)(gm)


@pytest.mark.parametrize("ratio", [1, 0.5, -2, float("nan"), float("inf")])
def test_a_ratio_that_is_none(ratio):
    with pytest.raises(FxlrdError, match="finite number above 1"):
        Decompose(ratio=ratio)


def test_a_ratio_out_of_reach_names_the_layer_and_the_largest():
    gm = capture(small(), image())
    with pytest.raises(FxlrdError, match=r"^3: ratio=1000 .* at most \d"):
        Decompose(ratio=1000)(gm)


def test_narrow_layers_do_not_stop_the_others():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    result = Decompose(ratio=4)(capture(model, torch.randn(2, 64)))
    assert [s.name for s in result.sites] == ["0"]
    assert reasons(result)["1"] == "too-narrow"
    with pytest.raises(FxlrdError, match="smaller ratio"):
        Decompose(ratio=4)(capture(nn.Linear(64, 2), torch.randn(2, 64)))


def test_a_second_run_recognises_factors():
    gm = Decompose()(capture(small(), image())).graph_module
    again = Decompose()(gm)
    assert not again.modified
    assert set(reasons(again).values()) == {
        "factor",
        "stem",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_layout_are_kept(dtype):
    model = small().to(dtype).to(memory_format=torch.channels_last).eval()
    x = image().to(dtype).contiguous(memory_format=torch.channels_last)
    result = Decompose()(capture(model, x))
    assert {p.dtype for p in result.graph_module.parameters()} == {dtype}
    core = result.graph_module.get_submodule("3.core").weight
    assert core.is_contiguous(memory_format=torch.channels_last)
    assert not core.is_contiguous()
    assert result.graph_module(x).dtype == dtype


def test_the_recorded_error_is_the_weights():
    layer = nn.Linear(24, 40).double()
    gm = Decompose(ranks=7)(capture(layer, torch.randn(2, 24).double())).graph_module
    node = next(n for n in gm.graph.nodes if (p := provenance(n)) is not None and p.role == "last")
    sigma = torch.linalg.svdvals(layer.weight)
    expected = (sigma[7:].square().sum() / sigma.square().sum()).sqrt().item()
    assert provenance(node).error == pytest.approx(expected, rel=1e-9)


def test_new_nodes_have_the_shapes_that_a_run_gives():
    x = image()
    gm = Decompose()(capture(small(), x)).graph_module
    inferred = {n.name: n.meta["tensor_meta"] for n in gm.graph.nodes if n.op == "call_module"}
    propagate(gm, Inputs.of(x))
    for node in gm.graph.nodes:
        if node.op == "call_module":
            assert inferred[node.name].shape == node.meta["tensor_meta"].shape
            assert inferred[node.name].dtype == node.meta["tensor_meta"].dtype


def test_gradients_reach_every_factor():
    gm = Decompose()(capture(small(), image())).graph_module.train()
    gm(image()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gm.parameters())


def test_frozen_weights_give_frozen_factors():
    model = small().requires_grad_(False)
    gm = Decompose()(capture(model, image())).graph_module
    assert not any(p.requires_grad for p in gm.parameters())


def test_only_stock_modules_are_emitted():
    gm = Decompose()(capture(small(), image())).graph_module
    parts = [m for name, m in gm.named_modules() if name.endswith((".first", ".core", ".last"))]
    assert len(parts) == 7
    assert all(type(m) in LAYERS for m in parts)


def test_groups_have_one_form_each():
    model, x = nn.Conv2d(64, 96, 3, groups=2, padding=1).double().eval(), torch.randn(1, 64, 9, 9).double()
    gm = capture(model, x)
    result = Decompose(ratio=2)(gm)
    assert [m.groups for m in result.graph_module.get_submodule("0")] == [2, 2, 2]
    full = Decompose(ranks=99)(gm).graph_module
    torch.testing.assert_close(full(x), model(x), rtol=1e-9, atol=1e-9)


def test_factors_are_fitted_where_moments_are_known():
    net, x = small().double().eval(), image().double()
    gm = Calibrate(x)(capture(net, x)).graph_module
    fitted, plain = Decompose()(gm), Decompose(fit=False)(gm)
    assert all(site.note.endswith(", fitted to data") for site in fitted.sites)
    assert not any("fitted" in site.note for site in plain.sites)
    for result, fit in ((fitted, True), (plain, False)):
        assert {p.fitted for n in result.graph_module.graph.nodes if (p := provenance(n)) and p.role != "original"} == {
            fit
        }
    again = Decompose()(capture(net, x)).graph_module
    assert torch.equal(plain.graph_module(x), again(x))


@pytest.mark.usefixtures("without_ridge")
def test_the_predicted_error_is_measured_on_the_calibration_inputs():
    net, x = (
        nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 20)).double().eval(),
        torch.randn(600, 24).double(),
    )
    gm = Decompose(ranks={"2": 5})(Calibrate(x)(capture(net, x)).graph_module).graph_module
    known = next(p for n in gm.graph.nodes if (p := provenance(n)) and p.role == "last")
    y = net(x)
    centred = y - y.mean(0)
    error = ((gm(x) - y).norm() / centred.norm()).item()
    # But for what is added to each direction (RIDGE), to which the error is relative as well.
    assert known.error == pytest.approx(error, rel=1e-3)
    torch.testing.assert_close(gm(x).mean(0), y.mean(0), rtol=1e-9, atol=1e-12)


def test_a_plan_is_carried_out():
    gm = capture(small(), image())
    planned.record(gm, Plan({"3": (8, 12), "7": (5,)}))
    result = Decompose()(gm)
    assert [site.note for site in result.sites] == ["tucker2 at rank 8x12", "svd at rank 5"]
    assert reasons(result) == {"0": "original-planned", "4": "original-planned"}
    assert [site.name for site in Decompose(skip=("7",))(gm).sites] == ["3"]
    assert [site.name for site in Decompose(ranks={"4": 6})(gm).sites] == ["4"], "ranks= comes before a plan"
