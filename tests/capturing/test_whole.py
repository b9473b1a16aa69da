from __future__ import annotations

import copy
import operator
import pickle
import threading
from enum import Enum

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxlrd import compress
from fxlrd.capturing.whole import capture
from fxlrd.errors import CaptureError, FxlrdError
from fxlrd.graph.captured import captured
from fxlrd.graph.compare import difference
from fxlrd.graph.facts import provenance
from fxlrd.graph.guards import container_hooked
from fxlrd.graph.inputs import tensors
from fxlrd.graph.run import evaluating
from fxlrd.graph.surgery import layers
from fxlrd.layers.attention import PROJECTIONS

X = torch.linspace(-1, 1, 2 * 4 * 6 * 6).reshape(2, 4, 6, 6)


def model(forward, **modules):
    """A module with a conv, a linear, other modules, and the given forward."""
    cls = type("Model", (nn.Module,), {"forward": forward})
    made = cls()
    for name, module in {"conv": nn.Conv2d(4, 4, 3, padding=1), **modules}.items():
        setattr(made, name, module)
    return made.eval()


def assert_same(gm, wanted, *args, **kwargs):
    with evaluating(gm), evaluating(wanted), torch.no_grad():
        found = tensors(gm(*args, **kwargs))
        assert difference(found, tensors(wanted(*args, **kwargs)), "capture").max_abs == 0


def targets(gm, op="call_module"):
    return [n.target for n in gm.graph.nodes if n.op == op]


def error_of(m, inputs, kind=FxlrdError):
    with pytest.raises(kind) as caught:
        capture(m, inputs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Noise(nn.Module):
    """Layer-free, with control flow on its mode."""

    def forward(self, x):
        if self.training:
            x = x + torch.randn_like(x)
        return x * 2


def test_layer_free_modules_stay_leaves():
    m = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), Noise()), nn.Sequential(nn.ReLU(), nn.Dropout()))
    gm = capture(m, X)
    assert targets(gm) == ["0.0", "0.1", "1"]
    assert type(gm.get_submodule("0.1")) is Noise
    assert_same(gm, m, X)
    gm.train()
    assert not torch.equal(gm(X), gm(X))


def test_parameters_are_shared_and_nodes_annotated():
    m = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    gm = capture(m, X)
    assert {name: id(p) for name, p in gm.named_parameters()} == {name: id(p) for name, p in m.named_parameters()}
    assert not {id(module) for module in gm.modules()} & {id(module) for module in m.modules()}
    for n in gm.graph.nodes:
        if n.op == "call_module":
            assert (provenance(n).name, provenance(n).role) == (n.target, "original")
            assert provenance(n).original is gm.get_submodule(n.target)
    shapes = [tuple(n.meta["tensor_meta"].shape) for n in gm.graph.nodes]
    assert shapes == [(2, 4, 6, 6), (2, 8, 4, 4), (2, 8, 4, 4), (2, 2, 4, 4), (2, 2, 4, 4)]
    assert captured(gm).unreached == {}
    assert captured(gm).warnings == ()
    assert captured(gm).inputs.args == (X,)


@pytest.mark.parametrize("operation", ["iadd", "isub", "imul", "itruediv"])
def test_in_place_arithmetic_stays_in_place(operation):
    change = getattr(operator, operation)

    def forward(self, x):
        y = self.conv(x)
        view = y.flatten()
        y = change(y, 3)
        return y, view

    m = model(forward)
    gm = capture(m, X)
    assert change in targets(gm, "call_function")
    assert_same(gm, m, X)
    y, view = gm(X)
    assert y.data_ptr() == view.data_ptr()


def alias(self, x):
    y = self.conv(x)
    z = y
    z += 1
    return y


def method(self, x):
    y = self.conv(x)
    y.add_(1)
    return y


def function(self, x):
    y = self.conv(x)
    F.relu(y, inplace=True)
    return y


def module(self, x):
    y = self.conv(x)
    self.relu(y)
    return y


@pytest.mark.parametrize("forward", [alias, method, function, module])
def test_in_place_statements_are_no_dead_code(forward):
    m = model(forward, relu=nn.ReLU(inplace=True))
    assert_same(capture(m, X), m, X)


def flagged(self, x, mask=None, flag=True, scale=2.0, mode="a"):
    y = self.conv(x)
    if mask is not None:
        y = y * mask
    if flag:
        y = y * scale
    return y + 1 if mode == "a" else y


DEFAULTS = {"mask": None, "flag": True, "scale": 2.0, "mode": "a"}
OTHERS = {"mask": X, "flag": False, "scale": 3.0, "mode": "b"}


def test_defaults_are_frozen_under_their_names_and_reported():
    m = model(flagged)
    gm = capture(m, X)
    assert targets(gm, "placeholder") == ["x", *DEFAULTS]
    assert captured(gm).warnings == ("frozen arguments of forward: mask=None, flag=True, scale=2.0, mode='a'",)
    assert_same(gm, m, X)
    assert_same(gm, m, X, **DEFAULTS)
    assert_same(gm, m, x=X, scale=2.0)


@pytest.mark.parametrize("name", DEFAULTS)
def test_another_value_of_a_frozen_default_fails_at_run_time(name):
    gm = capture(model(flagged), X)
    with pytest.raises(AssertionError, match=name):
        gm(X, **{name: OTHERS[name]})
    with pytest.raises(AssertionError, match=name):
        copy.deepcopy(gm)(X, **{name: OTHERS[name]})


@pytest.mark.parametrize("name", ["flag", "scale", "mode"])
def test_a_flag_given_by_the_inputs_is_frozen_too(name):
    m = model(flagged)
    gm = capture(m, {"x": X, name: OTHERS[name]})
    assert_same(gm, m, X, **{name: OTHERS[name]})
    with pytest.raises(AssertionError, match=name):
        gm(X, **{name: DEFAULTS[name]})


@pytest.mark.parametrize("inputs", [(X,), {"x": X, "size": (2, 2)}, (X, (3, 3))], ids=["default", "kwarg", "arg"])
def test_a_tuple_argument_is_frozen_too(inputs):
    def forward(self, x, size=(2, 2)):
        return F.interpolate(self.conv(x), size=size)

    m = model(forward)
    gm = capture(m, inputs)
    given = inputs if isinstance(inputs, dict) else dict(zip(("x", "size"), inputs, strict=False))
    assert_same(gm, m, **given)


def test_argument_names_that_end_like_those_of_torch_fx():
    def forward(self, x, scale_1=1.0, scale=2.0):
        return self.conv(x) * scale * scale_1

    m = model(forward)
    gm = capture(m, X)
    assert targets(gm, "placeholder") == ["x", "scale_1", "scale"]
    assert_same(gm, m, X)


def test_keyword_only_arguments():
    def forward(self, x, *, scale=2.0):
        return self.conv(x) * scale

    m = model(forward)
    gm = capture(m, X)
    assert_same(gm, m, X, scale=2.0)
    with pytest.raises(AssertionError, match="scale"):
        gm(X, scale=3.0)


def test_keyword_inputs():
    def forward(self, left, right=None, scale=1.0):
        return self.conv(left) - scale * self.conv(right)

    m = model(forward)
    gm = capture(m, {"right": X + 1, "left": X})
    assert targets(gm, "placeholder") == ["left", "right", "scale"]
    assert_same(gm, m, left=X, right=X + 2)
    assert_same(gm, m, X, X + 2)


def test_control_flow_names_the_module_and_the_line():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            if x.sum() > 0:
                return self.fc(x)
            return x

    line = Gate.forward.__code__.co_firstlineno + 1
    message = error_of(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(Gate())), X, CaptureError)
    assert message.startswith(f"1.0 (Gate) cannot be traced at test_whole.py:{line}: it branches on values ")
    message = error_of(Gate(), X, CaptureError)
    assert message.startswith(f"Gate cannot be traced at test_whole.py:{line}: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_is_not_finite_is_named(value, name):
    m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Linear(6, 6)))
    with torch.no_grad():
        getattr(m[1][0], name).view(-1)[3] = value
    assert error_of(m, X) == f"1.0.{name} holds NaN or Inf: the model is broken before compression"


def test_lazy_and_meta_weights_are_named():
    lazy = nn.Sequential(nn.Conv2d(4, 4, 1), nn.LazyConv2d(3, 1))
    assert error_of(lazy, X) == "1.weight is not initialised yet: run the lazy model once on an input first"
    meta = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, device="meta"))
    assert error_of(meta, X) == "1.weight is on the meta device: materialise the model first"


@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        (torch.ones(2, 3, 6, 6), "(float32[2, 3, 6, 6] on cpu)"),
        (X.double(), "(float64[2, 4, 6, 6] on cpu): the model's weights are float32 on cpu; "),
        ((X, X), "(float32[2, 4, 6, 6] on cpu, float32[2, 4, 6, 6] on cpu)"),
        ({"y": X}, "(float32[2, 4, 6, 6] on cpu)"),
        ((), "(no tensor)"),
        (None, "a NoneType is not a tensor"),
    ],
    ids=["shape", "dtype", "too many", "name", "none", "type"],
)
def test_inputs_that_do_not_fit(inputs, part):
    assert part in error_of(nn.Sequential(nn.Conv2d(4, 4, 1)), inputs)


def test_no_tensor_comes_out():
    def forward(self, x):
        self.conv(x)
        return 3

    assert error_of(model(forward), X, CaptureError) == "Model returns no tensor for the example inputs"


def trained(mixed):
    m = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    m.train()(X)
    if mixed:
        m[1].eval()
        m[2][0].eval()
    return m


@pytest.mark.parametrize("mixed", [False, True])
def test_model_comes_back_in_its_modes_with_its_state(mixed):
    m = trained(mixed)
    modes = [child.training for child in m.modules()]
    state = {k: v.clone() for k, v in m.state_dict().items()}
    random = torch.get_rng_state()
    capture(m, X)
    assert [child.training for child in m.modules()] == modes
    assert m.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_model_comes_back_in_its_modes_after_an_error():
    m = trained(mixed=True)
    modes = [child.training for child in m.modules()]
    error_of(m, X.double())
    assert [child.training for child in m.modules()] == modes

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x

    m = model(forward).train()
    error_of(m, X, CaptureError)
    assert m.training
    assert m.conv.training


def dropped_by_keyword(self, x):
    return F.dropout(self.conv(x), p=0.5, training=self.training)


def dropped_by_position(self, x):
    return torch.dropout(self.conv(x), 0.5, self.training)


def branched(self, x):
    return self.conv(x) * 2 if self.training else self.conv(x)


@pytest.mark.parametrize("forward", [dropped_by_keyword, dropped_by_position, branched])
@pytest.mark.parametrize("training", [True, False])
def test_another_path_in_training_mode_is_reported(forward, training):
    m = model(forward).train(training)
    gm = capture(m, X)
    assert captured(gm).warnings == ("forward takes another path in training mode: the eval path was captured",)
    assert_same(gm, m, X)


def test_layers_never_called_are_reported():
    gm = capture(model(lambda self, x: self.conv(x), aux=nn.Linear(6, 5)), X)
    assert captured(gm).unreached["aux"].reason.code == "never-called"
    assert (captured(gm).unreached["aux"].op, captured(gm).unreached["aux"].shape) == ("Linear", (5, 6))
    assert captured(gm).unreached["aux"].params == 35
    assert len(captured(gm).warnings) == 1
    assert "1 layers (35 parameters)" in captured(gm).warnings[0]
    assert captured(gm).warnings[0].endswith(": aux")


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("register", HOOKS)
def test_a_module_with_hooks_is_kept_whole(register):
    m = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Conv2d(4, 4, 1))
    ran = []
    getattr(m[0], register)(lambda *_: ran.append(1))
    gm = capture(m, X)
    assert targets(gm) == ["0", "1"]
    assert captured(gm).unreached["0.0"].reason == container_hooked("0", m[0])
    ran.clear()
    gm(X.clone().requires_grad_()).sum().backward()
    assert ran == [1]


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_the_model_itself_are_reported(register):
    m = nn.Sequential(nn.Conv2d(4, 4, 1))
    getattr(m, register)(lambda *_: None)
    assert captured(capture(m, X)).warnings == (
        "the model's own hooks are not carried over: register them on the result",
    )


def test_a_transformer_of_torch_and_an_attention_that_cannot_be_opened_are_kept_whole():
    m = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1))
    x = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8)
    gm = capture(m, x)
    found = captured(gm).unreached
    assert found["1.layers.0.self_attn.out_proj"].reason.code == "container-reads"
    assert {*layers(gm), *found} == {
        "0",
        *(f"1.layers.0.self_attn.{role}" for role in PROJECTIONS),
        "1.layers.0.linear1",
        "1.layers.0.linear2",
    }
    assert_same(gm, m, x)

    def forward(self, x):
        return self.attention(self.fc(x), x, x)

    attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
    m = model(forward, fc=nn.Linear(8, 8), attention=attention)
    gm = capture(m, x)
    assert targets(gm) == ["fc", "attention"]
    assert captured(gm).unreached["attention.in_proj_weight"].reason.code == "added-keys"
    assert_same(gm, m, x)


def test_a_weight_used_by_a_function():
    m = model(lambda self, x: F.linear(self.conv(x), self.fc.weight), fc=nn.Linear(6, 6))
    gm = capture(m, X)
    assert captured(gm).unreached["fc"].reason.code == "weight-read"
    assert captured(gm).warnings == ()
    assert_same(gm, m, X)


def random_tensor(self, x):
    return self.conv(x) + torch.randn(2, 4, 6, 6)


def random_dropout(self, x):
    return F.dropout(self.conv(x), 0.5, True)


@pytest.mark.parametrize("forward", [random_tensor, random_dropout])
def test_a_random_forward_is_refused(forward):
    message = error_of(model(forward), X, CaptureError)
    assert message.startswith("capture of Model: the trace differs from the model by ")
    assert "random in eval mode" in message


def draws_from_its_generator(self, x):
    return self.conv(x) + torch.rand(6, generator=self.generator, dtype=x.dtype)


def makes_a_buffer(self, x):
    if not hasattr(self, "made"):
        self.register_buffer("made", torch.ones(6))
    return self.conv(x) * self.made


@pytest.mark.parametrize(("forward", "kind"), [(draws_from_its_generator, "Generator"), (makes_a_buffer, "Tensor")])
def test_what_a_trace_leaves_on_its_copy_of_the_model_is_no_part_of_a_graph(forward, kind):
    m = model(forward, generator=torch.Generator().manual_seed(3))
    state = m.generator.get_state()
    assert f"Model cannot be traced: forward uses a {kind} that the model has not" in error_of(m, X, CaptureError)
    assert isinstance(compress(m, X, pipeline="decompose{ranks=2}", measure=False).model, type(m))
    assert torch.equal(m.generator.get_state(), state)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(4, 3, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_a_bare_layer(layer, training):
    layer.train(training)
    gm = capture(layer, X)
    assert [found.weight for found in layers(gm).values()] == [layer.weight]
    assert layer.training is training
    assert_same(gm, layer, X)


@pytest.mark.parametrize(
    "pack",
    [lambda y: {"out": y, "more": [y + 1, None]}, lambda y: (y, (y + 1,)), lambda y: [y]],
    ids=["dict", "tuple", "list"],
)
def test_structured_outputs(pack):
    m = model(lambda self, x: pack(self.conv(x)))
    gm = capture(m, X)
    assert_same(gm, m, X)
    found, wanted = gm(X), m(X)
    assert type(found) is type(wanted)
    assert len(found) == len(wanted)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))

    def forward(self, x, mask=None, scale=2.0):
        y = self.conv(x)
        y += x
        return self.head(y * scale)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))], ids=["deepcopy", "pickle"]
)
def test_pickles_and_deep_copies(copied):
    gm = capture(Small(), X)
    twin = copied(gm)
    assert targets(twin) == targets(gm)
    assert targets(twin, "placeholder") == ["x", "mask", "scale"]
    assert twin.conv is not gm.conv
    assert_same(twin, gm, X)
    for name, value in {"mask": X, "scale": 3.0}.items():
        with pytest.raises(AssertionError, match=name):
            twin(X, **{name: value})
    # The code of an unpickled graph module registers names with torch.fx, for every trace that follows.
    assert targets(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))) == ["0"]


def test_what_capture_knows_survives_a_deep_copy():
    gm = capture(Small(), X)
    twin = copy.deepcopy(gm)
    assert captured(twin) == captured(gm)
    assert [provenance(n) for n in twin.graph.nodes] == [provenance(n) for n in gm.graph.nodes]


def test_result_retraces_with_plain_torch_fx():
    gm = capture(Small(), X)
    again = torch.fx.symbolic_trace(gm)
    assert targets(again) == targets(gm)
    assert_same(again, gm, X)


def test_nan_in_a_buffer_is_named():
    m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    m[1].running_var[0] = float("nan")
    with pytest.raises(FxlrdError, match=r"1\.running_var"):
        capture(m, X)


def test_a_trace_that_fails_where_the_model_runs_is_a_capture_error(capsys):
    from torchvision.models.video import swin3d_t

    with pytest.raises(CaptureError, match="the trace fails where the model runs"):
        capture(swin3d_t(), torch.randn(1, 3, 2, 32, 32))
    assert capsys.readouterr().err == ""


def test_another_thread_notices_nothing_of_a_trace():
    """Also where it runs the very model that is traced."""
    m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    expected, failures, stop = m(X), [], threading.Event()

    def serve():
        while not stop.is_set():
            try:
                assert torch.equal(m(X), expected)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    graphs = [capture(m, X) for _ in range(10)]
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(targets(gm) == ["0", "1", "2"] for gm in graphs)


class Statistics(nn.Module):
    """Acts in training mode only, on what it is given."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)


class Observed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.statistics = nn.Linear(16, 16), nn.Linear(16, 4), Statistics()

    def forward(self, x):
        h = self.a(x)
        self.statistics(h)
        return self.b(h - self.statistics.mean)


def test_a_module_that_is_called_as_a_statement_acts_in_training():
    torch.manual_seed(0)
    model, x = Observed().eval(), torch.randn(8, 16)
    result = compress(model, x, pipeline="decompose{ranks=16}", measure=False).model
    assert not result.statistics.mean.any(), "none of what was tried is left"
    result.train()(x)
    model.train()(x)
    torch.testing.assert_close(result.statistics.mean, model.statistics.mean)


def test_a_head_of_training_mode_is_not_in_the_graph():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
            self.auxiliary = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x):
            x = self.stem(x)
            auxiliary = self.auxiliary(x)
            return (self.head(x), auxiliary) if self.training else self.head(x)

    assert set(layers(capture(Auxiliary().eval(), torch.randn(4, 16)))) == {"stem", "head"}


class Pooling(Enum):
    MEAN, MAX = "mean", "max"


class Named(str, Enum):
    MEAN, MAX = "mean", "max"


@pytest.mark.parametrize("kind", [Pooling, Named, np.float64])
def test_an_argument_that_a_trace_would_never_ask_for_again_keeps_the_forward(kind):
    mean, other = (kind(0), kind(1)) if kind is np.float64 else (kind.MEAN, kind.MAX)

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x, pooling=mean):
            h = self.a(x)
            return h.amax(1) if pooling is other or pooling == other else h.mean(1)

    torch.manual_seed(0)
    model, x = Pooled().eval(), torch.randn(2, 5, 16)
    result = compress(model, x, pipeline="decompose{ranks=16}", measure=False).model
    assert type(result) is Pooled
    torch.testing.assert_close(result(x, other), model(x, other))


class Out(dict):
    @property
    def logits(self):
        return self["logits"]


def test_outputs_of_a_class_of_the_users_keep_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x):
            return Out(logits=self.a(x))

    x = torch.randn(2, 16)
    assert compress(Net(), x, ratio=2, measure=False).model(x).logits.shape == (2, 16)


def test_sparse_outputs_are_compared():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x, adjacency):
            return torch.sparse.mm(adjacency, self.a(x)), adjacency

    result = compress(Net().eval(), (torch.randn(4, 16), torch.eye(4).to_sparse()), ratio=2, measure=False)
    assert result.report.layers[0]["decision"] == "svd"


def test_layers_beside_a_parametrized_parameter_are_layers():
    class Exp(nn.Module):
        def forward(self, v):
            return v.exp()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(16))
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.b(self.a(x).relu()) * self.gain

    block = Block()
    nn.utils.parametrize.register_parametrization(block, "gain", Exp())
    for model in (nn.Sequential(block, nn.Linear(16, 16)), block):
        result = compress(model.eval(), torch.randn(2, 16), ratio=2, measure=False)
        assert {row["decision"] for row in result.report.layers} == {"svd"}
