"""The options of the backend."""

from __future__ import annotations

import pytest
import torch

import fxlrd
from fxlrd.backend.options import Options
from tests.support.backend import close, compiled, expected, images, net, refused


def test_invalid_options():
    assert "did you mean ratio" in refused("unknown option", rato=2.0)
    assert "did you mean decompose" in refused("unknown pass", passes="decompos")
    assert "did you mean branch" in refused("unknown preset", preset="branhc")
    assert "did you mean aot_eager" in refused("unknown inner compiler", inner="aot_eagr")
    refused("its own inner", inner="fxlrd")
    refused("unknown budget", budget="latenzy=0.5")
    refused("give one of the two", preset="lrd", passes="decompose")
    refused("leaves less than rank 1", ratio=1000.0)


def test_too_high_a_ratio_is_the_error_of_compress():
    with pytest.raises(fxlrd.FxlrdError) as caught:
        fxlrd.compress(net(), images(), ratio=1000.0)
    assert refused("rank 1", ratio=1000.0) == str(caught.value)


@pytest.mark.parametrize("options", [{"preset": "auto"}, {"preset": "merge"}, {"budget": "latency=0.5"}], ids=str)
def test_passes_that_read_data_are_refused(options):
    assert "fxlrd.compress(model, inputs, calibration=…)" in refused("calibrat", **options)


@torch.no_grad()
def test_a_name_to_skip_that_fits_nothing_warns():
    with pytest.warns(UserWarning, match=r"unknown layer to skip 'bloks\.0\.conv1'.*did you mean"):
        compiled(net(), skip="bloks.0.conv1")(images())


@pytest.mark.slow
@torch.no_grad()
def test_inner_options_and_mode():
    x = images()
    for options in ({"inner_options": {"max_autotune": False}}, {"inner_mode": "reduce-overhead"}):
        torch._dynamo.reset()
        close(torch.compile(net(), backend="fxlrd", options=options)(x), expected(net(), x))
    torch._dynamo.reset()
    close(torch.compile(net(), backend="fxlrd", mode="reduce-overhead")(x), expected(net(), x))
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(net(), backend="fxlrd", mode="reduce-overhead", options={"ratio": 2.0})
    assert Options.read(mode="max-autotune").inner_mode == "max-autotune"


@torch.no_grad()
def test_verify_is_passed_on(monkeypatch):
    seen = []
    monkeypatch.setattr(fxlrd.Pipeline, "__call__", _recording(seen, fxlrd.Pipeline.__call__))
    compiled(net())(images())
    torch._dynamo.reset()
    compiled(net(), verify=False)(images())
    assert seen == [True, False]


def _recording(seen, call):
    def recorded(self, gm, *args, verify=True, **others):
        seen.append(verify)
        return call(self, gm, *args, verify=verify, **others)

    return recorded
