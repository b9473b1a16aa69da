from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxlrd.capturing.whole import capture
from fxlrd.errors import FxlrdError, VerificationError
from fxlrd.graph.captured import captured as graph_captured
from fxlrd.graph.captured import feed, propagate
from fxlrd.graph.compare import Difference, difference
from fxlrd.graph.facts import Provenance, provenance
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating, run
from fxlrd.graph.surgery import called, fork, replace, restore
from fxlrd.graph.surgery import calls as graph_calls
from fxlrd.layers.build import decomposed
from fxlrd.layers.forms import explicit_ranks

X = (2, 4, 6, 6)


class Twice(nn.Module):
    """A conv called twice, the first time with several users of its output, in a chain of layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        y = self.body(self.stem(x))
        z = self.stem(y)
        return self.head(z + y) + self.head(z), z


def captured(model=None):
    model = (model or Twice()).double().eval()
    return capture(model, torch.randn(X, dtype=torch.float64))


def full_rank(gm, target):
    """Replace a layer by factors that compute the same, in a fork."""
    module = gm.get_submodule(target)
    ranks = explicit_ranks(module, 100)
    form, error = decomposed(module, ranks)
    new = fork(gm)
    replace(new, target, form, ranks, error=error)
    new.graph.lint()
    new.recompile()
    return new


def outputs(gm):
    return tensors(run(gm, graph_captured(gm).inputs))


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]


def test_fork_shares_modules_and_leaves_the_original_as_it_is():
    gm = captured()
    code, before, wanted = gm.code, targets(gm), outputs(gm)
    new = fork(gm)
    assert all(new.get_submodule(t) is m for t, m in called(gm).items())
    assert graph_captured(new) is graph_captured(gm)
    assert not {id(n) for n in new.graph.nodes} & {id(n) for n in gm.graph.nodes}
    assert [provenance(n) for n in new.graph.nodes] == [provenance(n) for n in gm.graph.nodes]
    new = full_rank(gm, "stem")
    assert "stem.core" in targets(new)
    assert (gm.code, targets(gm)) == (code, before)
    assert isinstance(gm.stem, nn.Conv2d)
    assert all(torch.equal(a, b) for a, b in zip(outputs(gm), wanted, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_fork_carries_the_mode_of_the_containers(training):
    gm = captured().train(training)
    assert {m.training for m in fork(gm).modules()} == {training}


@pytest.mark.parametrize(
    ("target", "calls", "roles"),
    [
        ("body.0", 1, ("first", "core", "last")),
        ("stem", 2, ("first", "core", "last")),
        ("head", 2, ("first", "last")),
    ],
)
def test_replace_and_restore_at_every_call(target, calls, roles):
    gm = captured()
    original, wanted = gm.get_submodule(target), outputs(gm)
    new = full_rank(gm, target)
    assert target not in targets(new)
    for role in roles:
        nodes = graph_calls(new, f"{target}.{role}")
        assert len(nodes) == calls
        assert {(p.name, p.role) for p in map(provenance, nodes)} == {(target, role)}
        assert all(provenance(n).original is original for n in nodes)
        assert all(provenance(n).error < 1e-12 for n in nodes)
    assert difference(outputs(new), wanted, "replaced").max_abs <= 1e-9

    restore(new, target, latency=0.5)
    new.graph.lint()
    new.recompile()
    assert new.get_submodule(target) is original
    assert targets(new) == targets(gm)
    assert {provenance(n) for n in graph_calls(new, target)} == {Provenance(target, latency=0.5)}
    assert difference(outputs(new), wanted, "restored").max_abs == 0


def test_every_layer_of_a_chain():
    gm = captured(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)))
    new = full_rank(full_rank(full_rank(gm, "0"), "1"), "2")
    chain = ["0.first", "0.core", "0.last", "1.first", "1.last", "2.first", "2.core", "2.last"]
    assert targets(new) == chain
    assert difference(outputs(new), outputs(gm), "chain").max_abs <= 1e-9
    restore(new, "1")
    new.graph.lint()
    new.recompile()
    assert targets(new) == [*chain[:3], "1", *chain[5:]]
    assert difference(outputs(new), outputs(gm), "chain").max_abs <= 1e-9


def test_replaced_nodes_have_the_shapes_of_a_propagation_and_no_stale_flops():
    new = full_rank(captured(), "stem")
    inferred = {n.name: n.meta["tensor_meta"] for n in new.graph.nodes if n.op == "call_module"}
    assert all("flops" not in n.meta for role in ("first", "core", "last") for n in graph_calls(new, f"stem.{role}"))
    propagate(new, graph_captured(new).inputs)
    for n in new.graph.nodes:
        if n.op == "call_module":
            found = n.meta["tensor_meta"]
            assert (inferred[n.name].shape, inferred[n.name].dtype) == (found.shape, found.dtype)


def test_restored_nodes_have_no_flops_of_the_last_factor():
    gm = captured()
    new = full_rank(gm, "stem")
    propagate(new, graph_captured(new).inputs)
    restore(new, "stem")
    wanted = graph_calls(gm, "stem")[0].meta["flops"]
    assert all(n.meta.get("flops", wanted) == wanted for n in graph_calls(new, "stem"))


def test_gradient_flows_and_mode_goes_round_trip():
    new = full_rank(captured(), "stem")
    new.train()
    assert new.stem.core.training
    new(torch.randn(X, dtype=torch.float64))[0].sum().backward()
    assert all(p.grad is not None for p in new.parameters())
    new.eval()
    assert not any(m.training for m in new.modules())


def test_provenance_survives_deepcopy():
    new = full_rank(captured(), "stem")
    twin = copy.deepcopy(new)
    pairs = list(zip(new.graph.nodes, twin.graph.nodes, strict=True))
    assert all(provenance(a) is provenance(b) for a, b in pairs)
    assert sum(provenance(a) is not None for a, _ in pairs) == len(targets(new))
    assert graph_captured(twin) == graph_captured(new)
    assert twin.stem.core is not new.stem.core
    assert difference(outputs(twin), outputs(new), "copy").max_abs == 0


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Twice(), X),
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
    gm = captured()
    gm.train()
    gm.body.get_submodule("1").eval()
    modes = [m.training for m in gm.modules()]
    found = propagate(gm, graph_captured(gm).inputs)
    assert [m.training for m in gm.modules()] == modes
    assert difference(found, outputs(gm), "propagate").max_abs == 0
    assert not any(t.requires_grad for t in found)


def test_evaluating_restores_each_mode_also_after_an_exception():
    model = Twice().train()
    model.body[1].eval()
    model.head.eval()
    modes = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert [m.training for m in model.modules()] == modes


def test_difference_of_values():
    a, b = torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])
    found = difference([a], [b], "here")
    assert (found.max_abs, found.relative) == (0.5, 0.1)
    assert difference([a, b], [a, b], "here") == Difference(0, 0)
    assert difference([torch.ones(2)], [torch.zeros(2)], "here").relative == 2**0.5
    assert difference([], [], "here") == Difference(0, 0)
    assert difference([torch.ones(0)], [torch.ones(0)], "here") == Difference(0, 0)
    assert difference([torch.tensor([3 + 4j])], [torch.tensor([0j])], "here").max_abs == 5
    assert difference([torch.tensor([True, False])], [torch.tensor([True, True])], "here").max_abs == 1


def test_difference_is_taken_in_float64():
    one = torch.ones(1, dtype=torch.float16)
    assert difference([one + 2**-10], [one], "here").max_abs == 2**-10
    assert difference([torch.full((1,), 6e4).half()], [torch.full((1,), -6e4).half()], "here").max_abs == 2 * 6e4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value):
    bad, good = torch.tensor([1.0, value]), torch.tensor([1.0, 2.0])
    assert difference([bad], [bad.clone()], "here") == Difference(0, 0)
    for outputs, reference in ((bad, good), (good, bad), (-bad if value == value else good, bad)):
        with pytest.raises(VerificationError, match=r"^here: output 0 "):
            difference([outputs], [reference], "here")


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        ([torch.ones(2)], [torch.ones(2)] * 2, "here: 1 output tensors instead of 2"),
        ([torch.ones(2, 1)], [torch.ones(2)], "here: output 0 is torch.float32[2, 1] instead of torch.float32[2]"),
        (
            [torch.ones(2), torch.ones(2).double()],
            [torch.ones(2), torch.ones(2)],
            "here: output 1 is torch.float64[2] instead of torch.float32[2]",
        ),
    ],
)
def test_difference_compares_counts_shapes_and_dtypes_first(found, wanted, message):
    with pytest.raises(VerificationError) as caught:
        difference(found, wanted, "here")
    assert str(caught.value) == message


def test_inputs_of():
    x = torch.ones(1)
    assert Inputs.of(x) == Inputs((x,), {})
    assert Inputs.of((x, 2)) == Inputs.of([x, 2]) == Inputs((x, 2), {})
    assert Inputs.of({"x": x}) == Inputs.of(UserDict(x=x)) == Inputs((), {"x": x})
    given = Inputs((x,), {"y": x})
    assert Inputs.of(given) is given
    assert copy.deepcopy(given) is given
    assert given.describe() == "float32[1] on cpu, float32[1] on cpu"
    assert Inputs((3,)).describe() == "no tensor"


@pytest.mark.parametrize("value", [None, 3, "x", {1, 2}])
def test_inputs_of_another_type(value):
    with pytest.raises(FxlrdError, match=rf"^example inputs: a {type(value).__name__} is not a tensor") as caught:
        Inputs.of(value)
    assert "\n" not in str(caught.value)


def test_feed_inputs_follow_the_placeholders():
    def forward(a, b, c=3):
        return a + b + c

    gm = fx.symbolic_trace(forward)
    assert feed(gm, Inputs((1,), {"b": 2})) == [1, 2, 3]
    assert feed(gm, Inputs((), {"c": 5, "b": 2, "a": 1})) == [1, 2, 5]
    with pytest.raises(FxlrdError, match=r"^example inputs: the model's argument 'b' is missing$"):
        feed(gm, Inputs((1,)))


def test_run_names_what_does_not_fit():
    with pytest.raises(FxlrdError) as caught:
        run(nn.Linear(4, 4).double(), Inputs((torch.ones(2, 3),)))
    message = str(caught.value)
    assert message.startswith("the model fails on the example inputs (float32[2, 3] on cpu): ")
    assert "the model's weights are float64 on cpu" in message
    assert "\n" not in message
