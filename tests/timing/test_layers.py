"""No test here reads a clock: `compare` is replaced by a formula of the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd import capture
from fxlrd.graph.surgery import calls
from fxlrd.timing import layers as layer_latency
from fxlrd.timing.clock import Timing
from fxlrd.timing.layers import ORIGINAL, placed, time_ranks


@pytest.fixture
def timed(monkeypatch) -> list[list[str]]:
    """Return a list that fills with the names of what is timed together; each takes what its group's number says."""
    seen: list[list[str]] = []

    def compare(calls, device, seconds):
        seen.append(list(calls))
        for call in calls.values():
            call()
        return {name: Timing(float(len(seen)), i / 10) for i, name in enumerate(calls)}

    monkeypatch.setattr(layer_latency, "compare", compare)
    return seen


def place(layer: nn.Module, x: torch.Tensor):
    gm = capture(nn.Sequential(layer).eval(), x)
    return placed(calls(gm, "0")[0], layer)


def test_a_place_is_the_input_that_the_layer_sees():
    x = torch.randn(2, 8, 5, 5).double().contiguous(memory_format=torch.channels_last)
    where = place(nn.Conv2d(8, 8, 3).double().to(memory_format=torch.channels_last), x)
    assert (where.shape, where.dtype, where.layout) == ((2, 8, 5, 5), torch.float64, "channels_last")
    other = place(nn.Conv2d(8, 8, 3), x.float())
    assert where.signature != other.signature
    assert where.signature == place(nn.Conv2d(8, 8, 3).double().to(memory_format=torch.channels_last), x).signature


def test_without_shapes_it_says_what_is_missing():
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    assert "give example inputs" in str(placed(calls(gm, "0")[0], gm.get_submodule("0")))


def test_ratios_are_to_the_original_and_each_group_has_it(timed, monkeypatch):
    monkeypatch.setattr(layer_latency, "_GROUP", 2)
    found = time_ranks(place(nn.Linear(32, 32), torch.randn(4, 32)), [(8,), (4,), (2,)], False, 1.0, False, {})
    assert timed == [[ORIGINAL, "8", "4"], [ORIGINAL, "2"]]
    assert list(found) == [ORIGINAL, "8", "4", "2"]
    assert found[ORIGINAL].seconds == 1.0, "the first measurement of the original stands"
    assert [found[k].ratio for k in ("8", "4", "2")] == [0.1, 0.2, 0.1]


def test_a_layer_without_any_form_has_its_own_time(timed):
    where = place(nn.Conv2d(3, 8, 3), torch.randn(1, 3, 9, 9))
    assert list(time_ranks(where, [], False, 1.0, False, {})) == [ORIGINAL]
    assert timed == [[ORIGINAL]]


def test_what_is_known_is_not_timed(timed):
    where, known = place(nn.Linear(32, 32), torch.randn(4, 32)), {}
    time_ranks(where, [(8,)], False, 1.0, False, known)
    time_ranks(where, [(8,), (4,)], False, 1.0, False, known)
    time_ranks(where, [], False, 1.0, False, known)
    assert timed == [[ORIGINAL, "8"], [ORIGINAL, "4"]]
    assert set(known) == {ORIGINAL, "8", "4"}


def test_the_cache_on_disk_serves_another_run_in_the_same_setting(timed):
    where = place(nn.Linear(32, 32), torch.randn(4, 32))
    first = time_ranks(where, [(8,)], False, 1.0, True, {})
    assert time_ranks(where, [(8,)], False, 1.0, True, {}) == first
    assert len(timed) == 1
    time_ranks(where, [(8,)], False, 1.0, False, {})
    assert len(timed) == 2, "cached=False measures"


def test_the_original_is_the_users_module_and_keeps_its_mode(timed):
    where = place(nn.Linear(32, 32), torch.randn(4, 32))
    where.original.train()
    time_ranks(where, [(8,)], False, 1.0, False, {})
    assert where.original.training


def test_under_inductor_the_modules_are_compiled(timed, monkeypatch):
    asked = []
    monkeypatch.setattr(layer_latency, "compiled", lambda m: asked.append(m) or m)
    time_ranks(place(nn.Linear(32, 32), torch.randn(4, 32)), [(8,)], True, 1.0, False, {})
    assert len(asked) == 2
