"""What compress() hands back: independent of the original or, in place, the original itself."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import googlenet

import fxlrd
from fxlrd import Budget, FxlrdError, Pipeline
from fxlrd.layers.build import decomposed
from fxlrd.passes import Decompose
from tests.support.compression import quick
from tests.support.models import classifier
from tests.support.tensors import images


def image(batch: int = 2) -> torch.Tensor:
    return images(batch, dtype=torch.float32)


def test_the_original_stays_as_it_is_and_shares_no_tensor():
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    result = quick(model, image(), ratio=2.0)
    mine = {t.data_ptr() for t in model.state_dict().values() if t.numel()}
    theirs = {t.data_ptr() for t in result.model.state_dict().values() if t.numel()}
    assert not mine & theirs
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model[3], "first")


def test_the_result_does_not_keep_the_model_alive():
    model = classifier()
    gone = weakref.ref(model[3].weight)
    result = quick(model, image())
    del model
    gc.collect()
    assert gone() is None
    assert result.model(image()).shape == (2, 20)


def test_the_factors_are_not_copied_for_the_result(monkeypatch):
    made = []

    def noting(*arguments):
        factors, error = decomposed(*arguments)
        made.extend(factors.parameters())
        return factors, error

    monkeypatch.setattr("fxlrd.passes.decompose.decomposed", noting)
    result = quick(classifier(), image(), ratio=2.0)
    assert made
    assert {id(p) for p in made} <= {id(p) for p in result.model.parameters()}


def test_what_a_pass_of_the_users_holds_is_copied():
    held = []

    @dataclass(frozen=True)
    class Holding:
        def __call__(self, gm, progress=None):
            result = Decompose(ratio=2)(gm)
            held.append(result.graph_module)
            return result

    result = quick(classifier(), image(), pipeline=[Holding()])
    mine = {t.data_ptr() for t in result.model.state_dict().values() if t.numel()}
    assert not mine & {t.data_ptr() for t in held[0].state_dict().values()}


def test_each_module_comes_back_in_its_own_mode():
    model = classifier().train()
    model[1].eval()
    result = quick(model, image())
    assert result.model.training
    assert not result.model.get_submodule("1").training
    assert result.model.get_submodule("3").training
    assert result.model.get_submodule("3.core").training
    assert result.model.get_submodule("6").training
    assert model.training
    assert not model[1].training
    assert not quick(classifier().eval(), image()).model.training


def test_dropout_drops_in_training_mode():
    result = quick(classifier(), image(), pipeline="decompose{ranks=99}")
    x = image()
    a, b = result.model.train()(x), result.model.train()(x)
    assert not torch.equal(a, b)
    assert torch.equal(result.model.eval()(x), result.model.eval()(x))


def test_the_result_pickles_copies_and_exports(tmp_path):
    x = image()
    result = quick(classifier().eval(), x)
    reference = result.model(x)
    assert torch.equal(pickle.loads(pickle.dumps(result.model))(x), reference)
    assert torch.equal(copy.deepcopy(result.model)(x), reference)
    exported = torch.export.export(result.model, (x,)).module()(x)
    torch.testing.assert_close(exported, reference, rtol=0, atol=0)


def test_state_dict_names_are_stable():
    names = set(quick(classifier(), image()).model.state_dict())
    assert {"3.first.weight", "3.core.weight", "3.last.weight", "3.last.bias", "7.first.weight", "0.weight"} <= names
    assert "3.first.bias" not in names


def test_the_pickled_model_does_not_carry_the_example_inputs():
    model = nn.Sequential(nn.Linear(64, 64))
    result = fxlrd.compress(model, torch.randn(10_000, 64), measure=False)
    assert len(pickle.dumps(result.model)) < 100_000


def test_the_result_holds_no_calibration_data_and_the_original_stays_as_it_is():
    model = classifier().train()
    model[3].requires_grad_(False).eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    data = image(400)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    result = quick(model, image(), budget=Budget(params=0.6), calibration=data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False] * 2 + [True] * 2
    assert [p.grad is not None for p in model.parameters()] == [True] + [False] * 7
    mine, theirs = (
        {t.untyped_storage().data_ptr() for t in m.state_dict().values() if t.numel()} for m in (model, result.model)
    )
    assert not mine & theirs
    assert not [key for key in result.model.meta if str(key).startswith("fxlrd")]
    gone = weakref.ref(data)
    del data
    gc.collect()
    assert gone() is None
    kept = sum(t.numel() * t.element_size() for t in result.model.state_dict().values())
    assert len(pickle.dumps(result.model)) < kept + 30_000
    for copied in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        x = image()
        assert torch.equal(copied.eval()(x), result.model.eval()(x))


def test_a_result_can_be_compressed_again():
    x = image()
    first = quick(classifier().eval(), x, budget=Budget(params=0.8), calibration=image(20))
    again = Pipeline.parse("decompose{ranks=2}")(fxlrd.capture(first.model, x))
    assert again.modified, "the plan that was carried out is gone"


def test_inplace_puts_the_factors_into_the_users_model():
    model, x = classifier().eval(), image()
    reference = quick(model, x, ratio=2.0).model(x)
    result = quick(model, x, ratio=2.0, inplace=True)
    assert result.model is model
    assert [n for n, _ in model[3].named_children()] == ["first", "core", "last"]
    assert torch.equal(model(x), reference)


def test_inplace_reaches_every_name_of_a_shared_module():
    shared = nn.Linear(32, 32)
    model, x = nn.Sequential(shared, nn.ReLU(), shared).eval(), torch.randn(2, 32)
    quick(model, x, inplace=True)
    assert model[0] is model[2]
    assert [n for n, _ in model[0].named_children()] == ["first", "last"]


def test_inplace_gives_what_a_copy_gives():
    model, x, data = classifier().eval(), image(), image(20)
    options = {"budget": Budget(params=0.6), "calibration": data}
    copied = quick(model, x, **options)
    result = quick(model, x, inplace=True, **options)
    assert result.model is model
    assert torch.equal(model(x), copied.model(x))


@pytest.mark.slow
def test_inplace_counts_what_the_graph_never_calls():
    x = torch.randn(1, 3, 64, 64)
    result = quick(googlenet(init_weights=False), x, inplace=True)
    assert result.report.after["params"] == sum(p.numel() for p in result.model.parameters())


def test_inplace_undoes_everything_if_the_model_then_fails():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(32, 64, 3), nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)).view(-1, 64 if type(self.fc) is nn.Linear else 63))

    model = Reads()
    conv, fc = model.conv, model.fc
    with pytest.raises(FxlrdError, match="inplace=False"):
        fxlrd.compress(model, torch.randn(2, 32, 8, 8), inplace=True, measure=False)
    assert model.conv is conv
    assert model.fc is fc


class UnusedOutput(nn.Module):
    """The output of ``b`` is not used, so that no graph has it; a model changed in place still runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.b(x)
        return self.c(self.a(x).relu())


def test_inplace_counts_and_budgets_what_is_run_though_its_output_is_not_used():
    x, model = torch.randn(8, 64), UnusedOutput().eval()
    data = [torch.randn(8, 64) for _ in range(6)]
    with FlopCounterMode(display=False) as original:
        model(x)
    steps = "calibrate{effects=8},allocate{params=0.5,merge=false},decompose"
    report = quick(model, x, pipeline=steps, calibration=data, inplace=True).report
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert (report.before["flops"], report.after["flops"]) == (original.get_total_flops(), counter.get_total_flops())
    assert report.after["params"] == sum(p.numel() for p in model.parameters())
    assert report.after["params"] <= 0.5 * report.before["params"]


class Trained(nn.Sequential):
    """A class with methods that people call, as a LightningModule's."""

    def training_step(self, batch):
        return self(batch).mean()


def test_a_graph_that_lacks_methods_of_the_class_says_how_to_keep_them():
    model, x = Trained(nn.Linear(64, 64)), torch.randn(2, 64)
    warnings = quick(model, x).report.warnings
    assert any("no training_step() as Trained has" in text and "inplace=True" in text for text in warnings)
    in_place = quick(copy.deepcopy(model), x, inplace=True)
    assert not any("training_step" in text for text in in_place.report.warnings)
    in_place.model.training_step(x)


@pytest.mark.parametrize("bound", [False, True])
def test_hooks_of_the_result_refer_to_the_result(bound):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(16))
            self.block, self.last = nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 16)
            self.block.register_forward_hook(self.scaled if bound else lambda module, args, output: output * self.gain)

        def scaled(self, module, args, output):
            return output * self.gain

        def forward(self, x):
            return self.last(self.block(x))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 16)
    result = fxlrd.compress(model, x, ratio=2, measure=False).model
    before = result(x)
    with torch.no_grad():
        model.gain.zero_()
    assert torch.equal(before, result(x))
