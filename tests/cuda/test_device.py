"""What runs on a GPU gives what it gives on the CPU. The same bodies run on a pretended one, on any machine."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn

import fxlrd
from fxlrd import Budget, Pipeline, capture
from fxlrd.graph.compare import difference, rounding, rounding_of_kernels
from fxlrd.graph.inputs import tensors
from fxlrd.timing.cache import Cache, Entry, Ratio, Setting
from fxlrd.timing.clock import compare
from tests.support.cases import cases
from tests.support.models import ResidualNet, randomise_norms
from tests.support.timers import WeightTimer

CALIBRATE = "calibrate{patches=1152,effects=64,holdout=true}"
PASSES = {
    "decompose": "decompose{ratio=2}",
    "decompose, fitted": f"{CALIBRATE},decompose{{ratio=2}}",
    "snap": "decompose{ratio=2},snap{cache=false}",
    "merge, interpolative": f"{CALIBRATE},merge",
    "merge, exact": "decompose{ratio=2},merge{mode=exact,norms=true}",
    "merge, relocate": "decompose{ratio=2},merge{mode=relocate}",
    "branch": "decompose{ratio=2},branch{groups=2}",
    "freeze": "decompose{ratio=2},freeze",
    "allocate": f"{CALIBRATE},allocate{{params=0.6,measured=8}},merge,decompose",
    "allocate, latency": f"{CALIBRATE},allocate{{latency=0.6,measured=8,cache=false}},merge,decompose",
    "refit": f"{CALIBRATE},decompose{{ratio=2}},refit",
    "recalibrate": f"{CALIBRATE},decompose{{ratio=2}},recalibrate",
}


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(ResidualNet(width=16)).to(dtype).eval()


def batches(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(6)]


def run(text: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    data = [x.to(device) for x in batches(dtype)]
    pipeline = Pipeline.parse(text)
    if pipeline.reads("calibration"):
        pipeline = pipeline.with_options(calibration=data)
    if pipeline.reads("timer"):
        pipeline = pipeline.with_options(timer=WeightTimer(lambda name, weights: 1e-3 * weights))
    return pipeline(capture(model(dtype).to(device), data[0])).graph_module


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("text", cases(PASSES.values(), slow=[PASSES["snap"], PASSES["allocate, latency"]]), ids=PASSES)
def test_each_pass_gives_what_it_gives_on_the_cpu(text, dtype, device):
    cpu = torch.device("cpu")
    there, here = run(text, device, dtype), run(text, cpu, dtype)
    assert {p.device.type for p in there.parameters()} == {device.type}
    x = batches(dtype)[-1][:3]
    outputs = tensors(there(x.to(device)))
    allowed = rounding_of_kernels(outputs)
    assert difference([t.to(cpu) for t in outputs], tensors(here(x)), "output").relative < allowed


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=torch.float64)
    return nn.Sequential(nn.Linear(16, 16, dtype=torch.float64), nn.TransformerEncoder(layer, 2)).eval()


def test_an_attention_gives_what_it_gives_on_the_cpu(device):
    x = torch.randn(10, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"budget": Budget(params=0.7), "measure": False}
    made = {}
    for place in (device, torch.device("cpu")):
        data = [part.to(place) for part in x.split(2)]
        made[place.type] = fxlrd.compress(transformer().to(place), data[0], calibration=data, **options).model
    with torch.no_grad():
        outputs = [made[device.type](x.to(device)).to("cpu")]
        assert difference(outputs, [made["cpu"](x)], "output").relative < rounding_of_kernels(outputs)


def test_calibration_inputs_come_to_the_device_of_the_example_inputs(device):
    net, x = model().to(device), batches()[0].to(device)
    options = {"budget": Budget(params=0.6), "measure": False}
    there, here = (
        fxlrd.compress(net, x, calibration=data, **options).model
        for data in (batches(), [b.to(device) for b in batches()])
    )
    assert torch.equal(there(x), here(x))


def test_a_frontier_runs_where_the_model_is(device):
    data = [x.to(device) for x in batches()]
    budgets = ["params=0.8", "params=0.6"]
    tried = fxlrd.frontier(model().to(device), data[0], calibration=data, budgets=budgets, measure=False)
    errors = [point.error for point in tried.points]
    assert errors == sorted(errors)
    assert {p.device.type for p in tried.points[0].result().model.parameters()} == {device.type}


@pytest.mark.parametrize("to", ["cpu", "device"])
def test_what_was_saved_on_one_device_loads_on_another(to, device, tmp_path):
    x = batches()[0]
    first, second = (device, torch.device("cpu")) if to == "cpu" else (torch.device("cpu"), device)
    result = fxlrd.compress(model().to(first), x.to(first), ratio=2, measure=False)
    fxlrd.save(result, tmp_path / "saved")
    loaded = fxlrd.load(tmp_path / "saved", copy.deepcopy(model()).to(second)).eval()
    assert {p.device.type for p in loaded.parameters()} == {second.type}
    outputs = [loaded(x.to(second)).to("cpu")]
    assert difference(outputs, [result.model.eval()(x.to(first)).to("cpu")], "output").relative < rounding_of_kernels(
        outputs
    )


def test_a_timing_is_of_its_device_and_its_precision(device, tmp_path):
    cpu, here = Setting.current(torch.device("cpu"), False), Setting.current(device, False)
    assert (here == cpu) == (device.type == "cpu")
    cache, entry = Cache(tmp_path), Entry({"original": Ratio(1.0)}, Ratio(1.0), 1.0)
    cache.store(here, "a layer", entry)
    assert cache.load(here, "a layer") == entry
    assert (cache.load(cpu, "a layer") == entry) == (device.type == "cpu")
    assert cache.load(here._replace(device="another"), "a layer") is None
    if device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
            assert Setting.current(device, False) != here
        finally:
            torch.set_float32_matmul_precision(before)


def test_timing_waits_for_what_was_started(real_device):
    """A GPU takes calls and computes later: not to wait for it would give the time of the calls."""
    seconds = 5e-3

    def work() -> None:
        if real_device.type == "cuda":
            torch.cuda._sleep(round(seconds * 1e9))  # cycles: no clock is faster than 5 GHz
        else:
            time.sleep(seconds)

    assert compare({"work": work}, real_device, seconds=0.1)["work"].seconds > seconds / 5


def test_tf32_explains_a_difference_between_kernels_and_none_between_runs(device):
    values = torch.ones(3, device=device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert rounding_of_kernels([values]) == pytest.approx(0.1)
        assert rounding([values]) < 1e-3
        assert rounding_of_kernels([values.double()]) < 1e-12
        assert rounding_of_kernels([values.cpu()]) < 1e-3
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
@torch.no_grad()
def test_factors_are_inputs_that_cuda_graphs_do_not_copy(real_device, fresh_dynamo, monkeypatch):
    """CUDA graphs copy each input that may be elsewhere in the next call: not weights, and so not factors."""
    from torch._inductor import compile_fx

    net, x = model(torch.float32).to(real_device), batches(torch.float32)[0].to(real_device)
    inner, seen = compile_fx._compile_fx_inner, []

    def spy(gm, example_inputs, **options):
        seen.append((len(example_inputs), set(options["static_input_idxs"])))
        return inner(gm, example_inputs, **options)

    monkeypatch.setattr(compile_fx, "_compile_fx_inner", spy)
    options = {"ratio": 2.0, "inner": "inductor", "inner_mode": "reduce-overhead"}
    served = torch.compile(net, backend="fxlrd", options=options)
    expected = fxlrd.compress(net, x, ratio=2.0, measure=False).model(x)
    for _ in range(4):  # a graph is recorded in the second call and replayed after
        outputs = [served(x).clone()]
    assert difference(outputs, [expected], "output").relative < 10 * rounding_of_kernels(outputs)
    ((count, static),) = seen
    assert count - len(static) == 1, "x alone is copied"
