"""Tensors that take their shape when the model runs: saved and loaded into a fresh architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd.errors import FxlrdError
from fxlrd.saving.runtime import assigned_in_forward, runtime_tensors
from tests.support.compression import quick

X = torch.randn(2, 64)


class Head(nn.Module):
    """As YOLO's: attributes that are made for a size, beside the size."""

    def __init__(self):
        super().__init__()
        self.a, self.anchors, self.scale, self.shape = nn.Linear(64, 64), torch.empty(0), torch.rand(64), None

    def forward(self, x):
        if self.shape != x.shape:
            self.make(x)
        return self.a(x) * self.scale + self.anchors

    def make(self, x):
        self.anchors, self.shape = torch.arange(x.shape[0]).float()[:, None] * 2, x.shape


class Positions(nn.Module):
    """As ConViT's: a buffer that is made for the number of inputs."""

    def __init__(self, persistent=False):
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.register_buffer("indices", torch.zeros(1, 3), persistent=persistent)

    def forward(self, x):
        if len(self.indices) != len(x):
            self.indices = torch.arange(3.0 * len(x)).reshape(-1, 3)
        return self.a(x) + self.indices.sum(1, keepdim=True)


class Memory(nn.Module):
    """Keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.register_buffer("seen", torch.zeros(0, 64))

    def forward(self, x):
        self.seen = torch.cat([self.seen, x.detach()])[-3:]
        return self.a(x) + self.seen.mean(0)


@pytest.mark.parametrize("make", [Head, Positions, lambda: Positions(True), Memory])
@pytest.mark.parametrize("run_before", ["compress", "save"])
@torch.no_grad()
def test_a_fresh_architecture_loads_it(make, run_before, tmp_path):
    model = make().eval()
    if run_before == "compress":
        model(X[:1])
    result = quick(model, X, ratio=2.0)
    result.model(torch.randn(3, 64))
    fxlrd.save(result, tmp_path)
    used = make().eval()
    used(torch.randn(5, 64))
    for architecture in (make().eval(), used):
        loaded = fxlrd.load(tmp_path, architecture)
        again = {n: b.clone() for n, b in architecture.named_buffers()}
        for size in (5, 3, 2):
            x = torch.randn(size, 64)
            if make is not Memory:
                assert torch.equal(loaded(x), result.model(x))
        if make is Memory:
            assert torch.equal(loaded.seen, result.model.seen)
        assert all(torch.equal(b, again[n]) for n, b in architecture.named_buffers())
    fxlrd.save(loaded, tmp_path)


def test_a_tensor_that_only_construction_makes_is_checked(tmp_path):
    class Constant(nn.Module):
        def __init__(self, size=64):
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.set(size)

        def set(self, size):
            self.register_buffer("scale", torch.ones(size))
            self.shift = torch.zeros(size)

        def forward(self, x):
            return self.a(x) * self.scale + self.shift if x.sum() < 1e9 else x

    result = quick(Constant(), X, ratio=2.0)
    fxlrd.save(result, tmp_path)
    with pytest.raises(FxlrdError, match="the shape of 'scale' is \\[1\\] and was '\\[64\\]'"):
        fxlrd.load(tmp_path, Constant(1))
    assert runtime_tensors(Constant()) == {}


def test_what_forward_assigns_is_read_from_the_code_that_it_reaches():
    assert assigned_in_forward(Head) == {"anchors": {"shape"}, "shape": {"anchors"}}
    assert runtime_tensors(Head()) == {"anchors": True}
    assert runtime_tensors(nn.Sequential(Positions())) == {"0.indices": False}
    assert assigned_in_forward(nn.BatchNorm2d) == {}
