from __future__ import annotations

import functools
import threading
import types
import weakref

import pytest
import torch
from torch import nn

from fxlrd.errors import FxlrdError
from fxlrd.graph.copies import aliasing_copy, independent_copy, private_copy, structural_copy
from tests.support.models import Function

X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8)


def linear():
    return nn.Linear(8, 8).double()


class Net(nn.Module):
    """Two layers, one of which has two names, and a norm."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = linear(), nn.BatchNorm1d(8).double()
        self.alias = self.fc

    def forward(self, x):
        return self.alias(self.norm(self.fc(x)))


def addresses(tensors):
    return [t.data_ptr() for t in tensors]


@pytest.mark.parametrize(
    ("copied", "shares_parameters", "shares_buffers"),
    [(structural_copy, True, True), (private_copy, True, False), (independent_copy, False, False)],
)
def test_modules_of_its_own_around_tensors_that_are_shared_or_not(copied, shares_parameters, shares_buffers):
    model = Net()
    twin = copied(model)
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
    assert twin.alias is twin.fc
    assert (addresses(twin.parameters()) == addresses(model.parameters())) is shares_parameters
    assert (addresses(twin.buffers()) == addresses(model.buffers())) is shares_buffers
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_tensor_with_a_history_that_a_forward_stored_is_copied():
    model = Net()
    model.last = model.fc(X)
    twin = independent_copy(model)
    assert torch.equal(twin.last, model.last)
    assert twin.last.data_ptr() != model.last.data_ptr()
    assert model.last.requires_grad


def stores(model):
    def hook(module, args, output):
        model.features = output

    return hook


def test_hooks_and_functions_of_a_copy_refer_to_the_modules_of_the_copy():
    model = Function(lambda self, x: self.head(self.fc(x)) + self.features, fc=linear(), head=linear())
    model.fc.register_forward_hook(stores(model))
    model.shortcut = lambda x: model.fc(x) * 2
    model.forward = functools.partial(lambda self, x: self.shortcut(x) + self.f(self, x), model)
    twin = structural_copy(model)
    expected = model(X)
    del model.features
    assert torch.equal(twin(X), expected)
    assert "features" not in vars(model)
    twin.fc.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    assert not torch.equal(twin.shortcut(X), model.shortcut(X))


def by_closure(model, seen):
    return lambda module, args, output: seen.update(a=output)


def by_default(model, seen):
    def hook(module, args, output, seen=seen):
        seen["a"] = output

    return hook


def by_keyword(model, seen):
    def hook(*args, seen=seen):
        seen["a"] = args[-1]

    return hook


def by_method(model, seen):
    return types.MethodType(lambda module, *args: seen.update(a=args[-1]), model.fc)


def by_weak_reference(model, seen):
    reference = weakref.ref(model)
    return lambda module, args, output: reference().box["seen"].update(a=output)


def by_proxy(model, seen):
    proxy = weakref.proxy(model)
    return lambda module, args, output: proxy.box["seen"].update(a=output)


@pytest.mark.parametrize("hook", [by_closure, by_default, by_keyword, by_method, by_weak_reference, by_proxy])
def test_a_copy_stores_into_dicts_of_its_own(hook):
    model = Net()
    model.box = {"seen": {}}
    model.fc.register_forward_hook(hook(model, model.box["seen"]))
    twin = structural_copy(structural_copy(model))
    twin(X)
    assert model.box == {"seen": {}}
    assert set(twin.box["seen"]) == {"a"}
    model(X)  # with gradients: what it stores now has a history
    stored, again = model.box["seen"]["a"], structural_copy(model)
    again(-X)
    assert model.box["seen"]["a"] is stored
    assert not torch.equal(again.box["seen"]["a"], stored)


def test_closures_over_anything_else_are_shared():
    calls, model = [], Net()
    model.fc.register_forward_hook(lambda module, args, output: calls.append(module))
    twin = structural_copy(model)
    twin(X)
    assert calls == [twin.fc, twin.fc]


def test_a_lock_is_shared_by_a_structural_copy_and_no_part_of_an_independent_one():
    model = Net()
    model.lock, model.shape = threading.Lock(), [8, 8]
    twin = structural_copy(model)
    assert twin.lock is model.lock
    assert twin.shape == model.shape
    assert twin.shape is not model.shape
    with pytest.raises(FxlrdError, match=r"^Net cannot be copied \(TypeError: .*lock.*does it hold a lock"):
        independent_copy(model)


def test_an_iterator_cannot_be_shared():
    model = Net()
    model.lines = (i for i in range(3))
    with pytest.raises(FxlrdError, match="Net cannot be copied"):
        structural_copy(model)


def test_an_aliasing_copy_has_the_memory_of_the_parameters_and_none_of_their_gradients():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    twin = aliasing_copy(model)
    assert twin[0].weight is not model[0].weight
    assert twin[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    twin(torch.randn(3, 4)).sum().backward()
    assert twin[0].weight.grad is not None
    assert all(p.grad is None for p in model.parameters())
    assert not model[1].num_batches_tracked
