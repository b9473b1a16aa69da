from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn.functional import conv2d

import fxlrd
from fxlrd import FxlrdError, Pipeline, capture
from fxlrd.graph import cost
from fxlrd.graph.facts import provenance
from fxlrd.graph.surgery import calls
from fxlrd.passes import Branch, Decompose
from tests.support.models import CalledTwice
from tests.support.results import reasons
from tests.support.tensors import images
from tests.support.timers import FakeTimer


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1),
    )


def decomposed(model: nn.Module, x: torch.Tensor, ranks=(8, 16)):
    return Decompose(ranks={"2": ranks})(capture(model.double().eval(), x)).graph_module


def kernel(form: nn.Module) -> torch.Tensor:
    """Return the weight of the one conv that a branched form stands for."""
    n = form.core.groups
    first, last = form.first.weight.flatten(1), form.last.weight.flatten(1)
    parts = zip(first.chunk(n), form.core.weight.chunk(n), last.chunk(n, dim=1), strict=True)
    return sum(torch.einsum("sa,abij,bc->scij", v, core, u) for u, core, v in parts)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_the_grouped_conv_is_a_sum_of_branches(groups):
    x = images(size=11)
    gm = decomposed(small(), x)
    result = Branch(groups=groups)(gm)
    assert [s.name for s in result.sites] == ["2"]
    assert not result.sites[0].exact
    form = result.graph_module.get_submodule("2")
    assert [m.groups for m in form] == [1, groups, 1]
    given = torch.randn(2, 24, 9, 9).double()
    branches = sum(
        conv2d(conv2d(conv2d(given, u), core, stride=2, padding=1), v)
        for u, core, v in zip(
            form.first.weight.chunk(groups),
            form.core.weight.chunk(groups),
            form.last.weight.chunk(groups, dim=1),
            strict=True,
        )
    )
    torch.testing.assert_close(form(given), branches + form.last.bias.view(-1, 1, 1), rtol=1e-9, atol=1e-9)
    old = gm.get_submodule("2")
    assert form.core.weight.numel() * groups == old.core.weight.numel()
    assert form.first.weight.shape == old.first.weight.shape
    assert form.last.weight.shape == old.last.weight.shape
    roles = [provenance(n).role for n in result.graph_module.graph.nodes if provenance(n) and provenance(n).name == "2"]
    assert roles == ["first", "branch", "last"]


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_hidden_branches_of_an_orthonormal_form_are_found(groups):
    x = images(size=11)
    for seed in range(3):
        torch.manual_seed(seed)
        model = small().double()
        core = torch.zeros(16, 8, 3, 3).double()
        for i in range(groups):
            rows, columns = (slice(i * r // groups, (i + 1) * r // groups) for r in (16, 8))
            core[rows, columns] = torch.randn_like(core[rows, columns])
        u, v = (torch.linalg.qr(torch.randn(n, r).double())[0] for n, r in ((24, 8), (32, 16)))
        model[2].weight.data = torch.einsum("sa,abij,cb->scij", v, core, u)
        result = Branch(groups=groups)(decomposed(model, x))
        form = result.graph_module.get_submodule("2")
        torch.testing.assert_close(kernel(form), model[2].weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-9, atol=1e-9)
        assert "100.0 % of its energy kept" in result.sites[0].note
        assert provenance(calls(result.graph_module, "2.core")[0]).error < 1e-9


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("groups", "ranks"), [(2, (8, 16)), (4, (10, 15)), (4, (8, 16)), (8, (9, 17)), (3, (8, 16))])
def test_the_recorded_error_is_the_weights(groups, ranks, rotate):
    model, x = small().double(), images(size=11)
    result = Branch(groups=groups, rotate=rotate)(decomposed(model, x, ranks))
    form = result.graph_module.get_submodule("2")
    error = ((kernel(form) - model[2].weight).norm() / model[2].weight.norm()).item()
    for part in ("first", "core", "last"):
        known = provenance(calls(result.graph_module, f"2.{part}")[0])
        assert known.error == pytest.approx(error, rel=1e-9)
        assert known.ranks == tuple(r // groups * groups for r in ranks)
    assert f"weight error {error:.2g}" in result.sites[0].note


def energies(note: str) -> tuple[float, float]:
    kept, plain = re.search(r"([\d.]+) % of its energy kept \(([\d.]+) % without rotation\)", note).groups()
    return float(kept), float(plain)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_rotation_keeps_more_and_says_so(groups):
    gm = decomposed(small(), images(size=11))
    rotated, cut = Branch(groups=groups)(gm), Branch(groups=groups, rotate=False)(gm)
    kept, plain = energies(rotated.sites[0].note)
    assert kept > plain
    assert energies(cut.sites[0].note) == (plain, plain)
    node = [calls(r.graph_module, "2.core")[0] for r in (rotated, cut)]
    assert provenance(node[0]).error < provenance(node[1]).error
    old, new = gm.get_submodule("2").core.weight, cut.graph_module.get_submodule("2").core.weight
    torch.testing.assert_close(new[0].abs(), old[0, : 8 // groups].abs(), rtol=1e-9, atol=1e-9)


def test_trained_factors_are_measured_by_the_kernel_that_they_make():
    """Training leaves the outer factors anything but orthonormal: the same kernel gives the same branches."""
    x = images(size=11)
    gm = decomposed(small(), x)
    expected = kernel(Branch(groups=4)(gm).graph_module.get_submodule("2"))
    form = gm.get_submodule("2")
    a, b = torch.randn(8, 8).double(), torch.randn(16, 16).double()
    form.first.weight.data = torch.einsum("ab,bcij->acij", a, form.first.weight)
    form.core.weight.data = torch.einsum("ab,bcij,cd->adij", b, form.core.weight, a.inverse())
    form.last.weight.data = torch.einsum("sb,ba->sa", form.last.weight.flatten(1), b.inverse())[..., None, None]
    found = Branch(groups=4)(gm).graph_module.get_submodule("2")
    assert (kernel(found) - kernel(form)).norm() <= 1.05 * (expected - kernel(form)).norm()


def test_what_is_left_alone_says_why():
    x = images(size=11)
    gm = Decompose(ranks={"2": (8, 16), "4": 6})(capture(small().double().eval(), x)).graph_module
    result = Branch(groups=2)(gm)
    assert reasons(result) == {"4": "no-core"}
    again = Branch(groups=2)(result.graph_module)
    assert not again.modified
    assert reasons(again)["2"] == "branched"
    assert reasons(Branch(groups=9)(gm))["2"] == "too-many-groups"
    assert reasons(Branch(groups=1)(gm))["2"] == "one-branch"
    assert reasons(Branch(skip="2")(gm))["2"] == "skip"
    one_sided = Branch()(decomposed(small(), x, (8, None)))
    assert reasons(one_sided)["2"] == "no-core"
    assert not one_sided.modified
    grouped = capture(nn.Sequential(nn.Conv2d(16, 16, 3, groups=2)).double().eval(), torch.randn(1, 16, 5, 5).double())
    assert reasons(Branch(groups=2)(Decompose(ranks=4)(grouped).graph_module))["0"] == "branched"


def test_nothing_to_do_modifies_nothing():
    x = images(size=11)
    gm = capture(small().double().eval(), x)
    result = Branch()(gm)
    assert not result.modified
    assert result.graph_module.code == gm.code
    assert torch.equal(result.graph_module(x), gm(x))


def test_a_factor_with_a_bias_of_its_own_is_left_alone():
    x = images(size=11)
    gm = decomposed(small(), x)
    gm.get_submodule("2").first.bias = nn.Parameter(torch.zeros(8).double())
    assert reasons(Branch(groups=2)(gm))["2"] == "biased-core"


@pytest.mark.parametrize("groups", [0, -1, 2.5, "4"])
def test_numbers_of_branches_that_are_none(groups):
    with pytest.raises(FxlrdError, match="a whole number of at least 1"):
        Branch(groups=groups)


def test_names_that_fit_no_layer():
    with pytest.raises(FxlrdError, match="unknown layer '9'"):
        Branch(skip=("9",))(decomposed(small(), images(size=11)))


def test_a_shared_layer_is_branched_once_for_all_its_calls():
    x = torch.randn(2, 12, 6, 6).double()
    gm = Decompose(ranks=(8, 8))(capture(CalledTwice(nn.Conv2d(12, 12, 3, padding=1)).double().eval(), x)).graph_module
    result = Branch(groups=2)(gm)
    assert [s.name for s in result.sites] == ["a"]
    form = result.graph_module.get_submodule("a")
    torch.testing.assert_close(result.graph_module(x), form(form(x).relu()), rtol=1e-12, atol=1e-12)
    assert [provenance(n).role for n in calls(result.graph_module, "a.core")] == ["branch"] * 2


def test_the_input_graph_stays_and_copies_train():
    x = images(size=11)
    gm = decomposed(small(), x)
    reference = gm(x)
    result = Branch(groups=4)(gm).graph_module
    assert torch.equal(gm(x), reference)
    twin, out = copy.deepcopy(result), result(x)
    assert torch.equal(twin(x), out)
    result.train()
    assert all(m.training for m in result.modules())
    result(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in result.parameters())
    assert all(p.grad is None for p in twin.parameters())
    assert torch.equal(result.eval()(x), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_memory_format_are_kept(dtype):
    model = small().to(dtype).to(memory_format=torch.channels_last).eval()
    x = images(size=11).to(dtype).contiguous(memory_format=torch.channels_last)
    gm = Branch(groups=4)(Decompose(ranks={"2": (8, 16)})(capture(model, x)).graph_module).graph_module
    assert {p.dtype for p in gm.parameters()} == {dtype}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in gm.parameters() if p.dim() == 4)
    assert gm(x).dtype == dtype


def test_the_timed_number_is_the_smallest_that_none_beats():
    gm = decomposed(small(), images(size=11))
    timer = FakeTimer(lambda name, _: {"1": 1.0, "2": 0.62, "4": 0.6, "8": 0.9}[name], spread=0.02)
    result = Branch(timed=True, timer=timer)(gm)
    assert timer.rounds[0] == ["1", "2", "4", "8"], "16 is more than the smallest rank"
    assert result.graph_module.get_submodule("2").core.groups == 2
    asked = len(timer.rounds)
    Branch(timed=True, timer=timer)(gm)
    assert len(timer.rounds) == asked, "what is on disk is not timed again"


def test_through_compress_inplace_and_the_text_form():
    model, x = small().double().eval(), images(size=11)
    given = "decompose{ranks=8},branch{groups=4,skip=4}"
    assert str(Pipeline.parse(given)) == "decompose{ranks=8},branch{skip=4}"
    apart = fxlrd.compress(model, x, pipeline=given, measure=False)
    result = fxlrd.compress(model, x, pipeline=given, measure=False, inplace=True)
    torch.testing.assert_close(model(x), apart.model(x), rtol=1e-9, atol=1e-9)
    (row,) = (row for row in result.report.layers if row["name"] == "2")
    assert row["decision"] == "branched"
    assert row["params"] == cost.params(model[2])


def test_the_pass_manager_runs_it():
    x = images(size=11)
    result = PassManager(passes=[Decompose(ranks=8, skip=("0",)), Branch(groups=2)])(
        capture(small().double().eval(), x)
    )
    assert result.modified
    assert result.graph_module.get_submodule("2").core.groups == 2
