"""Factors follow the weights: changed, exchanged, frozen and freed ones."""

from __future__ import annotations

import gc
import inspect

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config

from fxlrd.backend.contents import ENTRIES, TURNS, _sample
from fxlrd.backend.factor_sets import LIMIT
from fxlrd.backend.options import Options
from tests.support.backend import EAGER, close, compiled, expected, images, net, serving
from tests.support.cases import cases


@pytest.mark.parametrize("inner", cases(["eager", "aot_eager", "inductor"], slow=["aot_eager", "inductor"]))
@torch.no_grad()
def test_two_instances_take_turns(inner, monkeypatch):
    a, b, x = net(0), net(1), images()
    want = [expected(m, x) for m in (a, b)]
    f = torch.compile(lambda m, v: m(v), backend="fxlrd", options={"inner": inner})
    (served,) = serving(lambda: close(f(a, x), want[0]))  # one graph serves both
    close(f(b, x), want[1])
    monkeypatch.setattr(served, "_lowered", None)  # from here on, nothing is decomposed
    for _ in range(3):
        close(f(a, x), want[0])
        close(f(b, x), want[1])


@pytest.mark.slow
@torch.no_grad()
def test_the_number_of_factor_sets_is_limited():
    x = images()
    f = torch.compile(lambda m, v: m(v), backend="fxlrd", options=EAGER)
    models = [net(i) for i in range(LIMIT + 2)]
    (served,) = serving(lambda: f(models[0], x))
    for m in models:
        close(f(m, x), expected(m, x))
    assert len(served.sets.retained) == LIMIT
    close(f(models[0], x), expected(models[0], x))


def _load(model):
    model.load_state_dict(net(5).state_dict())


def _step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.enable_grad():
        model(images()).square().sum().backward()
    optimizer.step()


def _replace(model):
    model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))


def _data(model):
    model.blocks[0].conv1.weight.data = torch.randn_like(model.blocks[0].conv1.weight)


def _data_beside(model):
    """The old data live on elsewhere."""
    model.old_data = model.head.weight.data
    model.head.weight.data = torch.randn_like(model.head.weight)


def _in_place(model):
    for p in model.parameters():
        p.mul_(0.9)


def _detached(model):
    model.head.bias.detach().add_(1)
    model.blocks[1].conv2.weight.detach()[0, 0] = 3


def _inference_mode(model):
    with torch.inference_mode():
        model.head.weight.add_(1)


CHANGES = [
    _load,
    _step,
    _replace,
    _data,
    _data_beside,
    _in_place,
    _detached,
    _inference_mode,
]


@pytest.mark.parametrize("change", cases(CHANGES, slow=[_replace, _data_beside, _in_place, _detached]))
@torch.no_grad()
def test_changed_weights_get_new_factors(change):
    model, x = net(), images()
    f = compiled(model)
    before = f(x)
    change(model)
    want = expected(model, x)
    assert not torch.allclose(want, before)
    close(f(x), want)
    change(model)
    close(f(x), expected(model, x))


@torch.no_grad()
def test_new_data_at_the_same_address():
    model, x = net(), images()
    weight = model.head.weight
    weight_shape = weight.shape
    memory = bytearray(weight.numel() * weight.element_size())

    def place(value):
        weight.data = torch.empty(0)  # frees the data before
        torch.frombuffer(memory, dtype=torch.float32).fill_(value)
        weight.data = torch.frombuffer(memory, dtype=torch.float32).view(weight_shape)
        return weight._version, weight.data_ptr()

    f = compiled(model)
    was = place(0.25)
    close(f(x), expected(model, x))
    assert place(0.5) == was
    close(f(x), expected(model, x))


def _fused(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    with torch.enable_grad():
        model(images()).square().sum().backward()
    optimizer.step()


def _lora(model):
    weight = model.head.weight
    weight.data += torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])


def _data_copy(model):
    for p, new in zip(model.parameters(), net(5).parameters(), strict=True):
        p.data.copy_(new)


def _foreach(model):
    torch._foreach_mul_([p.data for p in model.parameters()], 0.5)


def _row(model):
    model.blocks[1].conv2.weight.data[5] += 1


def _storage(model):
    weight = model.blocks[0].conv1.weight
    weight.untyped_storage().copy_(torch.randn_like(weight).untyped_storage())


def _numpy(model):
    model.head.weight.detach().numpy()[:] *= 2


def _set(model):
    model.head.weight.set_(torch.randn_like(model.head.weight))


def _swap(model):
    torch.utils.swap_tensors(model.head.weight, nn.Parameter(torch.randn_like(model.head.weight)))


UNCOUNTED = [_fused, _lora, _data_copy, _foreach, _row, _storage, _numpy]


@pytest.mark.parametrize("change", [*UNCOUNTED, _set, _swap])
@torch.no_grad()
def test_writes_that_torch_does_not_count_are_seen_in_the_contents(change):
    model, x = net(), images()
    f = compiled(model)
    before = f(x)
    versions = [p._version for p in model.parameters()]
    change(model)
    assert change not in UNCOUNTED or versions == [p._version for p in model.parameters()]
    want = expected(model, x)
    assert not torch.allclose(want, before)
    close(f(x), want)


@torch.no_grad()
def test_what_a_sample_misses_counts_with_a_version():
    """docs/how-to/torch-compile.md says that a write to single entries of a large weight is not noticed."""
    model, x = nn.Sequential(nn.Linear(512, 512)), torch.ones(2, 512)
    f = compiled(model)
    before = f(x)
    sampled = {i for turn in range(TURNS) for i in _sample((512, 512), ENTRIES // 2, turn)}
    missed = next(i for i in range(512) if i not in sampled)
    model[0].weight.data[0, missed] += 100
    assert all(torch.equal(f(x), before) for _ in range(TURNS))
    torch.autograd.graph.increment_version(model.parameters())
    close(f(x), expected(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("change", [_load, _step, _replace, _data, _in_place])
@torch.no_grad()
def test_changed_weights_are_compiled_again_where_they_are_frozen(change):
    model, x = net(), images()
    f = torch.compile(model, backend="fxlrd")
    with config.patch(freezing=True):
        before = f(x)
    close(before, expected(model, x))
    change(model)
    with config.patch(freezing=change in (_replace,)):  # another Parameter is another graph to Dynamo
        got = f(x)
    want = expected(model, x)
    assert not torch.allclose(want, before)
    close(got, want)


@pytest.mark.slow
@torch.no_grad()
def test_frozen_instances_and_norms():
    a, b, x = net(0), net(1), images()
    with config.patch(freezing=True):
        f = torch.compile(lambda m, v: m(v), backend="fxlrd", options={"inner": "inductor"})
        for m in (a, b, a):
            close(f(m, x), expected(m, x))
    a.blocks[0].bn1.running_mean.add_(1)  # no factor was made of it, but it is frozen
    close(f(a, x), expected(a, x))


@torch.no_grad()
def test_factors_freeze():
    model, x = net(), images()
    seen = []

    def inner(gm, inputs):
        seen.append(gm)
        return gm

    with config.patch(freezing=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Options, "compile", lambda self, gm, inputs: inner(gm, inputs))
        close(compiled(model)(x), expected(model, x))
    (gm,) = seen
    assert len(gm.graph.find_nodes(op="placeholder")) == 1
    assert {n for n, _ in gm.named_parameters() if n.startswith("fxlrd_")} >= {
        "fxlrd_blocks_0_conv1_core_weight",
        "fxlrd_head_last_bias",
    }


@torch.no_grad()
def test_factors_are_static_and_other_layers_stay_as_they_are():
    model, x = net(), images()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Options, "compile", lambda self, gm, inputs: seen.append((gm, inputs)) or gm)
        compiled(model, skip="blocks.1")(x)
    gm, inputs = seen[0]
    placeholders = gm.graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(inputs)
    assert not any(
        n.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is None
        for n in placeholders
        if "_parameters_" in n.name or n.name.startswith("fxlrd_")
    )
    arguments = {id(t) for t in inputs}
    assert id(model.blocks[1].conv1.weight) in arguments
    assert id(model.stem.bias) in arguments
    assert any(n.target is torch.conv2d and "blocks_modules_1" in str(n.args[1]) for n in gm.graph.nodes)
    metadata = torch._functorch._aot_autograd.frontend_utils._try_get_metadata_from_dynamo
    given_too = [[]][: len(inspect.signature(metadata).parameters) - 3]  # newer versions of torch take one more
    _, static = metadata(gm, {}.keys(), len(placeholders), *given_too)
    activations = [i for i, n in enumerate(placeholders) if i not in static]
    assert [inputs[i] is x for i in activations] == [True]


@torch.no_grad()
def test_weights_are_freed_with_their_model():
    models, x = [net()], images()
    f = torch.compile(lambda m, v: m(v), backend="fxlrd", options=EAGER)
    (served,) = serving(lambda: f(models[0], x))
    assert len(served.sets.retained) == 1
    models.clear()
    gc.collect()
    assert served.sets.retained == []
    assert served.sets.latest.factors == ()


@pytest.mark.slow
@torch.no_grad()
def test_a_new_weight_at_the_address_of_a_freed_one_gets_its_own_factors():
    x = images()
    f = torch.compile(lambda m, v: m(v), backend="fxlrd", options=EAGER)
    for seed in range(4):
        model = net(seed)
        want = expected(model, x)
        close(f(model, x), want)
        del model
        gc.collect()


def test_weights_without_versions_are_refused():
    with torch.inference_mode():
        model = net()
    with torch.inference_mode(), pytest.raises(BackendCompilerFailed, match=r"made under torch\.inference_mode"):
        compiled(model)(images())
