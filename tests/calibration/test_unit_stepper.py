"""Models that no trace can follow, run unit by unit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from fxlrd import FxlrdError
from fxlrd.calibration.course import course_of
from fxlrd.calibration.stages import Stage, observe
from fxlrd.calibration.unit_stepper import UnitStepper
from fxlrd.graph.inputs import Inputs
from tests.support.tensors import assert_close


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.b(self.a(x).tanh())


class Hourglass(nn.Module):
    """Blocks, the first and the last with a skip connection; one is called for some inputs only, one is no unit."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.holder = nn.Module()
        self.holder.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        x = self.blocks[1](first)
        x += 1
        if x.mean() > 1:
            x = self.blocks[2](x)
        x = self.holder.inner(self.blocks[3](x))
        return self.head(self.blocks[4](x) + first)


LAYERS = [*(f"blocks.{i}.{name}" for i in range(5) for name in "ab"), "holder.inner", "head"]


def inputs() -> list[Inputs]:
    return [Inputs((torch.randn(n, 6).double() + shift,)) for n, shift in ((4, -3), (5, 3), (6, -3))]


def test_units_and_layers_are_listed_in_the_order_of_their_calls():
    torch.manual_seed(0)
    batches = inputs()
    observed = observe(Hourglass().double().eval(), batches, LAYERS, LAYERS)
    assert observed.units == (*(f"blocks.{i}" for i in range(5)), "head", "holder.inner")
    skipping = ("blocks.0", "blocks.1", "blocks.3", "holder.inner", "blocks.4", "head")
    assert observed.sequences == (skipping, (*skipping[:2], "blocks.2", *skipping[2:]), skipping)
    assert [layer for stage in observed.stages for layer in stage.layers] == [
        *LAYERS[:8], "holder.inner", "blocks.4.a", "blocks.4.b", "head",
    ]  # fmt: skip
    assert observed.calls == Counter(LAYERS)


def test_layers_that_read_the_same_tensor_are_one_stage():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.q(x), self.k(x)
            x.add_(1)
            return self.o(q * k + self.v(x))

    model = nn.Sequential(*(Attention() for _ in range(4)))
    layers = [f"{i}.{name}" for i in range(4) for name in "qkvo"]
    observed = observe(model, [Inputs((torch.randn(2, 4),))], layers, layers)
    assert observed.stages[:3] == (Stage("0", ("0.q", "0.k")), Stage("0", ("0.v",)), Stage("0", ("0.o",)))


def stepper(model: nn.Module, batches: list[Inputs]) -> UnitStepper:
    observed = observe(model, batches, LAYERS, LAYERS)
    course = course_of(model, batches[0], observed.units, {"head"})
    assert course is not None
    return UnitStepper(model, batches, course, observed.sequences)


def test_layers_read_and_make_what_they_do_in_a_whole_run_and_replaced_ones_count_from_then_on():
    torch.manual_seed(0)
    model, batches = Hourglass().double().eval(), inputs()
    steps = stepper(model, batches)
    for unit, layer in [("blocks.1", "blocks.1.b"), ("blocks.2", "blocks.2.a"), ("blocks.4", "blocks.4.a")]:
        steps.before(unit)
        seen = [{name: call.arguments[0] for name, call in calls.items()} for calls in steps.calls(unit, [layer])]
        expected = [reads(model, layer, batch) for batch in batches]
        assert [bool(each) for each in seen] == [each is not None for each in expected]
        for each, value in zip(seen, expected, strict=True):
            if value is not None:
                assert_close(each[layer], value)
        model.set_submodule(layer, nn.Linear(6, 6).double())
    steps.before("head")
    with torch.no_grad():
        for calls, batch in zip(steps.calls("head", ["head"]), batches, strict=True):
            assert_close(calls["head"].output, model(batch.args[0]))
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules())


def reads(model: nn.Module, layer: str, inputs: Inputs) -> Tensor | None:
    read: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: read.append(args[0].clone()))
    with torch.no_grad():
        model(inputs.args[0].clone())
    handle.remove()
    return read[0] if read else None


def test_each_unit_runs_once_and_what_it_gives_is_dropped_after_its_last_use():
    torch.manual_seed(0)
    model, batches = Hourglass().double().eval(), inputs()[:1]
    steps = stepper(model, batches)
    runs = [block.runs for block in model.blocks]
    steps.before("blocks.4")
    assert [block.runs - before for block, before in zip(model.blocks, runs, strict=True)] == [1, 1, 0, 1, 0]
    steps.before("blocks.4")
    (outputs,) = steps.outputs
    # The first is added at the end, the second decides whether another block is called; the last feeds the next one.
    assert [t.untyped_storage().nbytes() > 8 for t in outputs] == [True, True, False, True]
    steps.before("head")
    assert [block.runs - before for block, before in zip(model.blocks, runs, strict=True)] == [1, 1, 0, 1, 1]


def test_settled_layers_of_a_unit_are_computed_once_and_replaced_ones_count_from_then_on():
    torch.manual_seed(0)
    model, batches = Hourglass().double().eval(), inputs()
    steps = stepper(model, batches)
    computed = Counter[str]()
    for name in LAYERS:
        count_calls(model.get_submodule(name), name, computed)
    steps.settled = {"blocks.1": ["blocks.1.a"]}
    steps.before("blocks.1")
    computed.clear()
    for _ in range(2):
        list(steps.calls("blocks.1", ["blocks.1.b"]))
    assert computed == {"blocks.1.a": 3, "blocks.1.b": 6}
    model.set_submodule("blocks.1.b", nn.Linear(6, 6).double())
    steps.before("blocks.3")
    assert computed == {"blocks.1.a": 3, "blocks.1.b": 6, "blocks.2.a": 1, "blocks.2.b": 1}
    for calls, batch in zip(steps.calls("blocks.3", ["blocks.3.a"]), batches, strict=True):
        assert_close(calls["blocks.3.a"].arguments[0], reads(model, "blocks.3.a", batch))
    assert not any(steps.answers.known.values())


def count_calls(module: nn.Module, name: str, computed: Counter[str]) -> None:
    forward = module.forward

    def counting(x: Tensor) -> Tensor:
        computed[name] += 1
        return forward(x)

    module.forward = counting


def test_what_a_layer_gives_after_one_that_will_change_is_not_remembered():
    torch.manual_seed(0)
    model, batches = Hourglass().double().eval(), inputs()
    steps = stepper(model, batches)
    steps.settled = {"blocks.1": ["blocks.1.b"]}
    steps.before("blocks.1")
    list(steps.calls("blocks.1", ["blocks.1.a", "blocks.1.b"]))
    model.set_submodule("blocks.1.a", nn.Linear(6, 6).double())
    steps.before("blocks.3")
    for calls, batch in zip(steps.calls("blocks.3", ["blocks.3.a"]), batches, strict=True):
        assert_close(calls["blocks.3.a"].arguments[0], reads(model, "blocks.3.a", batch))


def test_a_model_whose_units_do_more_than_give_their_output_has_no_course():
    torch.manual_seed(0)
    batch = inputs()[0]

    class Counting(Hourglass):
        def forward(self, x: Tensor) -> Tensor:
            before = self.blocks[0].runs
            x = self.blocks[0](x)
            return self.head(self.blocks[1](x * (self.blocks[0].runs - before)))

    model = Counting().double()
    assert course_of(model, batch, ["blocks.0", "blocks.1", "head"], {"head"}) is None
    assert course_of(model, batch, ["blocks.0", "head"], {"blocks.0"}) is not None


def test_a_batch_that_the_model_fails_on_is_named():
    model = Hourglass().double().eval()
    batches = [*inputs()[:1], Inputs((torch.randn(4, 5).double(),))]
    with pytest.raises(FxlrdError, match=r"^calibration: the model fails on batch 1 "):
        observe(model, batches, LAYERS, LAYERS)
