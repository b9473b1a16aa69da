from __future__ import annotations

import sys

import pytest
import torch
from torch import fx, nn

import fxlrd
from fxlrd import FxlrdError
from fxlrd.allocation.measures import Latency
from fxlrd.allocation.merges import mergings
from fxlrd.graph.inputs import Inputs
from fxlrd.passes import Allocate, Calibrate, Snap
from fxlrd.progress import quiet
from fxlrd.request import pipeline_for
from fxlrd.timing.cache import Setting
from fxlrd.timing.inductor import served
from fxlrd.timing.int8 import between_convs, quantized
from fxlrd.timing.layers import Place, time_ranks
from fxlrd.timing.models import time_models
from fxlrd.timing.stopwatch import Stopwatch
from tests.support.timers import WeightTimer

CPU = torch.device("cpu")


@pytest.mark.parametrize("step", [Snap(compile="int8"), Allocate(latency=0.5, compile="int8"), Snap(compile=True)])
def test_the_text_form_says_how_layers_are_timed(step):
    text = str(fxlrd.Pipeline([step]))
    assert "compile=" in text
    assert fxlrd.Pipeline.parse(text).passes == (step,)


def test_timings_in_int8_are_kept_apart():
    settings = {Setting.current(CPU, compile) for compile in (False, True, "int8")}
    assert len(settings) == 3


def test_another_way_to_compile_is_refused():
    with pytest.raises(FxlrdError, match="compile='int4': give True, False or \"int8\""):
        fxlrd.compress(nn.Linear(32, 32), torch.zeros(2, 32), compile="int4")
    with pytest.raises(FxlrdError, match="CPUs only"):
        served(nn.Linear(4, 4), Inputs.of(torch.zeros(2, 4, device="meta")), "int8")


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(FxlrdError, match="pip install torchao"):
        served(nn.Linear(4, 4), Inputs.of(torch.zeros(2, 4)), "int8")


def test_without_torchao_nothing_is_begun(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(FxlrdError, match="pip install torchao"):
        pipeline_for(budget=fxlrd.Budget(latency=0.5), calibration=[torch.zeros(2, 4)], compile="int8")


@pytest.mark.slow
@torch.no_grad()
def test_layers_and_models_are_timed_as_torchao_quantises_them():
    pytest.importorskip("torchao", reason="no torchao: pip install torchao")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.Flatten(), nn.Linear(4096, 8)
    )
    net, x = net.eval(), torch.randn(4, 32, 8, 8)
    call = served(net, Inputs.of(x), "int8")
    error = (call(x) - net(x)).norm() / net(x).norm()
    assert 1e-4 < error < 0.1, "in int8 it is not exact, and not wrong"
    timer = WeightTimer(lambda name, weights: 1e-3 * weights)
    result = fxlrd.compress(net, x, pipeline="decompose{ratio=2},snap", compile="int8", timer=timer)
    assert result.report.settings["compile"] == "int8"
    assert "Inductor in int8" in result.report.settings["mode"]
    assert result.model(x).dtype == torch.float32


@pytest.fixture
def done(monkeypatch):
    """What is done in int8, in its order: "quantised" and "run"."""
    done = []
    monkeypatch.setattr("fxlrd.timing.inductor.quantized", lambda module, *_: done.append("quantised") or module)
    monkeypatch.setattr("fxlrd.timing.inductor.compiled", lambda module: lambda x: done.append("run") or module(x))
    return done


def test_all_are_quantised_before_any_is_compiled(done):
    """An export makes torch forget what was compiled before: that would then run without frozen weights."""
    models = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    time_models(models, Inputs.of(torch.zeros(2, 4)), under_inductor="int8", seconds=0.0)
    assert done[:2] == ["quantised"] * 2
    assert "quantised" not in done[2:]


def test_a_layer_is_not_run_before_its_forms_are_quantised(done):
    place = Place(nn.Linear(64, 64), (2, 64), torch.float32, "contiguous", CPU)
    time_ranks([place], [(8,), (16,)], Stopwatch("int8", seconds=0.0, cached=False))
    assert done[:3] == ["quantised"] * 3
    assert "quantised" not in done[3:]


@pytest.mark.parametrize(
    ("compile", "rank", "widths"),
    [("int8", 16, [16, 32, 48]), (True, 8, [*range(8, 64, 8)]), (False, 8, [*range(8, 64, 8)])],
)
def test_in_int8_channels_are_multiples_of_its_vectors(monkeypatch, compile, rank, widths):
    monkeypatch.setattr(Latency, "shares", lambda self, gm, group, counts: dict.fromkeys(counts, 0.5))
    measure = Latency(Stopwatch(compile))
    assert measure.multiple(nn.Linear(64, 64)) == rank
    net, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(128, 8)
    gm = Calibrate([x])(fxlrd.capture(net, x)).graph_module
    (merging,) = mergings(gm, ["0", "2"], measure, (), quiet).values()
    assert [*merging.options] == widths


@pytest.mark.slow
@torch.no_grad()
def test_a_conv_inside_a_model_reads_and_writes_int8():
    pytest.importorskip("torchao", reason="no torchao: pip install torchao")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 32, 1)).eval()
    x = torch.randn(2, 16, 8, 8)
    converted = quantized(net, (x,), {}, lambda prepared: prepared(x))
    inside, q = between_convs(converted, x)
    made, expected = inside(q), converted(x)
    assert q.dtype == made.dtype == torch.uint8
    scale, zero = next(node for node in inside.graph.nodes if node.op == "output").args[0][0].args[1:3]
    assert ((made.double() - zero) * scale - expected).abs().max() < 0.5 * scale + 1e-6, "rounded, and no more"
    calls = [str(node.target) for node in inside.graph.nodes if node.op == "call_function"]
    ours, theirs = calls, [str(n.target) for n in converted.graph.nodes if n.op == "call_function"]
    assert sorted(ours) == sorted(theirs), "the conversion of the input is gone, that of the output is new"


def test_what_could_not_be_quantised_is_timed_as_it_is():
    net = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1)))
    x = torch.zeros(1, 3, 2, 2)
    assert between_convs(net, x) == (net, x)


class _Attending(nn.Module):
    """A layer of each kind that torchao's quantizer finds, or does not: it looks for nn.Linear and F.linear."""

    class Own(nn.Linear):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.own, self.plain = self.Own(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        made, _ = self.attention(x, x, x, need_weights=False)
        return self.plain(self.own(made))


def _linears(converted):
    return [node for node in converted.graph.nodes if node.target is torch.ops.aten.linear.default]


@pytest.mark.slow
@torch.no_grad()
def test_every_linear_is_quantised_in_an_attention_too():
    pytest.importorskip("torchao", reason="no torchao: pip install torchao")
    torch.manual_seed(0)
    net, x = _Attending().eval(), torch.randn(2, 4, 16)
    converted = quantized(net, (x,), {}, lambda prepared: prepared(x))
    linears = _linears(converted)
    read = [str(argument.target) for node in linears for argument in node.args[:2]]
    assert len(linears) == 4, "the three projections of the attention are one, and its output's another"
    assert all("dequantize" in target for target in read)
    exact = net(x)
    assert 0 < (converted(x) - exact).norm() < 0.03 * exact.norm(), "int8 rounds, and no more"


@pytest.mark.slow
@torch.no_grad()
def test_an_encoder_layer_is_quantised_and_not_one_operator():
    pytest.importorskip("torchao", reason="no torchao: pip install torchao")
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(2, 4, 16)
    converted = quantized(net, (x,), {}, lambda prepared: prepared(x))
    assert len(_linears(converted)) == 4
    assert torch.backends.mha.get_fastpath_enabled(), "as it was"
    exact = net(x)
    assert 0 < (converted(x) - exact).norm() < 0.03 * exact.norm()
