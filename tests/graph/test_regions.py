from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd.capturing.regions import capture_regions
from fxlrd.capturing.whole import capture
from fxlrd.errors import VerificationError
from fxlrd.graph.captured import captured, feed, runnable
from fxlrd.graph.copies import structural_copy
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.reached import reached
from fxlrd.graph.regions import (
    CALLS,
    install_layers,
    plain,
    record,
    rewritten,
    set_modules,
    undo,
)
from fxlrd.passes import Decompose, Merge

X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8)


def linear():
    return nn.Linear(8, 8).double()


class Loop(nn.Module):
    """A region, a layer, and control flow on shapes and values."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(linear(), nn.Dropout(), linear())
        self.fc = linear()
        self.again = self.fc

    def forward(self, x, times=2, mask=None):
        for _ in range(times):
            x = self.body(x)
        if x.abs().max() > 100:
            return x
        y = self.again(self.fc(x))
        return {"y": y if mask is None else y * mask, "x": x}


def graph(model=None, inputs=X):
    return capture_regions(model or Loop(), inputs)


def test_arguments_and_outputs_are_copies_in_the_order_of_forward():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = Both()

        def forward(self, x):
            y = self.both(b=x, a=x * 2)
            y.zero_()
            x.zero_()
            return y

    class Both(nn.Module):
        def forward(self, a, b):
            return a - b

    model = Steps()
    x = X.clone()
    (call,) = record(model, Inputs.of(x), ["both"])["both"]
    assert torch.equal(call.arguments[0], X * 2)
    assert torch.equal(call.arguments[1], X)
    assert torch.equal(call.output, X)
    assert torch.equal(x, X)
    assert not model.both._forward_hooks
    assert not model.both._forward_pre_hooks


def test_so_many_calls_are_recorded_at_most():
    calls = record(Loop(), Inputs.of((X, CALLS + 5)), ["body", "fc"])
    assert len(calls["body"]) == CALLS
    assert len(calls["fc"]) == 2


def test_hooks_are_gone_after_an_error():
    model = Loop()
    with pytest.raises(ValueError, match="the model fails"):
        record(model, Inputs.of(X[:, :3]), ["body"])
    assert not model.body._forward_hooks


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [((1,), {}, False), ((X,), {}, False), ((X, X), {}, True), ((X,), {"b": X}, True), ((X, None), {}, False)],
)
def test_plain_calls_give_a_tensor_for_every_argument(args, kwargs, expected):
    class Two(nn.Module):
        def forward(self, a, b=None):
            return a

    assert plain(Two(), args, kwargs) is expected


def test_a_forward_that_takes_anything_is_never_plain():
    class Any(nn.Module):
        def forward(self, *args, **kwargs):
            return args

    assert not plain(Any(), (X,), {})


# -- feed


def test_placeholders_get_what_the_regions_get():
    model = Loop().eval()
    gm = graph(model)
    x = X[:2] * 0.5
    fed = feed(gm, Inputs.of(x))
    with torch.no_grad():
        assert torch.equal(fed[0], x)
        assert torch.equal(fed[1], model.body(model.body(x)))
    assert [slot.name for slot in captured(gm).slots] == ["body", "fc"]


def test_a_region_that_is_not_called_gets_nothing():
    gm = graph()
    fed = captured(gm).feed(gm, Inputs.of((X * 1e6, 0)))
    assert not any(reached(value) for value in fed)


def test_a_region_that_is_called_less_often_gets_one_of_its_calls_again():
    class Sizes(Loop):
        def forward(self, x, times=2):
            return sum(self.body(x[: i + 1]).sum() for i in range(times)) if x.max() < 100 else x

    gm = graph(Sizes())
    assert [slot.call for slot in captured(gm).slots] == [0, 1]
    x = X * 2
    first, second = captured(gm).feed(gm, Inputs.of((x, 1)))
    assert torch.equal(first, x[:1])
    assert torch.equal(second, x[:1])
    assert first is not second
    second.zero_()
    assert torch.equal(first, x[:1])


def test_a_region_that_is_called_without_an_argument_it_had_gets_nothing():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x, scale=1.0):
            return self.b(self.a(x) * scale)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = Body(), linear()

        def forward(self, x, scale=None):
            if x.sum() > 1e9:
                return x
            return self.fc(self.body(x) if scale is None else self.body(x, scale))

    gm = graph(Model(), {"x": X, "scale": X + 3})
    x = X * 2
    fed = captured(gm).feed(gm, Inputs.of(x))
    assert [slot.arguments for slot in captured(gm).slots] == [2, 1]
    assert [reached(value) for value in fed] == [False, False, True]
    assert torch.equal(fed[2], captured(gm).model.body(x).detach())


# -- put, undo, runnable, compared


def test_factors_answer_for_the_options_of_their_layer():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"))
    set_modules(model, {"0": nn.Sequential(nn.Identity())})
    conv = model[0]
    assert (conv.in_channels, conv.out_channels, conv.groups, conv.padding_mode) == (4, 6, 2, "reflect")
    assert (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (2, 2), (1, 1), (2, 2))
    assert not hasattr(conv, "bias")


def test_layers_go_back_under_all_of_their_names_and_undoing_it_leaves_the_model_as_it_was():
    model = Loop()
    model.body.eval()
    modules = dict(model.named_modules(remove_duplicate=False))
    gm = graph(model)
    new = Decompose(ranks=8, skip="body.0")(gm).graph_module
    assert rewritten(new, captured(gm).modules) == {"body.2", "fc"}
    target = structural_copy(model)
    inside = dict(target.named_modules(remove_duplicate=False))
    before = install_layers(target, new, captured(gm).modules)
    assert set(before) == {"body.2", "fc", "again"}
    assert target.fc is target.again
    assert [name for name, _ in target.fc.named_children()] == ["first", "last"]
    assert (target.fc.in_features, target.fc.out_features) == (8, 8)
    assert (target.fc.training, target.body[2].training) == (True, False)
    assert target.body[0] is inside["body.0"]
    with torch.no_grad():
        assert torch.allclose(target(X)["y"], model(X)["y"], atol=1e-9, rtol=0)
    undo(target, before)
    assert dict(target.named_modules(remove_duplicate=False)) == inside
    assert dict(model.named_modules(remove_duplicate=False)) == modules


def test_what_was_composed_away_is_passed_through():
    model = Loop().eval()
    model.body = nn.Sequential(linear(), nn.Identity(), nn.Linear(8, 4).double(), nn.Linear(4, 8).double())
    wanted = model(X)["y"]
    gm = graph(model)
    new = Merge(mode="exact")(gm).graph_module
    assert len([n for n in new.graph.nodes if n.op == "call_module"]) < 4
    found = runnable(new)
    assert isinstance(found, Loop)
    assert any(type(m) is nn.Identity for m in (found.body[0], found.body[2], found.body[3]))
    with torch.no_grad():
        assert torch.allclose(found(X)["y"], wanted, atol=1e-12, rtol=0)


def test_runnable_is_the_model_around_a_graph_of_regions():
    model = Loop()
    gm = graph(model)
    found = runnable(gm)
    assert type(found) is Loop
    assert found is not model
    assert found.fc.weight is model.fc.weight
    whole = capture(nn.Sequential(linear()), X)
    assert runnable(whole) is whole


def test_compared_tells_when_a_model_does_not_compute_what_the_graph_does():
    model = Loop()
    gm = graph(model)
    target = structural_copy(model)
    assert captured(gm).difference_inside(target, gm).relative == 0
    target.fc = nn.Linear(8, 8).double()
    assert captured(gm).difference_inside(target, gm).relative > 0.1
    target.fc = nn.Sequential(linear(), nn.Linear(8, 4).double())
    target.again = nn.Linear(4, 8).double()
    with pytest.raises(VerificationError, match="instead of"):
        captured(gm).difference_inside(target, gm)


def test_what_a_model_does_not_call_any_more_does_not_count():
    model = Loop()
    gm = graph(model)
    with torch.no_grad():
        model.body[2].bias += 1e4  # now it leaves before fc
    assert "fc" not in record(model, captured(gm).inputs, ["fc"])
    assert captured(gm).difference_inside(model, gm).relative == 0
