from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxlrd import layers
from fxlrd.errors import FxlrdError
from fxlrd.factor.svd import relative_error
from fxlrd.graph import difference

HEIGHT, WIDTH = 9, 7
FORMATS = st.sampled_from([torch.contiguous_format, torch.channels_last])


@st.composite
def convs(draw):
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 2), (2, 2)]))
    stride = draw(st.sampled_from([1, 2, (2, 1)]))
    padding = draw(st.sampled_from([0, 1, (0, 2), "valid"] + ["same"] * (2 if stride == 1 else 0)))
    groups = draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    conv = nn.Conv2d(
        groups * draw(st.integers(1, 5)),
        groups * draw(st.integers(1, 5)),
        kernel,
        stride=stride,
        padding=padding,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
        dilation=draw(st.sampled_from([1, 2, (1, 2)])),
        groups=groups,
        bias=draw(st.booleans()),
        dtype=torch.float64,
    )
    return conv.to(memory_format=draw(FORMATS))


@st.composite
def linears(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return nn.Linear(draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.booleans()), dtype=torch.float64)


@st.composite
def with_ranks(draw, modules, full=False):
    module = draw(modules)
    c_in, c_out, _ = layers.channels(module)
    if layers.form(module) == "svd":
        tops = [min(c_in, c_out)]
        kept = [True]
    else:
        tops = [c_in, c_out]
        kept = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    low = [top if full else draw(st.integers(1, top)) for top in tops]
    return module, tuple(r if keep else None for r, keep in zip(low, kept, strict=True))


def image(conv, memory_format=torch.contiguous_format):
    x = torch.randn(2, conv.in_channels, HEIGHT, WIDTH, dtype=conv.weight.dtype)
    return x.contiguous(memory_format=memory_format)


def assert_same_outputs(found, wanted, atol):
    assert difference([found], [wanted], "form").max_abs <= atol


def rebuilt(module, form):
    """The weight that the factors stand for."""
    groups = layers.channels(module)[2]
    parts = {name: p.weight.detach().unflatten(0, (groups, -1)) for name, p in form.named_children()}
    parts = {name: w.reshape(*w.shape[:3], -1) for name, w in parts.items()}
    weight = parts["core"] if "core" in parts else parts["last"]
    if "first" in parts:
        weight = torch.einsum("gsrk,grck->gsck", weight, parts["first"].expand(-1, -1, -1, weight.shape[3]))
    if "core" in parts and "last" in parts:
        weight = torch.einsum("grck,gsrl->gsck", weight, parts["last"])
    return weight.reshape(module.weight.shape)


def described(form):
    return [(n, p.shape, p.dtype, p.is_contiguous(), p.requires_grad) for n, p in form.named_parameters()]


# torch warns of its own way to pad an even kernel to the same size.
same_padding = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@same_padding
@settings(deadline=None, max_examples=150)
@given(with_ranks(convs(), full=True), FORMATS)
def test_conv_at_full_rank_gives_the_same_outputs(case, memory_format):
    conv, ranks = case
    form, error = layers.decomposed(conv, ranks)
    x = image(conv, memory_format)
    assert error <= 1e-12
    assert_same_outputs(form(x), conv(x), 1e-9)
    assert_same_outputs(form(x[0]), conv(x[0]), 1e-9)


@settings(deadline=None)
@given(with_ranks(linears(), full=True), st.sampled_from([(), (3,), (2, 3), (2, 1, 3), (0,)]))
def test_linear_at_full_rank_gives_the_same_outputs(case, batch):
    linear, ranks = case
    form, error = layers.decomposed(linear, ranks)
    x = torch.randn(*batch, linear.in_features, dtype=torch.float64)
    assert error <= 1e-12
    assert_same_outputs(form(x), linear(x), 1e-9)


@same_padding
@settings(deadline=None, max_examples=150)
@given(with_ranks(st.one_of(convs(), linears())), st.integers(1, 3))
def test_form_is_the_layer_with_the_rebuilt_weight(case, sweeps):
    module, ranks = case
    form, error = layers.decomposed(module, ranks, sweeps)
    stand_in = copy.deepcopy(module)
    with torch.no_grad():
        stand_in.weight.copy_(rebuilt(module, form))
    x = image(module) if isinstance(module, nn.Conv2d) else torch.randn(3, 2, module.in_features, dtype=torch.float64)
    assert_same_outputs(form(x), stand_in(x), 1e-9)
    assert error == pytest.approx(relative_error(module.weight, stand_in.weight), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(with_ranks(st.one_of(convs(), linears())))
def test_parameters_and_skeleton_are_those_of_the_form(case):
    module, ranks = case
    form, _ = layers.decomposed(module, ranks)
    weights = [part.weight for part in form]
    assert layers.parameters(module, ranks) == sum(w.numel() for w in weights)
    bare = layers.skeleton(module, ranks)
    assert repr(bare) == repr(form)
    assert described(bare) == described(form)


def test_roles_and_the_place_of_stride_padding_and_bias():
    form, _ = layers.decomposed(nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2), (2, 3))
    assert [name for name, _ in form.named_children()] == ["first", "core", "last"]
    assert (form.core.stride, form.core.padding, form.core.dilation) == ((2, 2), (1, 1), (2, 2))
    assert [part.bias is None for part in form] == [True, True, False]
    form, _ = layers.decomposed(nn.Conv2d(6, 8, 1, stride=2), (2,))
    assert [name for name, _ in form.named_children()] == ["first", "last"]
    assert (form.first.stride, form.last.stride) == ((2, 2), (1, 1))
    assert [part.bias is None for part in form] == [True, False]
    form, _ = layers.decomposed(nn.Conv2d(6, 8, 3), (None, 3))
    assert [name for name, _ in form.named_children()] == ["core", "last"]
    form, _ = layers.decomposed(nn.Conv2d(6, 8, 3), (2, None))
    assert [name for name, _ in form.named_children()] == ["first", "core"]
    assert [part.bias is None for part in form] == [True, False]


MODULES = [
    pytest.param(lambda: nn.Conv2d(8, 12, 3, padding=1), (4, 5), id="tucker2"),
    pytest.param(lambda: nn.Conv2d(8, 12, 3, groups=2), (2, None), id="grouped"),
    pytest.param(lambda: nn.Conv2d(8, 12, 1), (4,), id="conv1x1"),
    pytest.param(lambda: nn.Linear(8, 12), (4,), id="linear"),
]


@pytest.mark.parametrize(("make", "ranks"), MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_carried(make, ranks, dtype):
    module = make().to(dtype)
    for form in (layers.decomposed(module, ranks)[0], layers.skeleton(module, ranks)):
        assert {p.dtype for p in form.parameters()} == {dtype}


@pytest.mark.parametrize(("make", "ranks"), MODULES)
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
def test_requires_grad_is_carried(make, ranks, weight, bias):
    module = make()
    module.weight.requires_grad_(weight)
    module.bias.requires_grad_(bias)
    form, _ = layers.decomposed(module, ranks)
    assert {part.weight.requires_grad for part in form} == {weight}
    assert form[-1].bias.requires_grad is bias


@pytest.mark.parametrize(("make", "ranks"), MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_train_flag_is_carried(make, ranks, training):
    form, _ = layers.decomposed(make().train(training), ranks)
    assert {m.training for m in form.modules()} == {training}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_carried(memory_format):
    conv = nn.Conv2d(8, 12, 3).to(memory_format=memory_format)
    for form in (layers.decomposed(conv, (4, 5))[0], layers.skeleton(conv, (4, 5))):
        assert all(part.weight.is_contiguous(memory_format=memory_format) for part in form)
        assert form.core.weight.is_contiguous() == (memory_format == torch.contiguous_format)


@pytest.mark.parametrize(("make", "ranks"), MODULES)
def test_random_state_and_layer_are_left_alone(make, ranks):
    module = make()
    state = torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    form, _ = layers.decomposed(module, ranks)
    layers.skeleton(module, ranks)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for p in form.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_gradient_reaches_every_factor():
    form, _ = layers.decomposed(nn.Conv2d(8, 12, 3), (4, 5))
    form(torch.randn(1, 8, 5, 5)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in form.parameters())


@pytest.mark.parametrize(
    ("module", "ratio", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), 2, "groups=8: one channel a group (depthwise) leaves no rank to cut"),
        (nn.Conv2d(8, 16, 3, groups=8), 2, "groups=8: one channel a group (depthwise) leaves no rank to cut"),
        (nn.Conv2d(3, 64, 7), 100, "3→64 is too narrow: ratio=100 leaves no rank"),
        (nn.Linear(8, 8), 5, "8→8 is too narrow: ratio=5 leaves no rank"),
        (nn.Linear(512, 1), 2, "512→1 is too narrow: ratio=2 leaves no rank"),
        (nn.Conv2d(16, 16, 1, groups=4), 4, "4 groups of 4→4 is too narrow: ratio=4 leaves no rank"),
    ],
)
def test_reasons_for_no_ranks(module, ratio, reason):
    assert layers.ranks_for_ratio(module, ratio) == reason


@pytest.mark.parametrize(
    ("module", "ratio", "ranks"),
    [
        (nn.Linear(2048, 1000), 2, (335,)),
        (nn.Conv2d(64, 256, 1), 2, (25,)),
        (nn.Conv2d(512, 512, 3), 2, (309, 309)),
        (nn.Conv2d(128, 128, 3, groups=2), 2, (38, 38)),
        # r1 of eq. (7) is above the thinner mode: only the other one is cut.
        (nn.Conv2d(128, 32, 3), 2, (44, None)),
        (nn.Conv2d(32, 128, 3), 2, (None, 44)),
    ],
)
def test_ranks_for_ratio(module, ratio, ranks):
    assert layers.ranks_for_ratio(module, ratio) == ranks


@settings(deadline=None)
@given(
    st.integers(1, 256),
    st.integers(1, 256),
    st.sampled_from([1, 3, (1, 3)]),
    st.integers(17, 80).map(lambda sixteenths: sixteenths / 16),
    st.sampled_from([0.5, 1, 2]),
)
def test_ranks_for_ratio_meet_the_ratio(c_in, c_out, kernel, ratio, beta):
    conv = nn.Conv2d(c_in, c_out, kernel, device="meta")
    try:
        ranks = layers.ranks_for_ratio(conv, ratio, beta)
    except FxlrdError:
        assert min(c_in, c_out) >= 16
        return
    if isinstance(ranks, str):
        assert min(c_in, c_out) < 16
        return
    assert layers.parameters(conv, ranks) * ratio <= conv.weight.numel()
    tops = (min(c_in, c_out),) if conv.kernel_size == (1, 1) else (c_in, c_out)
    assert all(r is None or 1 <= r < top for r, top in zip(ranks, tops, strict=True))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(64, 64),
        nn.Linear(64, 50),
        nn.Conv2d(64, 50, 1),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(61, 47, 3),
        nn.Conv2d(64, 96, (1, 3), groups=2),
    ],
    ids=str,
)
def test_a_ratio_out_of_reach_of_a_wide_layer_names_one_that_works(module, beta):
    with pytest.raises(FxlrdError) as caught:
        layers.ranks_for_ratio(module, 5000, beta)
    message = str(caught.value)
    assert message.startswith("ratio=5000 leaves less than rank 1 for ")
    assert "\n" not in message
    largest = float(re.search(r"at most ([0-9.e+]+),", message)[1])
    assert not isinstance(layers.ranks_for_ratio(module, largest, beta), str)


@pytest.mark.parametrize(
    ("module", "given", "ranks"),
    [
        (nn.Linear(8, 12), 5, (5,)),
        (nn.Linear(8, 12), 500, (8,)),
        (nn.Conv2d(8, 12, 3), 5, (5, 5)),
        (nn.Conv2d(8, 12, 3), 10, (8, 10)),
        (nn.Conv2d(8, 12, 3), (None, 4), (None, 4)),
        (nn.Conv2d(8, 12, 3, groups=2), [9, 9], (4, 6)),
    ],
)
def test_explicit_ranks(module, given, ranks):
    assert layers.explicit_ranks(module, given) == ranks


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (nn.Linear(8, 12), 0),
        (nn.Linear(8, 12), -1),
        (nn.Linear(8, 12), 2.5),
        (nn.Linear(8, 12), (2.5,)),
        (nn.Linear(8, 12), (None,)),
        (nn.Linear(8, 12), (4, 4)),
        (nn.Linear(8, 12), "4"),
        (nn.Conv2d(8, 12, 3), (4,)),
        (nn.Conv2d(8, 12, 3), (4, 0)),
        (nn.Conv2d(8, 12, 3), (None, None)),
    ],
)
def test_bad_explicit_ranks(module, given):
    with pytest.raises(FxlrdError, match=r"^ranks=") as caught:
        layers.explicit_ranks(module, given)
    assert "\n" not in str(caught.value)


def test_texts():
    assert layers.ranks_text((204,)) == "204"
    assert layers.ranks_text((None, 44)) == "-x44"
    assert layers.kernel_text(nn.Conv2d(2, 2, (3, 5))) == "3×5"
    assert layers.kernel_text(nn.Linear(2, 2)) == "1×1"
    assert (layers.op(nn.Conv2d(2, 2, 1)), layers.op(nn.Linear(2, 2))) == ("Conv2d", "Linear")
