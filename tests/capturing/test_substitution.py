"""Layers that compute their weight or pad their input, through compress()."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlrd
from tests.support.compression import decisions
from tests.support.folding import CausalConv, MaskedLinear, SameConv, ScaledLinear, StandardisedConv


class Net(nn.Module):
    """A stem, a layer of each kind, a head; ``loop`` makes it untraceable."""

    def __init__(self, loop=False):
        super().__init__()
        self.stem = SameConv(3, 16, 3, stride=2)
        self.standardised = StandardisedConv(16, 16, 3, padding=1)
        self.same = SameConv(16, 24, 3, stride=2)
        self.depthwise = SameConv(24, 24, 3, stride=2, groups=24)
        self.scaled, self.head, self.loop = ScaledLinear(24, 16), MaskedLinear(16, 12), loop

    def forward(self, x):
        if self.loop and x.sum() > 1e9:
            return x
        x = self.same(self.standardised(self.stem(x)).relu()).relu()
        return self.head(self.scaled(self.depthwise(x).mean((2, 3))).relu())


def images(size, number=2):
    return torch.randn(number, 3, size, size).double()


def counted(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def net():
    return Net().double().eval()


def test_a_graph_is_exact_at_every_size(net):
    result = fxlrd.compress(net, images(32), pipeline="decompose{ranks=99}", measure=False)
    assert list(decisions(result)) == ["stem", "standardised", "same", "depthwise", "scaled", "head"]
    assert {name for name, decision in decisions(result).items() if decision == "skipped"} == {"stem"}
    for size in (32, 33, 34, 35, 64):
        x = images(size)
        torch.testing.assert_close(result.model(x), net(x), rtol=1e-9, atol=1e-9)
    assert result.report.before["params"] == counted(net)
    assert result.report.after["params"] == counted(result.model)


def test_what_no_pass_replaces_stays_the_users_own(net):
    result = fxlrd.compress(net, images(32), ratio=2, skip=["standardised", "same"], measure=False)
    assert type(result.model.standardised) is StandardisedConv
    assert type(result.model.same) is SameConv
    assert "standardised.gain" in dict(result.model.named_parameters())
    assert result.report.before["params"] == counted(net)
    assert result.report.after["params"] == counted(result.model)
    assert not any(n.target is nn.functional.pad for n in result.model.graph.nodes)


@pytest.mark.parametrize(("loop", "inplace"), [(False, True), (True, False), (True, True)])
def test_inside_the_users_forward_layers_that_pad_are_left_alone(loop, inplace):
    net = Net(loop).double().eval()
    original = copy.deepcopy(net)
    result = fxlrd.compress(net, images(32), pipeline="decompose{ranks=99}", measure=False, inplace=inplace)
    reasons = {skip.name: skip.reason.code for skip in result.report.ledger[0].skipped}
    assert reasons["same"] == "pads-itself"
    assert {decisions(result)[name] for name in ("standardised", "scaled", "head")} == {"tucker2", "svd"}
    for size in (32, 33):
        x = images(size)
        torch.testing.assert_close(result.model(x), original(x), rtol=1e-9, atol=1e-9)
    assert result.report.before["params"] == counted(original)
    assert result.report.after["params"] == counted(result.model)


def test_a_checkpoint_of_a_graph_that_pads_loads(net, tmp_path):
    result = fxlrd.compress(net, images(32), ratio=2, skip="standardised", measure=False)
    assert decisions(result)["same"] == "tucker2"
    fxlrd.save(result, tmp_path)
    loaded = fxlrd.load(tmp_path, Net().double().eval())
    for size in (32, 33, 35):
        x = images(size)
        assert torch.equal(loaded(x), result.model(x))


def test_a_graph_that_pads_exports(net):
    result = fxlrd.compress(net, images(32), ratio=2, measure=False)
    x = images(32)
    exported = torch.export.export(result.model, (x,)).module()
    torch.testing.assert_close(exported(x), result.model(x))


def test_causal_convs():
    net = nn.Sequential(CausalConv(16, 16, 3), nn.ReLU(), CausalConv(16, 16, 3)).double().eval()
    result = fxlrd.compress(net, torch.randn(2, 16, 20).double(), pipeline="decompose{ranks=99}", measure=False)
    assert set(decisions(result).values()) == {"tucker2"}
    x = torch.randn(3, 16, 11).double()
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-9, atol=1e-9)


def test_a_layer_of_a_class_is_known_by_its_private_attributes_too():
    class Dropping(nn.Linear):
        def __init__(self, p):
            super().__init__(16, 16)
            self._p = p

        def forward(self, x):
            return F.linear(F.dropout(x, self._p, self.training), self.weight, self.bias)

    torch.manual_seed(0)
    x = torch.randn(2, 16)
    model = nn.Sequential(Dropping(0.0), nn.ReLU(), Dropping(0.5))
    result = fxlrd.compress(model, x, ratio=2, measure=False).model.train()
    assert not torch.equal(result(x), result(x)), "its dropout is still there"
