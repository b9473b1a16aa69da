from __future__ import annotations

import functools
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlrd
from fxlrd.capturing.regions import ASKED, UNLIKE, capture_regions
from fxlrd.capturing.tracing import trace
from fxlrd.capturing.watch import RESERVED
from fxlrd.errors import CaptureError, FxlrdError
from fxlrd.graph.captured import captured
from fxlrd.graph.guards import NEVER_CALLED
from fxlrd.graph.layer import layers_of
from fxlrd.graph.surgery import layers

X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8)


def linear():
    return nn.Linear(8, 8).double()


def mlp():
    return nn.Sequential(linear(), nn.ReLU(), linear())


def module(forward, **parts):
    """A module with the given forward and parts."""
    made = type("Model", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(made, name, part)
    return made.double().eval()


def stopped(forward, **parts):
    """The same, with control flow on values around it."""

    def outer(self, x, *rest):
        if x.sum() > 1e9:
            x = x * 2
        return self.inner_forward(x, *rest)

    made = module(outer, **parts)
    made.inner_forward = types.MethodType(forward, made)
    return made


def regions(model, inputs=X):
    gm = capture_regions(model, inputs)
    names = (name for slot in captured(gm).slots for name in (slot.name, slot.ends) if name)
    return list(dict.fromkeys(names))


def reason(model, name, inputs=X):
    gm = capture_regions(model, inputs)
    assert name not in layers(gm)
    return captured(gm).unreached[name].reason.code


class Block(nn.Module):
    """Traceable, two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = linear(), nn.BatchNorm1d(8).double(), linear()
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.b(self.norm(self.a(x)).relu())


# -- what is a region


def test_the_largest_submodules_that_can_be_traced_are_taken_and_single_layers_where_there_are_none():
    def forward(self, x):
        return self.c(self.loop(self.body(x)))

    def looping(self, x):
        return self.deep(x) if x.max() > 0 else self.a(x)

    loop = module(looping, a=linear(), deep=mlp())
    assert regions(stopped(forward, body=nn.Sequential(Block(), Block()), loop=loop, c=linear())) == [
        "body",
        "loop.deep",
        "c",
    ]
    assert reason(stopped(forward, body=Block(), loop=loop, c=linear()), "loop.a") == "never-called"


def test_regions_stand_side_by_side_under_the_models_names_with_the_flops_of_the_whole_model_told():
    def forward(self, x):
        return self.c(self.body(x)) @ torch.ones(8, 8, dtype=x.dtype)

    model = stopped(forward, body=mlp(), c=linear())
    gm = capture_regions(model, X)
    assert list(layers(gm)) == ["body.0", "body.2", "c"]
    assert len([n for n in gm.graph.nodes if n.op == "placeholder"]) == 2
    regions = captured(gm)
    assert regions.outside.flops == 2 * 4 * 8 * 8  # the product with ones
    assert regions.outside.params == 0


def test_modules_may_be_named_as_they_like():
    class Steps(nn.Sequential):
        def forward(self, x):
            return super().forward(x * 2) if x.sum() > 1e9 else super().forward(x)

    assert regions(Steps(mlp(), linear())) == ["0", "1"]
    assert regions(stopped(lambda self, x: self.d["a-b"](x), d=nn.ModuleDict({"a-b": linear()}))) == ["d.a-b"]


def test_a_region_has_a_slot_for_each_set_of_shapes_up_to_four():
    def forward(self, x):
        y = self.body(x)
        return sum(self.body(y[:n]).sum() for n in (1, 2, 2, 3, 4, 1))

    gm = capture_regions(stopped(forward, body=mlp()), X)
    assert [(slot.name, slot.call) for slot in captured(gm).slots] == [("body", i) for i in (0, 1, 2, 4)]
    many = stopped(lambda self, x: sum(self.body(x[:n]).sum() for n in range(1, 7)), body=mlp())
    assert len(captured(capture_regions(many, torch.cat([X, X]))).slots) == 4


# -- what is none: nothing of a call may be frozen


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x, scale=None, shift=1.0):
        y = self.b(self.a(x).tanh())
        y = y if scale is None else y * scale
        return y + shift


@pytest.mark.parametrize(
    ("call", "taken"),
    [
        (lambda self, x: self.body(x), ["body.a", "body.b"]),
        (lambda self, x: self.body(x, None, 1.0), ["body.a", "body.b"]),
        (lambda self, x: self.body(x, x, 1.0), ["body.a", "body.b"]),
        (lambda self, x: self.body(x, scale=x, shift=x), ["body"]),
        (lambda self, x: self.body(x, shift=x, scale=x), ["body"]),
        (lambda self, x: self.body(x, x, x) + self.body(x), ["body.a", "body.b"]),
    ],
    ids=["defaults", "none", "number", "tensors", "by name", "once with defaults"],
)
def test_a_submodule_is_a_region_only_if_every_call_gives_tensors_for_all_arguments(call, taken):
    assert regions(stopped(call, body=Scaled())) == taken


def test_arguments_by_name_come_in_the_order_of_forward():
    class Minus(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x, y):
            return self.a(x) - self.b(y)

    model = stopped(lambda self, x: self.body(y=x * 2, x=x), body=Minus())
    gm = capture_regions(model, X)
    regions = captured(gm)
    assert [slot.name for slot in regions.slots] == ["body"]
    assert torch.equal(regions.example[0], X)
    assert torch.equal(regions.example[1], X * 2)


def dropped(self, x):
    return self.b(F.dropout(self.a(x), 0.5, self.training))


def always_dropped(self, x):
    return self.b(F.dropout(self.a(x), 0.5, True))


def on_shapes(self, x):
    return self.b(self.a(x)) if x.shape[0] > 2 else self.a(x)


def under_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.b(self.a(x).to(x.dtype))


@pytest.mark.parametrize("forward", [dropped, always_dropped, on_shapes])
def test_a_trace_that_freezes_the_mode_or_a_shape_or_a_random_number_is_none(forward):
    assert regions(stopped(lambda self, x: self.body(x), body=module(forward, a=linear(), b=linear()))) == [
        "body.a",
        "body.b",
    ]


def test_a_state_between_the_calls_is_not_frozen():
    class Turns(Scaled):
        turn = 0.0

        def forward(self, x):
            return self.b(self.a(x)) * self.turn

    def forward(self, x):
        self.body.turn = 2.0
        y = self.body(x)
        self.body.turn = 3.0
        return y + self.body(x)

    assert regions(stopped(forward, body=Turns())) == ["body.a", "body.b"]


def test_where_a_large_region_does_not_reproduce_smaller_ones_in_it_are_taken():
    random = module(lambda self, x: self.inner(x + torch.rand(8)), inner=mlp())
    assert regions(stopped(lambda self, x: self.body(x), body=random)) == ["body.inner"]


def test_a_layer_under_autocast_is_left_alone():
    model = stopped(
        lambda self, x: self.c(self.body(x).float()), body=module(under_autocast, a=linear(), b=linear()), c=linear()
    ).float()
    assert regions(model, X.float()) == ["c"]
    assert reason(model, "body.a", X.float()) == UNLIKE.code


def test_bfloat16_that_differs_by_more_than_rounding_is_none():
    """A thousand times its epsilon is 8: that would take anything for the same."""
    random = module(lambda self, x: self.b(self.a(x) + torch.rand(8, dtype=x.dtype)), a=linear(), b=linear())
    model = stopped(lambda self, x: self.body(x), body=random).bfloat16()
    assert regions(model, X.bfloat16()) == ["body.a", "body.b"]
    assert regions(stopped(lambda self, x: self.body(x), body=mlp()).bfloat16(), X.bfloat16()) == ["body"]


# -- what others do with the parts of a region


def uses_layer(self, x):
    return self.body(x) + self.body.a(x)


def uses_norm(self, x):
    return self.body(x) + self.body.norm(x)


def reads_norm(self, x):
    return self.body(x) * self.body.norm.weight


def reads_mean(self, x):
    return self.body(x) - self.body.norm.running_mean


@pytest.mark.parametrize("forward", [uses_layer, uses_norm, reads_norm, reads_mean])
def test_a_submodule_whose_parts_others_use_is_none(forward):
    assert regions(stopped(forward, body=Block())) == ["body.a", "body.b"]


def test_a_layer_called_under_two_names_has_one_and_is_in_no_region():
    shared = linear()
    model = stopped(
        lambda self, x: self.q(self.p(x)),
        p=nn.Sequential(shared, nn.ReLU(), linear()),
        q=nn.Sequential(linear(), shared),
    )
    gm = capture_regions(model, X)
    assert list(layers(gm)) == ["p.0", "p.2", "q.0"]


def test_an_activation_without_weights_may_be_shared():
    act = nn.ReLU()
    body = nn.Sequential(linear(), act, linear())
    assert regions(stopped(lambda self, x: self.body(self.act(x)), body=body, act=act)) == ["body"]


# -- layers that are left alone, each with its reason


def reads_weight(self, x):
    return F.linear(self.a(x), self.fc.weight, self.fc.bias)


def reads_a_row(self, x):
    return self.fc(self.a(x)) + self.fc.weight[0]


def reads_parameters(self, x):
    return self.fc(self.a(x)) * sum(p.sum() for p in self.fc.parameters())


def reads_in_training(self, x):
    return F.linear(self.a(x), self.fc.weight) if self.training else self.fc(self.a(x))


@pytest.mark.parametrize("forward", [reads_weight, reads_a_row, reads_parameters, reads_in_training])
def test_a_weight_that_is_read(forward):
    assert reason(stopped(forward, a=linear(), fc=linear()), "fc") == "weight-read"


def test_the_reason_names_the_reader_and_the_mode():
    gm = capture_regions(stopped(reads_in_training, a=linear(), fc=linear()), X)
    assert str(captured(gm).unreached["fc"].reason) == (
        "its weight is read by reads_in_training directly, in training mode"
    )


def test_a_run_in_training_mode_that_the_user_did_not_ask_for_warns_of_nothing(recwarn):
    def forward(self, x):
        if self.training:
            warnings.warn("without labels", stacklevel=1)
        return self.fc(self.a(x))

    capture_regions(stopped(forward, a=linear(), fc=linear()), X)
    assert not recwarn.list


def test_a_training_mode_that_fails_tells_what_it_read_until_then():
    def forward(self, x):
        if self.training:
            self.fc.weight.sum()
            raise ValueError("where are the labels?")
        return self.fc(self.a(x))

    assert reason(stopped(forward, a=linear(), fc=linear()), "fc") == "weight-read"


def test_what_a_layers_own_method_reads_is_its_own_matter():
    class Linear(nn.Linear):
        def shape(self):
            return self.weight.sum().shape

    def forward(self, x):
        self.fc.shape()
        return self.a(self.fc(x))

    model = stopped(forward, a=linear(), fc=Linear(8, 8))
    gm = capture_regions(model, X)
    assert captured(gm).unreached["fc"].reason == ASKED


def asks_isinstance(self, x):
    return self.a(self.fc(x)) if isinstance(self.fc, nn.Linear) else self.a(x)


def asks_type(self, x):
    return self.a(self.fc(x)) if type(self.fc) is nn.Linear else self.a(self.fc(x)) * 2


def asks_attribute(self, x):
    return self.a(self.fc(x)) * (2 if "weight" in self.fc._parameters else 1)


@pytest.mark.parametrize("forward", [asks_isinstance, asks_type, asks_attribute])
def test_a_layer_whose_type_or_parts_decide_what_the_model_does(forward):
    model = stopped(forward, a=linear(), fc=linear(), more=linear())
    assert reason(model, "fc") == ASKED.code
    assert list(layers(capture_regions(model, X))) == ["a"]


def test_sizes_of_a_layer_may_be_asked_for():
    model = stopped(lambda self, x: self.fc(x.reshape(-1, self.fc.in_features)), fc=linear())
    assert list(layers(capture_regions(model, X))) == ["fc"]


def test_a_model_that_no_seed_makes_repeatable_keeps_its_layers():
    count = iter(range(1000))
    model = stopped(lambda self, x: self.fc(x) * next(count), fc=linear())
    assert list(layers(capture_regions(model, X))) == ["fc"]


def test_a_layer_called_with_more_than_its_input():
    up = nn.ConvTranspose1d(4, 4, 3, stride=2)
    model = stopped(lambda self, x: self.up(x[None, :4], output_size=[17])[0, :, :8] + self.fc(x), up=up, fc=linear())
    assert reason(model, "up") == "more-inputs"


def test_tied_weights():
    fc, head = linear(), linear()
    head.weight = fc.weight
    assert reason(stopped(lambda self, x: self.c(self.head(self.fc(x))), fc=fc, head=head, c=linear()), "fc") == (
        "shared-parameter"
    )
    embedding = nn.Embedding(8, 8).double()
    head.weight = embedding.weight
    model = stopped(lambda self, x: self.c(self.head(self.e(x.long().abs()))), e=embedding, head=head, c=linear())
    assert reason(model, "head") == "shared-parameter"


@pytest.mark.parametrize("kind", ["attention", "compiled"])
def test_modules_that_read_the_weights_inside_them_are_kept_whole(kind):
    def forward(self, x):
        return self.c(self.part(x))

    attention = module(lambda self, x: self.mha(x, x, x)[0], mha=nn.MultiheadAttention(8, 2, add_zero_attn=True))
    part, name, why = {
        "attention": (attention, "part.mha.out_proj", "container-reads"),
        "compiled": (torch.compile(mlp(), backend="eager"), "part._orig_mod.0", "compiled"),
    }[kind]
    assert reason(stopped(forward, part=part, c=linear()), name) == why


def test_a_scripted_part_is_left_as_it_is():
    model = stopped(lambda self, x: self.c(self.part(x)), part=torch.jit.script(mlp()), c=linear())
    assert regions(model) == ["c"]


def test_a_recurrent_part_is_left_as_it_is():
    model = stopped(lambda self, x: self.c(self.part(x)[0]), part=nn.LSTM(8, 8), c=linear())
    assert regions(model) == ["c"]


def test_what_is_called_in_itself_or_in_a_checkpoint_is_taken_as_layers():
    def nested(self, x, depth=2):
        y = self.b(self.a(x).relu())
        return self(y, depth - 1) if depth else y

    model = stopped(lambda self, x: self.r(x) + self.r(x[:2]).sum(), r=module(nested, a=linear(), b=linear()))
    assert regions(model) == ["r.a", "r.b"]
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    assert regions(stopped(lambda self, x: checkpoint(self.body, x), body=mlp())) == ["body"]


def test_calls_that_fail_and_are_caught_do_not_count():
    def forward(self, x):
        try:
            return self.body(x[:, :4])
        except RuntimeError:
            return self.body(x)

    gm = capture_regions(stopped(forward, body=mlp()), X)
    assert torch.equal(captured(gm).example[0], X)


# -- the model itself


class Writes(nn.Module):
    """Writes into its argument, as inplace activations do, and uses it again."""

    def __init__(self):
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x):
        x.mul_(2.0)
        return self.b((x + self.a(x)).tanh_())


def test_regions_that_write_into_their_argument_are_recorded_as_they_were_called():
    model = stopped(lambda self, x: self.body(x + 0) + x, body=Writes())
    gm = capture_regions(model, X)
    regions = captured(gm)
    assert [slot.name for slot in regions.slots] == ["body"]
    assert torch.equal(regions.example[0], X)
    gm(*regions.feed(gm, regions.inputs))
    assert torch.equal(regions.feed(gm, regions.inputs)[0], X)


def test_the_model_is_as_it_was():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = module(lambda self, x: self.b(self.a(x) + torch.arange(8)), a=linear(), b=linear())
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

        def forward(self, x):
            self.calls += 1
            self.mean = self.mean * 0.9 + x.mean(0)
            return self.body(x) if x.sum() < 1e9 else x

    model = Counts().train()
    model.body.eval()
    state = {k: (v, v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    attributes = [set(vars(m)) for m in model.modules()]
    random = torch.get_rng_state()
    assert regions(model) == ["body"]
    assert all(model.state_dict(keep_vars=True)[k] is v and torch.equal(v, was) for k, (v, was) in state.items())
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert [m.training for m in model.modules()] == [True, False, False, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ["code", "_graph"])
def test_a_layer_with_a_name_that_a_graph_module_has_itself_is_left_alone(name):
    made = module(
        lambda self, x: self.c(self.b(self._modules[name](self.a(x)))), a=linear(), b=linear(), c=nn.Sequential()
    )
    made.add_module(name, linear())
    made.c.add_module(name, linear())
    with pytest.raises(CaptureError, match=f"^{name}: torch.fx.GraphModule has an attribute '{name}' of its own"):
        trace(made, {})
    assert regions(made) == ["a", "b", f"c.{name}"]
    assert reason(made, name) == RESERVED.code


def test_what_fails_is_told_in_one_line():
    with pytest.raises(FxlrdError, match="the model fails on the example inputs") as caught:
        capture_regions(stopped(lambda self, x: self.fc(x), fc=linear()), X[:, :4])
    assert "\n" not in str(caught.value)
    with pytest.raises(CaptureError, match=f"no conv or linear layer in it could be captured; fc: {NEVER_CALLED}"):
        capture_regions(stopped(lambda self, x: x, fc=linear()), X)
    locked = stopped(lambda self, x: self.fc(x), fc=linear())
    locked.lines = (i for i in range(3))
    with pytest.raises(FxlrdError, match=r"Model cannot be copied \(TypeError: .*generator"):
        capture_regions(locked, X)


def test_what_a_forward_left_on_its_module_does_not_keep_it_from_being_copied():
    model = stopped(lambda self, x: self.fc(x), fc=linear())
    model.last = model.fc(X)
    assert regions(model) == ["fc"]
    assert model.last.requires_grad


def test_a_conv_of_few_channels_after_other_layers_is_no_stem():
    """As in diffusers' autoencoder: a latent of four channels between two halves of which each is a region."""

    def forward(self, x, depth):
        z = self.encode(x * 2 - 1)
        z = z + self.depth(depth)
        return self.decode(z if z.sum() < 1e9 else -z)

    parts = {name: nn.Conv2d(c, 4, 1) for name, c in {"encode": 3, "depth": 1, "decode": 4}.items()}
    inputs = torch.rand(2, 3, 5, 5).double(), torch.rand(2, 1, 5, 5).double()
    gm = capture_regions(module(forward, **parts), inputs)
    assert captured(gm).user_forward
    assert {layer.name: layer.is_stem for layer in layers_of(gm)} == {"encode": True, "depth": True, "decode": False}


class Holder:
    """Holds a layer where nobody looks for it."""

    def __init__(self, layer):
        self.layer = layer

    def run(self, x):
        return self.layer(x)


def test_a_layer_in_a_partial_function_is_replaced_there_and_one_in_an_object_stays(tmp_path):
    def step(layer, x):
        return layer(x).relu()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.step, self.held = functools.partial(step, self.a), Holder(self.b)

        def forward(self, x):
            if x.sum() > 1e9:
                x = x * 2
            return self.head(self.held.run(self.step(x)))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 16)
    result = fxlrd.compress(model, x, ratio=2, measure=False)
    assert {row["name"]: row["decision"] for row in result.report.layers} == {"a": "svd", "b": "skipped", "head": "svd"}
    assert next(row["reason"] for row in result.report.layers if row["name"] == "b")
    fxlrd.save(result, tmp_path / "out")
    fresh = Net().eval()
    fresh.b.load_state_dict(model.b.state_dict())
    assert torch.equal(fxlrd.load(tmp_path / "out", fresh)(x), result.model(x))
