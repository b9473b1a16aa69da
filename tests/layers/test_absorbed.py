"""What stands in the place of a BatchNorm that a layer took in, for code that folds BatchNorms afterwards."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd.errors import FxlrdError
from fxlrd.layers.absorbed import AbsorbedNorm, in_place_of
from tests.support.compression import assert_same_outputs, quick
from tests.support.models import randomise_norms

X = torch.linspace(-1, 1, 2 * 8 * 36, dtype=torch.float64).reshape(2, 8, 6, 6)


class Block(nn.Module):
    """As YOLO's Conv: fuse() folds the norm into the conv, and forgets it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        return (self.bn(y) if hasattr(self, "bn") else y).relu()

    def fuse(self):
        conv, bn = self.conv, self.bn
        statistics = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        conv.weight, conv.bias = nn.utils.fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        del self.bn


def blocks():
    torch.manual_seed(0)
    return randomise_norms(nn.Sequential(Block(), Block())).double().eval()


@pytest.mark.parametrize(
    "pipeline", ["merge{mode=exact,norms=true}", "decompose{ratio=2},merge{mode=exact,norms=true}"]
)
def test_a_norm_that_was_folded_folds_again_without_effect(pipeline, tmp_path):
    result = quick(blocks(), X, pipeline=pipeline, inplace=True).model
    fxlrd.save(result, tmp_path)
    for model in (result, copy.deepcopy(result), fxlrd.load(tmp_path, blocks())):
        before = copy.deepcopy(model)
        assert [type(block.bn) for block in model] == [AbsorbedNorm] * 2
        for block in model:
            block.fuse()
        assert_same_outputs(model, before, X)


def test_what_was_folded_stays_out_of_later_compressions():
    once = quick(blocks(), X, pipeline="merge{mode=exact,norms=true}", inplace=True).model
    assert_same_outputs(quick(once, X, pipeline="decompose{ranks=100000},merge{mode=exact,norms=true}").model, once, X)


WRITES = {
    "data": lambda norm: norm.weight.data.fill_(2),
    "a view": lambda norm: norm.running_var[:2].zero_(),
    "initialisation": lambda norm: nn.init.zeros_(norm.bias),
    "another": lambda norm: setattr(norm, "running_mean", torch.ones(4)),
    "eps": lambda norm: setattr(norm, "eps", 1e-3),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@torch.no_grad()
def test_a_write_would_be_lost_and_raises(write):
    with pytest.raises(FxlrdError, match=r"is folded into the layer before it.*without norms=true$"):
        write(AbsorbedNorm(nn.BatchNorm2d(4)))


def test_it_follows_the_model_and_pickles_without_fxlrd():
    norm = AbsorbedNorm(nn.BatchNorm1d(4, affine=False)).half().to("meta")
    assert (norm.weight.dtype, norm.weight.device.type, norm.weight.shape) == (torch.float16, "meta", (4,))
    assert norm.state_dict() == {}
    assert copy.deepcopy(norm).running_mean.dtype == torch.float16
    stored = pickle.dumps(norm)
    assert b"fxlrd" not in stored
    assert type(pickle.loads(stored)) is nn.Identity
    assert type(in_place_of(nn.Identity(), nn.Linear(2, 2))) is nn.Identity


def test_it_is_scripted_traced_exported_and_compiled():
    model, x = nn.Sequential(AbsorbedNorm(nn.BatchNorm1d(4))), torch.randn(2, 4)
    for other in (
        torch.jit.script(model),
        torch.jit.trace(model, x),
        torch.export.export(model, (x,)).module(),
        torch.compile(model, backend="eager"),
    ):
        assert torch.equal(other(x), x)
