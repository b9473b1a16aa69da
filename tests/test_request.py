"""The options of compress() as a pipeline, and the requests that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd import Budget, FxlrdError, Pipeline
from fxlrd.passes import Decompose
from fxlrd.request import _check_weights
from tests.support.compression import quick
from tests.support.models import classifier
from tests.support.tensors import images


def image(batch: int = 2) -> torch.Tensor:
    return images(batch, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "lord"}, "unknown preset 'lord': did you mean lrd"),
        ({"preset": "lrd", "pipeline": "decompose"}, "give one of the two"),
        ({"pipeline": "decompose", "ratio": 2.0}, "goes into the pipeline"),
        ({"ratio": 1.0}, "finite number above 1"),
        ({"ratio": float("nan")}, "finite number above 1"),
        ({"ratio": 1e6}, "ratio=1e"),
        ({"skip": "head"}, "unknown layer 'head'"),
    ],
)
def test_options_that_exclude_each_other_or_are_out_of_range(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        quick(classifier(), image(), **options)
    assert isinstance(caught.value, FxlrdError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5}, r"^budget: give fxlrd.Budget\(latency=0.5\), or params, flops or layers, not 0.5"),
        ({"budget": Budget(params=0.5), "ratio": 2.0}, "^ratio and budget: give one of the two"),
        ({"budget": Budget(params=0.5), "preset": "lrd"}, "^budget: only allocate spends one, and decompose has none"),
        ({"budget": Budget(params=0.5), "pipeline": "decompose"}, "use preset auto"),
        ({"budget": Budget(params=0.5)}, "^calibrate: no calibration inputs; give calibration="),
        (
            {"budget": Budget(params=0.01), "calibration": image(20)},
            r"params=0.01 is out of reach: .* leave 0\.\d+ of it",
        ),
        ({"preset": "auto", "ratio": 2.0, "calibration": image(20)}, "^ratio: .*; give budget=, not ratio="),
        ({"pipeline": "decompose,refit"}, "^refit: no calibration inputs"),
        ({"pipeline": "decompose,refit", "calibration": image(20)}, "^refit: .* run calibrate before"),
        ({"pipeline": "decompose,recalibrate"}, "^recalibrate: no calibration inputs"),
        ({"pipeline": "decompose", "calibration": image(20)}, "^calibration: no pass of decompose"),
        ({"budget": Budget(params=0.5), "calibration": []}, "^calibration: there are no inputs"),
        ({"budget": Budget(params=0.5), "calibration": image(20).to("meta")}, "on meta"),
        ({"budget": Budget(params=0.5), "calibration": image(20).double()}, "the model fails on batch 0"),
    ],
)
def test_budgets_that_cannot_be_met(options, message):
    with pytest.raises(FxlrdError, match=message) as caught:
        quick(classifier(), image(), **options)
    assert "\n" not in str(caught.value)


def test_autocast_and_inference_mode_are_refused():
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(FxlrdError, match="autocast"):
        fxlrd.compress(model, x)
    with torch.inference_mode(), pytest.raises(FxlrdError, match="inference_mode"):
        fxlrd.compress(model, x)


def test_wrapped_models_are_refused_with_the_remedy():
    for wrapped, remedy in [
        (torch.compile(classifier()), "model._orig_mod"),
        (nn.DataParallel(classifier()), "model.module"),
        (torch.jit.trace(classifier().eval(), image()), "the model it was made from"),
    ]:
        with pytest.raises(FxlrdError, match=remedy):
            quick(wrapped, image())


def test_weights_that_accelerate_has_offloaded_are_refused_and_the_remedy_brings_them_back():
    hooks = pytest.importorskip("accelerate.hooks")
    model = pytest.importorskip("accelerate").cpu_offload(classifier(), torch.device("cpu"))
    with pytest.raises(FxlrdError, match="remove_hook_from_module"):
        quick(model, image())
    assert quick(hooks.remove_hook_from_module(model, recurse=True), image()).report.layers


def test_a_model_of_fsdp_is_refused():
    class FullyShardedDataParallel(nn.Sequential):
        """Stands for torch's, which takes several processes."""

    with pytest.raises(FxlrdError, match="before it is sharded"):
        quick(nn.Sequential(FullyShardedDataParallel(nn.Linear(64, 64))), torch.randn(2, 64))


def test_pipeline_as_object_and_as_text():
    x = image()
    torch.manual_seed(0)
    model = classifier().eval()
    a = quick(model, x, pipeline=Pipeline([Decompose(ratio=3.0)])).model
    b = quick(model, x, pipeline="decompose{ratio=3}").model
    c = quick(model, x, ratio=3.0).model
    assert torch.equal(a(x), b(x))
    assert torch.equal(a(x), c(x))


def test_a_list_of_passes_is_a_pipeline():
    model, x = classifier().eval(), image()
    assert torch.equal(quick(model, x, pipeline=[Decompose()]).model(x), quick(model, x).model(x))


def test_preset_auto_defaults_to_half_the_latency():
    text = str(Pipeline.preset("auto"))
    assert "allocate{latency=0.5,measured=32}" in text
    assert str(Pipeline.parse(text)) == text


def test_skip_reaches_allocate_merge_and_decompose():
    model, x = classifier().eval(), image()
    result = quick(model, x, budget=Budget(params=0.95), calibration=image(20), skip="3")
    assert torch.equal(result.model.get_submodule("3").weight, model[3].weight)
    assert next(r for r in result.report.layers if r["name"] == "3")["decision"] in ("original", "skipped")


def test_a_device_without_float64_is_refused():
    class OnMps:
        def modules(self):
            return []

        def named_parameters(self):
            yield "0.weight", SimpleNamespace(device=torch.device("mps"))

    with pytest.raises(FxlrdError, match=r"0\.weight is on mps, which has no float64, .*: compress on the CPU"):
        _check_weights(OnMps())
