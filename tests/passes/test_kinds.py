"""Convs of one, two and three dimensions, transposed or not, through every pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd import capture
from fxlrd.allocation.plan import Plan, planned, sketch
from fxlrd.graph import cost
from fxlrd.graph.facts import provenance, statistics
from fxlrd.graph.surgery import calls
from fxlrd.layers.kinds import TRANSPOSED
from fxlrd.layers.weights import weight_blocks
from fxlrd.passes import Allocate, Branch, Calibrate, Decompose, Freeze, Merge, Refit, Snap
from fxlrd.timing.layers import placed
from fxlrd.timing.workload import example, layout
from tests.support.kinds import KINDS
from tests.support.results import reasons


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def captured(model, x):
    return capture(model.double().eval(), x.double())


def inputs(kind, count=4):
    return torch.randn(count, *KINDS[kind][1]).double()


def test_decompose_gives_a_form_with_factors_of_the_kind(kind):
    model = nn.Sequential(KINDS[kind][0](), nn.GELU()).double()
    x = inputs(kind)
    result = Decompose(ratio=2)(captured(model, x))
    assert [s.note.split(" at")[0] for s in result.sites] == ["tucker2"]
    gm = result.graph_module
    same = nn.Sequential(*gm.get_submodule("0"), nn.GELU())
    torch.testing.assert_close(gm(x), same(x), rtol=0, atol=0)
    plain = kind.replace("Transpose", "")
    assert [type(m).__name__ for m in gm.get_submodule("0")] == [plain, kind, plain]
    for node in gm.graph.nodes:
        if node.op == "call_module" and provenance(node).name == "0":
            made = gm.get_submodule(str(node.target))(torch.zeros(node.args[0].meta["tensor_meta"].shape).double())
            assert node.meta["tensor_meta"].shape == made.shape
    full = Decompose(ranks=99)(captured(model, x)).graph_module
    torch.testing.assert_close(full(x), model(x), rtol=1e-9, atol=1e-9)


def test_calibrate_and_decompose_without_a_batch_axis(kind):
    model, x = nn.Sequential(KINDS[kind][0]()), inputs(kind)[0]
    gm = Calibrate(x)(captured(model, x)).graph_module
    assert statistics(calls(gm, "0")[0]).input_moments.count == x[0].numel()
    full = Decompose(ranks=99)(gm).graph_module
    torch.testing.assert_close(full(x), model(x), rtol=1e-9, atol=1e-9)
    fitted = Decompose(ranks=8)(gm).graph_module
    assert fitted(x).shape == model(x).shape


class Sized(nn.Module):
    """An upsampling whose size is that of another tensor."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ConvTranspose2d(24, 16, 3, 2, padding=1)

    def forward(self, x):
        return self.up(self.down(x).relu(), output_size=x.shape[2:])


def test_an_output_size_in_the_call_leaves_the_layer_alone():
    model, x = Sized(), torch.randn(2, 16, 6, 7).double()
    gm = captured(model, x)
    result = Decompose(ratio=2)(gm)
    assert [s.name for s in result.sites] == ["down"]
    assert reasons(result) == {"up": "more-inputs"}
    assert result.graph_module(x).shape == x.shape
    calibrated = Calibrate(x, effects=8, patches=999)(gm).graph_module
    assert reasons(Decompose(ratio=2)(calibrated)) == reasons(result)


@pytest.mark.parametrize("stem", [nn.Conv1d(2, 32, 5), nn.Conv1d(4, 32, 5), nn.Conv1d(5, 32, 5)])
def test_the_stem_of_a_sequence_model(stem):
    model = nn.Sequential(stem, nn.ReLU(), nn.Conv1d(32, 32, 3))
    result = Decompose(ratio=1.5)(capture(model, torch.randn(2, stem.in_channels, 12)))
    assert ("0" in reasons(result)) == (stem.in_channels <= 4)
    assert [s.name for s in result.sites][-1] == "2"


def test_a_subclass_with_a_forward_of_its_own_is_left_alone(kind):
    module, shape = KINDS[kind][0](), KINDS[kind][1]
    module.__class__ = type("Own", (type(module),), {"forward": lambda self, x: super(type(self), self).forward(x) * 2})
    result = Decompose()(capture(nn.Sequential(module), torch.randn(2, *shape)))
    assert reasons(result)["0"] == "subclass"


@pytest.mark.usefixtures("without_ridge")
@pytest.mark.parametrize("kind", ["Conv1d", "Conv3d"])
def test_the_predicted_error_is_measured_on_the_calibration_inputs(kind):
    # So few inputs in a batch that all of their patches are sampled.
    batch = {"Conv1d": 90, "Conv3d": 25}[kind]
    model, x = nn.Sequential(KINDS[kind][0]()), inputs(kind, 3 * batch) + 1
    gm = Decompose(ranks=7)(Calibrate(list(x.split(batch)), patches=999)(captured(model, x)).graph_module).graph_module
    y, actual = model(x).transpose(0, 1).flatten(1), gm(x).transpose(0, 1).flatten(1)
    (last,) = calls(gm, "0.last")
    error = (actual - y).norm() / (y - y.mean(1, keepdim=True)).norm()
    assert provenance(last).fitted
    # But for what is added to each direction (RIDGE).
    assert provenance(last).error == pytest.approx(error.item(), rel=1e-3)
    torch.testing.assert_close(actual.mean(1), y.mean(1), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("without_ridge")
@pytest.mark.parametrize("weighted", [False, True])
def test_the_predicted_error_of_an_upsampling(weighted):
    model = nn.Sequential(KINDS["ConvTranspose2d"][0](), *([nn.Conv2d(32, 5, 1)] if weighted else []))
    x = inputs("ConvTranspose2d", 100)
    x = x - x.mean((0, 2, 3), keepdim=True)  # else each tap has a mean of its own, and one bias cannot make up for all
    gm = Calibrate(x, effects=100 * weighted)(captured(model, x)).graph_module
    gm = Decompose(ranks={"0": (9, 11)})(gm).graph_module
    up = model[0]
    error = ((gm.get_submodule("0")(x) - up(x)).norm() / (up(x) - up.bias.view(-1, 1, 1)).norm()).item()
    (last,) = calls(gm, "0.last")
    if weighted:
        assert provenance(last).error < error, "what matters little may be far off"
    else:
        assert provenance(last).error == pytest.approx(error, rel=1e-3)


def test_importance_has_the_size_of_the_channel_axis():
    """Γ of a Conv1d and of what comes before an upsampling: their axes are those of the channels."""
    model = nn.Sequential(nn.Conv1d(5, 6, 3), nn.ConvTranspose1d(6, 7, 2, 2), nn.Flatten(), nn.Linear(56, 3))
    gm = Calibrate(torch.randn(4, 5, 6).double(), effects=4)(captured(model, torch.randn(4, 5, 6))).graph_module
    sizes = [len(statistics(calls(gm, name)[0]).importance) for name in "013"]
    assert sizes == [6, 7, 3]


@pytest.mark.parametrize("options", [{}, {"mode": "exact", "norms": True}, {"mode": "relocate"}], ids=str)
def test_merge_leaves_other_kinds_than_conv2d_alone(kind, options):
    module, shape = KINDS[kind][0](), KINDS[kind][1]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(shape) - 1]
    after = getattr(nn, kind)(32, 24, 1)
    model, x = nn.Sequential(module, norm(32), nn.ReLU(), after, getattr(nn, kind)(24, 8, 1)), inputs(kind)
    gm = Calibrate(x)(captured(model, x)).graph_module
    result = Merge(**options)(gm)
    assert not result.modified
    assert result.graph_module.code == gm.code
    codes = set(reasons(result).values())
    assert codes <= {"layer-type"}
    assert codes or options.get("mode") == "exact" or kind.endswith("3d")


def test_merge_folds_a_norm_into_a_conv_before_an_upsampling():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 2, 2)).double()
    model[1].running_mean.normal_()
    gm, x = captured(model, torch.randn(2, 8, 5, 5)), torch.randn(2, 8, 5, 5).double()
    result = Merge(mode="exact", norms=True)(gm)
    assert [s.note for s in result.sites] == ["took in 1"]
    torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-9, atol=1e-9)


def test_relocate_leaves_transposed_cores_alone():
    model = nn.Sequential(nn.Conv2d(8, 24, 1), nn.ReLU(), nn.ConvTranspose2d(24, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 1))
    result = Merge(mode="relocate", ranks=4)(captured(model, torch.randn(1, 8, 5, 5)))
    assert reasons(result) == {"2": "layer-type"}


def stood_for(form):
    """The weight (S, C, K) of the one conv that a branched form stands for."""
    groups = form.core.groups
    first, last = form.first.weight.flatten(1), form.last.weight.flatten(1)
    cores = weight_blocks(form.core).flatten(3)
    parts = zip(first.chunk(groups), cores, last.chunk(groups, dim=1), strict=True)
    return sum(torch.einsum("sa,abk,bc->sck", v, core, u) for u, core, v in parts)


@pytest.mark.parametrize("ranks", [(8, 12), (9, 14)])
def test_branch_error_and_outputs(kind, ranks):
    model, x = nn.Sequential(KINDS[kind][0]()), inputs(kind)
    gm = Decompose(ranks=ranks)(captured(model, x)).graph_module
    result = Branch(groups=4)(gm)
    form = result.graph_module.get_submodule("0")
    assert [(type(m).__name__, m.groups) for m in form][1] == (kind, 4)
    weight = weight_blocks(model[0])[0].flatten(2)
    error = ((stood_for(form) - weight).norm() / weight.norm()).item()
    core = provenance(calls(result.graph_module, "0.core")[0])
    assert core.error == pytest.approx(error, rel=1e-9)
    # It does what the layer with that weight does.
    stand_in = copy.deepcopy(model[0])
    kernel = stood_for(form).unflatten(2, stand_in.kernel_size)
    stand_in.weight.data = kernel.transpose(0, 1) if isinstance(stand_in, TRANSPOSED) else kernel
    torch.testing.assert_close(result.graph_module(x), stand_in(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("batched", [True, False])
def test_branch_times_the_real_core(kind, batched):
    model, x = nn.Sequential(KINDS[kind][0]()), inputs(kind)
    x = x if batched else x[0]
    result = Branch(timed=True)(Decompose(ranks=(8, 12))(captured(model, x)).graph_module)
    assert result.graph_module(x).shape == model(x).shape


@pytest.mark.parametrize("ranks", [(4, 5), (4, None), (None, 5)])
def test_refit_lowers_the_error(kind, ranks):
    model, x = nn.Sequential(KINDS[kind][0](), nn.Tanh(), KINDS[kind][0]()).double().eval(), inputs(kind, 40)
    model[2] = type(model[2])(32, 32, 3, padding=1).double()
    gm = Calibrate(x)(capture(model, x)).graph_module
    gm = Decompose(ranks=ranks)(gm).graph_module
    result = Refit(x, guard=False)(gm)
    if isinstance(model[0], TRANSPOSED) and ranks[1] is None:
        assert set(reasons(result).values()) == {"layer-type"}
        return
    assert [s.name for s in result.sites] == ["0", "2"]

    def error(g):
        return (g(x) - model(x)).square().sum().item()

    assert error(result.graph_module) < error(gm)


def test_freeze_trains_the_core(kind):
    model, x = nn.Sequential(KINDS[kind][0]()), inputs(kind)
    gm = Freeze()(Decompose()(captured(model, x)).graph_module).graph_module
    assert [p.weight.requires_grad for p in gm.get_submodule("0")] == [False, True, False]


@pytest.mark.parametrize("search", ["grid", "algorithm1"])
def test_snap_keeps_the_output_shape(kind, search):
    model, x = nn.Sequential(KINDS[kind][0]()), inputs(kind)
    gm = Decompose(ranks=16)(captured(model, x)).graph_module
    result = Snap(search=search, floor=0.9, seconds=0.1)(gm)
    assert len(result.sites) + len(result.skipped) == 1
    assert result.graph_module(x).shape == model(x).shape


def test_snap_times_volumes_in_their_memory_format():
    model = nn.Sequential(nn.Conv3d(32, 32, 3)).to(memory_format=torch.channels_last_3d)
    x = torch.randn(1, 32, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    gm = Decompose(ranks=8)(capture(model, x)).graph_module
    core = gm.get_submodule("0.core").weight
    assert core.is_contiguous(memory_format=torch.channels_last_3d)
    assert not core.is_contiguous()
    first = calls(gm, "0.first")
    (where,) = placed(first, provenance(first[0]).original)
    assert where.layout == "channels_last_3d"
    timed = example(where.shape, where.dtype, where.layout, where.device)
    assert timed.stride() == x.stride()
    images = capture(nn.Sequential(nn.Conv2d(4, 4, 1)), torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last))
    (where,) = placed(calls(images, "0"), images.get_submodule("0"))
    assert where.layout == "channels_last"
    assert layout(
        next(iter(captured(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)).graph.nodes)).meta["tensor_meta"]
    )


def test_the_report_has_the_memory_format_of_volumes():
    model = nn.Sequential(nn.Conv3d(5, 8, 3)).to(memory_format=torch.channels_last_3d)
    x = torch.randn(1, 5, 4, 5, 6)
    for batch, layout_name in ((x, "contiguous"), (x.to(memory_format=torch.channels_last_3d), "channels_last")):
        result = fxlrd.compress(model, batch, ratio=1.2, measure=False)
        assert result.report.settings["layout"] == layout_name


@pytest.mark.parametrize("bias", [True, False])
def test_allocate_notes_the_parameters_of_its_plan(kind, bias):
    model, x = nn.Sequential(KINDS[kind][0](), nn.ReLU(), KINDS[kind][0]()), inputs(kind, 30)
    model[2] = type(model[2])(32, 8, 3, padding=1, bias=bias)
    gm = Calibrate(x, effects=4)(captured(model, x)).graph_module
    result = Allocate(params=0.3)(gm)
    after = Decompose()(result.graph_module).graph_module
    assert len(planned(result.graph_module).ranks) == 2
    assert result.note.startswith(f"{cost.params(after) / cost.params(gm):.3f} of params")


def test_a_sketch_averages_its_inputs(kind):
    """What is timed neither overflows nor vanishes, however narrow a layer gets."""
    wide = type(KINDS[kind][0]())(64, 4, 3)
    model, x = nn.Sequential(wide), torch.ones(1, 64, *[7] * (len(KINDS[kind][1]) - 1)).double()
    nn.init.zeros_(wide.bias)
    made = sketch(captured(model, x), Plan({"0": (4, 2)}), {})(x)
    assert made.max().item() == pytest.approx(1, rel=1e-9)
