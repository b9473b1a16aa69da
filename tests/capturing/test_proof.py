from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlrd
from fxlrd.capturing.model import capture_any
from fxlrd.capturing.proof import Original
from fxlrd.errors import CaptureError, FxlrdError
from fxlrd.graph.captured import Whole, captured
from fxlrd.graph.copies import independent_copy
from fxlrd.graph.inputs import Inputs, tensors

X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8)
OTHER = X.flip(0).sin() + 0.25
FULL = "decompose{ranks=100}"


def module(forward, **parts):
    """A module with the given forward and parts."""
    made = type("Model", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def linear(n_in=8, n_out=8):
    return nn.Linear(n_in, n_out).double()


def mlp():
    return nn.Sequential(linear(), nn.ReLU(), linear())


def compressed(model, inputs=X):
    return fxlrd.compress(model, inputs, pipeline=FULL, measure=False)


def assert_computes(result, model, *calls):
    """The result gives what the model gives, call after call; the first are those of a twin, since calls may count."""
    twin = independent_copy(model)
    for x in calls:
        with torch.no_grad():
            actual, expected = tensors(result.model(x)), tensors(twin(x))
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def is_whole(model, inputs=X):
    return isinstance(captured(capture_any(model, Inputs.of(inputs))), Whole)


def refusal(model, inputs=X):
    with pytest.raises(CaptureError) as caught:
        fxlrd.capture(model, inputs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a trace bakes in: each model is compressed inside, and computes the same on any inputs and in any call.


class Keeper:
    """Stores what the module it is hooked to gives."""

    def __init__(self, module):
        self.stored = None
        module.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.stored = output


def by_hooked_object():
    model = module(lambda self, x: self.b(self.a(x).relu()) + self.keeper.stored, a=linear(), b=linear())
    model.keeper = Keeper(model.a)
    return model


def by_hooked_closure():
    model = module(lambda self, x: self.b(self.a(x).relu()) + self.features["a"], a=linear(), b=linear())
    model.features = {}
    model.a.register_forward_hook(lambda module, args, output: model.features.update(a=output))
    return model


def streaming():
    def forward(self, x):
        y = self.b(self.a(x + self.last).tanh())
        self.last = x
        return y

    model = module(forward, a=linear(), b=linear())
    model.last = X  # as after a first call
    return model


def counting():
    def forward(self, x):
        self.calls += 1
        return self.b(self.a(x).relu()) * self.calls

    model = module(forward, a=linear(), b=linear())
    model.calls = 0
    return model


def caching():
    def forward(self, x):
        if self.first is None:
            self.first = self.a(x)
        return self.b(x) + self.first

    model = module(forward, a=linear(), b=linear())
    model.first = None
    return model


def accumulating():
    def forward(self, x):
        energy = torch.zeros(1, dtype=torch.float64)
        for layer in (self.a, self.b):
            x = layer(x).tanh()
            energy.add_(x.square().mean())
        return x, energy

    return module(forward, a=linear(), b=linear())


class Delay(nn.Module):
    """Without a layer: a leaf, whose state would be in the graph as it is in the model."""

    def __init__(self):
        super().__init__()
        self.last = torch.zeros(4, 8, dtype=torch.float64)

    def forward(self, x):
        last, self.last = self.last, x
        return last


def delayed():
    return nn.Sequential(linear(), Delay(), linear())


def moving_average():
    def forward(self, x):
        self.mean = self.mean * 0.5 + x.mean(0)
        return self.b(self.a(x - self.mean).relu())

    model = module(forward, a=linear(), b=linear())
    model.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
    return model


def called_otherwise():
    class Called(nn.Sequential):
        def __call__(self, x):
            return super().__call__(x) * 2

    return Called(linear(), nn.ReLU(), linear())


HIDDEN = [by_hooked_object, by_hooked_closure, streaming, counting, caching, accumulating, delayed, moving_average]
HIDDEN += [called_otherwise]


@pytest.mark.parametrize("make", HIDDEN)
@pytest.mark.parametrize("warm", [False, True], ids=["new", "called before"])
def test_what_a_trace_would_bake_in(make, warm):
    model = make().eval()
    if warm:
        with torch.no_grad():
            model(X)
    assert is_whole(model) is (warm and make is caching)  # what is cached does not change any more
    result = compressed(model)
    assert [row["decision"] for row in result.report.layers].count("svd") >= 1
    assert_computes(result, model, OTHER, X, OTHER)


def test_a_state_that_no_output_depends_on_is_no_obstacle():
    def forward(self, x):
        self.map = self.a(x)
        self.shape = x.shape
        return self.b(self.map.relu())

    model = module(forward, a=linear(), b=linear())
    assert is_whole(model)
    assert not {"map", "shape"} & set(vars(model))


def in_place(self, x):
    self.steps.add_(1)
    return self.b(self.a(x).relu())


def assigned(self, x):
    self.steps = self.steps + 1
    return self.b(self.a(x).relu())


@pytest.mark.parametrize("forward", [in_place, assigned])
def test_a_buffer_that_forward_writes(forward):
    model = module(forward, a=linear(), b=linear())
    model.register_buffer("steps", torch.zeros(1))
    assert "leaves something else in the buffer steps than the model" in refusal(model)
    result = compressed(model)
    result.model(X)
    assert (result.model.steps.item(), model.steps.item()) == (1, 0)


def test_a_part_under_autocast():
    def forward(self, x):
        y = self.body(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(y)

    model, x = module(forward, body=mlp(), head=linear()).float(), X.float()
    assert "autocast" in refusal(model, x)
    result = compressed(model, x)
    with torch.no_grad():
        assert result.model(x).dtype is torch.bfloat16
        torch.testing.assert_close(result.model(x), model(x), rtol=2e-2, atol=2e-2)
    rows = {row["name"]: row["decision"] for row in result.report.layers}
    assert rows == {"body.0": "svd", "body.2": "svd", "head": "skipped"}


def gradients(model, x=X):
    model.train()
    sum(t.sum() for t in tensors(model(x))).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_part_that_gradients_do_not_reach(guard):
    def forward(self, x):
        with guard():
            y = self.body(x)
        return self.head(y.clone())

    model = module(forward, body=mlp(), head=mlp())
    assert "lets gradients reach body.0.weight (is a part of its forward under torch.no_grad()?)" in refusal(model)
    result = compressed(model)
    assert_computes(result, model, OTHER)
    reached = gradients(result.model)
    assert reached
    assert not any(name.startswith("body") for name in reached)


class Reverse(torch.autograd.Function):
    """The identity, whose gradient is reversed."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def test_a_backward_of_the_users_own():
    model = module(lambda self, x: self.b(Reverse.apply(self.a(x))), a=linear(), b=linear())
    result = compressed(model)
    assert_computes(result, model, OTHER)
    for m in (result.model, model):
        m.zero_grad()
        m(X).square().sum().backward()
    bias = next(p for name, p in result.model.named_parameters() if name in ("a.last.bias", "a.bias"))
    torch.testing.assert_close(bias.grad, model.a.bias.grad, rtol=1e-9, atol=1e-9)


class WithFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = linear(), linear(), linear(8, 3)

    def features(self, x):
        return self.b(F.silu(self.a(x)))

    def forward(self, x):
        return self.head(self.features(x))


def test_a_method_that_was_set_as_forward_on_the_model():
    model = WithFeatures()
    model.forward = model.features
    assert is_whole(model)
    result = compressed(model)
    assert_computes(result, model, X, OTHER)


def test_a_function_that_was_set_as_forward_on_the_model():
    model = WithFeatures()
    model.forward = lambda x: model.features(x) * 2
    assert not is_whole(model)
    result = compressed(model)
    assert [row["decision"] for row in result.report.layers] == ["svd", "svd", "skipped"]
    assert_computes(result, model, X, OTHER)


def test_modules_named_by_keywords():
    proj = nn.ModuleDict({"in": linear(8, 6), "out": linear(6, 8)})
    model = module(lambda self, x: self.proj["out"](self.proj["in"](x).relu()), proj=proj)
    assert "proj.in: 'in' is a keyword of Python" in refusal(model)
    result = compressed(model)
    assert {row["name"]: row["decision"] for row in result.report.layers} == {"proj.in": "svd", "proj.out": "svd"}
    assert_computes(result, model, OTHER)


@pytest.mark.parametrize("name", ["a\nb", 'a"b', "a\\n", "a\r", "\0"])
def test_names_that_break_code(name, tmp_path):
    def make():
        proj = nn.ModuleDict({name: linear(8, 6), "out": linear(6, 8)})
        return module(lambda self, x: self.proj["out"](self.proj[name](x).relu()), proj=proj)

    model = make()
    assert "has a quote, a backslash or a line break, and torch.fx writes code with it" in refusal(model)
    result = compressed(model)
    assert {row["decision"] for row in result.report.layers} == {"svd"}
    assert "\n" not in result.report.layers[0]["reason"]
    assert_computes(result, model, OTHER)
    fxlrd.save(result, tmp_path)
    assert torch.equal(fxlrd.load(tmp_path, make())(OTHER), result.model(OTHER))


@pytest.mark.parametrize("name", ["graph", "code", "meta", "train"])
def test_modules_named_as_attributes_of_a_graph_module(name):
    class Named(nn.Module):
        def forward(self, x):
            return getattr(self, name)(x)

    model = Named()
    model._modules[name] = mlp()
    message = refusal(model) if name != "train" else ""
    assert not message or message.startswith(f"{name}.0: torch.fx.GraphModule has an attribute '{name}' of its own")


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    parts: list


def test_outputs_in_a_dataclass():
    model = module(lambda self, x: Output(self.b(self.a(x).relu()), [x]), a=linear(), b=linear())
    assert is_whole(model)
    result = compressed(model)
    assert type(result.model(X)) is Output
    assert_computes(result, model, OTHER)
    assert result.report.passes[0]["relative_error"] < 1e-12


class Plain:
    def __init__(self, logits):
        self.logits = logits


def test_outputs_in_an_object():
    model = module(lambda self, x: Plain(self.b(self.a(x).relu())), a=linear(), b=linear())
    result = compressed(model)
    assert type(result.model(X)) is Plain
    assert_computes(result, model, OTHER)


def test_a_sparse_buffer():
    def forward(self, x):
        return torch.sparse.mm(self.laplacian, self.b(torch.sparse.mm(self.laplacian, self.a(x)).relu()))

    model = module(forward, a=linear(), b=linear())
    model.register_buffer("laplacian", torch.eye(4, dtype=torch.float64).roll(1, 0).to_sparse())
    assert is_whole(model)
    assert_computes(compressed(model), model, OTHER)


# What the proof needs of other inputs.


def test_where_the_model_fails_on_other_inputs_it_is_called_on_the_example_again():
    def forward(self, x):
        if torch.is_grad_enabled() or x.sum() != X.sum():
            raise ValueError("not these")
        return self.b(self.a(x))

    original = Original(module(forward, a=linear(), b=linear()), Inputs.of(X))
    assert original.behaviour.gradients is None
    assert torch.equal(original.behaviour.other_outputs[0], original.behaviour.outputs[0])


def test_a_model_that_fails_on_the_example_inputs():
    with pytest.raises(FxlrdError, match="the model fails on the example inputs"):
        Original(module(lambda self, x: self.a(x[:, :4]), a=linear()), Inputs.of(X))


def test_lengths_that_must_be_sorted_and_indices_stay_valid():
    def forward(self, tokens, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True)
        return self.head(self.rnn(packed)[1][0])

    model = module(forward, embedding=nn.Embedding(20, 8), rnn=nn.GRU(8, 8, batch_first=True), head=nn.Linear(8, 4))
    inputs = (torch.arange(18).reshape(3, 6), torch.tensor([6, 4, 2]))
    result = compressed(model, inputs)
    assert {row["name"]: row["decision"] for row in result.report.layers} == {
        "head": "svd",
        "rnn.weight_ih_l0": "skipped",
        "rnn.weight_hh_l0": "skipped",
    }
    with torch.no_grad():
        torch.testing.assert_close(result.model(*inputs), model(*inputs))


# The user's model is as it was.


class Merges(nn.Linear):
    """Merges its adapter into its weight in eval mode, and takes it out in training mode, as loralib does."""

    def __init__(self):
        super().__init__(8, 8)
        self.down, self.up, self.merged = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up.data @ self.down.data)
            self.merged = not mode
        return self

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


def untraceable(self, x):
    return self.model(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "regions"])
def test_an_adapter_that_train_merges(whole):
    model = nn.Sequential(linear(), nn.ReLU(), Merges().double(), nn.ReLU(), linear())
    outer = (model if whole else module(untraceable, model=model)).train()
    state, expected = copy.deepcopy(outer.state_dict()), outer(X).detach()
    result = fxlrd.compress(outer, X, pipeline=FULL)
    assert all(torch.equal(value, state[name]) for name, value in outer.state_dict().items())
    assert not model[2].merged
    assert all(m.training for m in outer.modules())
    torch.testing.assert_close(result.model.eval()(X).detach(), expected, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, state[name]) for name, value in outer.state_dict().items())


def snapshot(model):
    """Everything on a model that is its user's: attributes, hooks, modes, tensors and their versions."""
    return [
        (
            name,
            type(module),
            {
                key: (value if not isinstance(value, (dict, list)) else copy.copy(value))
                for key, value in vars(module).items()
            },
            [(id(t), t.clone(), t.grad, t.requires_grad) for t in (*module.parameters(False), *module.buffers(False))],
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def assert_unchanged(before, after):
    for (name, kind, attributes, values), (name_after, kind_after, attributes_after, values_after) in zip(
        before, after, strict=True
    ):
        assert (name, kind) == (name_after, kind_after)
        assert attributes.keys() == attributes_after.keys()
        for key, value in attributes.items():
            other = attributes_after[key]
            assert value is other or (isinstance(value, (dict, list)) and value == other) or value == other, (
                f"{name}.{key}"
            )
        for (identity, value, grad, needs), (identity_after, value_after, grad_after, needs_after) in zip(
            values, values_after, strict=True
        ):
            assert (identity, needs) == (identity_after, needs_after)
            assert grad is grad_after
            assert torch.equal(value, value_after)


@pytest.mark.parametrize("make", [*HIDDEN, WithFeatures])
def test_nothing_is_left_on_the_users_model(make):
    model = make().train()
    next(model.parameters()).requires_grad_(False)
    for module in list(model.modules())[1::2]:
        module.training = False
    before, random = snapshot(model), torch.get_rng_state()
    fxlrd.compress(model, X, pipeline=FULL)
    assert_unchanged(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), random)


def test_threads_that_compress_one_model_get_what_one_would():
    model = nn.Sequential(linear(), nn.Dropout(), linear()).train()
    expected, results, errors = compressed(model).model.state_dict(), [], []

    def work():
        try:
            results.extend(compressed(model).model for _ in range(4))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(m.training for m in model.modules())
    assert all(m.training for result in results for m in result.modules())
    assert all(torch.equal(v, expected[k]) for result in results for k, v in result.state_dict().items())


class WritesWeightsInTraining(nn.Module):
    """As a model that normalises its weight at each training step; it cannot be traced as a whole."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.a.weight.mul_(0.5)
        return self.b(self.a(x)) if x.sum() < 1e9 else x


def test_a_run_in_training_mode_does_not_write_to_the_users_weights():
    model = WritesWeightsInTraining().eval()
    before = model.a.weight.detach().clone()
    fxlrd.compress(model, torch.randn(2, 32), ratio=2.0, measure=False)
    assert torch.equal(model.a.weight, before)
