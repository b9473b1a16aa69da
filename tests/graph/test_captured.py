from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxlrd.capturing.whole import capture
from fxlrd.errors import FxlrdError
from fxlrd.graph.captured import captured, feed, propagate
from fxlrd.graph.compare import difference
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating, run
from tests.support.models import StemCalledTwice

X = (2, 4, 6, 6)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (StemCalledTwice(), X),
        (nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)), X),
        (nn.Sequential(nn.ConvTranspose2d(4, 3, 3), nn.Conv2d(3, 3, (1, 3))), X),
        (nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), (2, 5, 8)),
    ],
    ids=["shared", "grouped", "transposed", "attention"],
)
def test_propagate_counts_the_flops_of_the_model(model, shape):
    x = torch.randn(shape)
    gm = capture(model, x)
    # With gradients on, attention is kept off its fused path here too.
    with evaluating(model), FlopCounterMode(display=False) as counter:
        model(x)
    assert sum(n.meta["flops"] for n in gm.graph.nodes) == counter.get_total_flops() > 0
    for n in gm.graph.nodes:
        if n.op == "call_module" and isinstance(m := gm.get_submodule(n.target), (nn.Conv2d, nn.Linear)):
            given, made = n.all_input_nodes[0].meta["tensor_meta"], n.meta["tensor_meta"]
            with FlopCounterMode(display=False) as counter:
                result = m(torch.zeros(given.shape))
            assert n.meta["flops"] == counter.get_total_flops()
            assert (made.shape, made.dtype) == (result.shape, result.dtype)


def test_propagate_returns_the_outputs_and_leaves_the_modes():
    gm = capture(StemCalledTwice().eval(), torch.randn(X))
    gm.train()
    gm.body.get_submodule("1").eval()
    modes = [m.training for m in gm.modules()]
    found = propagate(gm, captured(gm).inputs)
    assert [m.training for m in gm.modules()] == modes
    assert difference(found, tensors(run(gm, captured(gm).inputs)), "propagate").max_abs == 0
    assert not any(t.requires_grad for t in found)


def test_feed_inputs_follow_the_placeholders():
    def forward(a, b, c=3):
        return a + b + c

    gm = fx.symbolic_trace(forward)
    assert feed(gm, Inputs((1,), {"b": 2})) == [1, 2, 3]
    assert feed(gm, Inputs((), {"c": 5, "b": 2, "a": 1})) == [1, 2, 5]
    with pytest.raises(FxlrdError, match=r"^example inputs: the model's argument 'b' is missing$"):
        feed(gm, Inputs((1,)))
