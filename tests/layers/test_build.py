from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxlrd.calibration.patches import patches
from fxlrd.errors import FxlrdError, Reason
from fxlrd.factor.svd import relative_error
from fxlrd.factor.whiten import RIDGE
from fxlrd.graph.compare import difference
from fxlrd.layers.build import decomposed, skeleton
from fxlrd.layers.fit import IMPORTANCE_RIDGE, Moments, Statistics, roots
from fxlrd.layers.forms import explicit_ranks, full_ranks, parameters, ranks_by_ratio, ranks_text
from fxlrd.layers.forms import form as layers_form
from fxlrd.layers.kinds import CONVS, Conv, channel_axis, channels_per_group, kernel_area, kernel_text, op, spatial_dims
from fxlrd.layers.kinds import TRANSPOSED as layers_TRANSPOSED
from fxlrd.layers.weights import from_blocks, resized, weight_blocks

SIZES = (9, 7, 6)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(tensor):
    return tensor.contiguous(memory_format=LAST.get(tensor.dim(), torch.contiguous_format))


def each(dims, values):
    return st.one_of(st.sampled_from([(v,) * dims for v in values]), st.tuples(*[st.sampled_from(values)] * dims))


@st.composite
def convs(draw):
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.integers(1, 3))
    c_in, c_out = (groups * draw(st.integers(1, 5)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    options = {
        "kernel_size": draw(each(dims, [1, 2, 3])),
        "stride": draw(each(dims, [1, 2])),
        "dilation": draw(each(dims, [1, 2])),
        "padding": draw(each(dims, [0, 1, 2])),
    }
    if draw(st.booleans()):
        largest = [max(pair) for pair in zip(options["stride"], options["dilation"], strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, top - 1)) for top in largest)
    else:
        words = ["valid", "same", "same"] if set(options["stride"]) == {1} else ["valid"]
        options["padding"] = draw(st.sampled_from([options["padding"], *words]))
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    kinds = layers_TRANSPOSED if "output_padding" in options else CONVS
    conv = kinds[dims - 1](c_in, c_out, **options, groups=groups, bias=draw(st.booleans()), dtype=torch.float64)
    if draw(st.booleans()):
        conv.weight.data = channels_last(conv.weight.data)
    return conv


@st.composite
def linears(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return nn.Linear(draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.booleans()), dtype=torch.float64)


@st.composite
def with_ranks(draw, modules, full=False):
    module = draw(modules)
    c_in, c_out, _ = channels_per_group(module)
    if layers_form(module) == "svd":
        tops = [min(c_in, c_out)]
        kept = [True]
    else:
        tops = [c_in, c_out]
        kept = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    low = [top if full else draw(st.integers(1, top)) for top in tops]
    return module, tuple(r if keep else None for r, keep in zip(low, kept, strict=True))


def image(conv):
    return torch.randn(2, conv.in_channels, *SIZES[: len(conv.kernel_size)], dtype=conv.weight.dtype)


def assert_same_outputs(found, wanted, atol):
    assert difference([found], [wanted], "form").max_abs <= atol


def rebuilt(module, form):
    """The weight that the factors stand for."""
    groups = channels_per_group(module)[2]
    parts = {name: p.weight.detach().unflatten(0, (groups, -1)) for name, p in form.named_children()}
    transposed = {name for name, p in form.named_children() if getattr(p, "transposed", False)}
    parts = {name: w.transpose(1, 2) if name in transposed else w for name, w in parts.items()}
    parts = {name: w.reshape(*w.shape[:3], -1) for name, w in parts.items()}
    weight = parts["core"] if "core" in parts else parts["last"]
    if "first" in parts:
        weight = torch.einsum("gsrk,grck->gsck", weight, parts["first"].expand(-1, -1, -1, weight.shape[3]))
    if "core" in parts and "last" in parts:
        weight = torch.einsum("grck,gsrl->gsck", weight, parts["last"])
    return (weight.transpose(1, 2) if transposed else weight).reshape(module.weight.shape)


def described(form):
    return [(n, p.shape, p.dtype, p.is_contiguous(), p.requires_grad) for n, p in form.named_parameters()]


# torch warns of its own way to pad an even kernel to the same size.
same_padding = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@same_padding
@settings(deadline=None, max_examples=300)
@given(with_ranks(convs(), full=True), st.booleans())
def test_conv_at_full_rank_gives_the_same_outputs(case, last):
    conv, ranks = case
    form, error = decomposed(conv, ranks)
    x = channels_last(image(conv)) if last else image(conv)
    assert error <= 1e-12
    assert_same_outputs(form(x), conv(x), 1e-9)
    assert_same_outputs(form(x[0]), conv(x[0]), 1e-9)


@settings(deadline=None)
@given(with_ranks(linears(), full=True), st.sampled_from([(), (3,), (2, 3), (2, 1, 3), (0,)]))
def test_linear_at_full_rank_gives_the_same_outputs(case, batch):
    linear, ranks = case
    form, error = decomposed(linear, ranks)
    x = torch.randn(*batch, linear.in_features, dtype=torch.float64)
    assert error <= 1e-12
    assert_same_outputs(form(x), linear(x), 1e-9)


@same_padding
@settings(deadline=None, max_examples=150)
@given(with_ranks(st.one_of(convs(), linears())), st.integers(1, 3))
def test_form_is_the_layer_with_the_rebuilt_weight(case, sweeps):
    module, ranks = case
    form, error = decomposed(module, ranks, sweeps)
    stand_in = copy.deepcopy(module)
    with torch.no_grad():
        stand_in.weight.copy_(rebuilt(module, form))
    x = image(module) if isinstance(module, Conv) else torch.randn(3, 2, module.in_features, dtype=torch.float64)
    assert_same_outputs(form(x), stand_in(x), 1e-9)
    assert error == pytest.approx(relative_error(module.weight, stand_in.weight), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(with_ranks(st.one_of(convs(), linears())))
def test_parameters_and_skeleton_are_those_of_the_form(case):
    module, ranks = case
    form, _ = decomposed(module, ranks)
    weights = [part.weight for part in form]
    assert parameters(module, ranks) == sum(w.numel() for w in weights)
    bare = skeleton(module, ranks)
    assert repr(bare) == repr(form)
    assert described(bare) == described(form)


def test_roles_and_the_place_of_stride_padding_and_bias():
    form, _ = decomposed(nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2), (2, 3))
    assert [name for name, _ in form.named_children()] == ["first", "core", "last"]
    assert (form.core.stride, form.core.padding, form.core.dilation) == ((2, 2), (1, 1), (2, 2))
    assert [part.bias is None for part in form] == [True, True, False]
    form, _ = decomposed(nn.Conv2d(6, 8, 1, stride=2), (2,))
    assert [name for name, _ in form.named_children()] == ["first", "last"]
    assert (form.first.stride, form.last.stride) == ((2, 2), (1, 1))
    assert [part.bias is None for part in form] == [True, False]
    form, _ = decomposed(nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (2, 3))
    assert [type(part) for part in form] == [nn.Conv2d, nn.ConvTranspose2d, nn.Conv2d]
    assert (form.core.stride, form.core.padding, form.core.output_padding) == ((2, 2), (1, 1), (1, 1))
    assert [part.bias is None for part in form] == [True, True, False]
    form, _ = decomposed(nn.ConvTranspose1d(6, 8, 1, stride=2, output_padding=1), (2,))
    assert [type(part) for part in form] == [nn.Conv1d, nn.ConvTranspose1d]
    assert (form.first.stride, form.last.stride, form.last.output_padding) == ((1,), (2,), (1,))
    form, _ = decomposed(nn.Conv2d(6, 8, 3), (None, 3))
    assert [name for name, _ in form.named_children()] == ["core", "last"]
    form, _ = decomposed(nn.Conv2d(6, 8, 3), (2, None))
    assert [name for name, _ in form.named_children()] == ["first", "core"]
    assert [part.bias is None for part in form] == [True, False]


MODULES = [
    pytest.param(lambda: nn.Conv2d(8, 12, 3, padding=1), (4, 5), id="tucker2"),
    pytest.param(lambda: nn.Conv2d(8, 12, 3, groups=2), (2, None), id="grouped"),
    pytest.param(lambda: nn.Conv2d(8, 12, 1), (4,), id="conv1x1"),
    pytest.param(lambda: nn.Linear(8, 12), (4,), id="linear"),
    pytest.param(lambda: nn.Conv1d(8, 12, 3, stride=2), (4, 5), id="conv1d"),
    pytest.param(lambda: nn.Conv3d(8, 12, (1, 3, 3)), (None, 5), id="conv3d"),
    pytest.param(lambda: nn.ConvTranspose2d(8, 12, 2, stride=2), (4, 5), id="transposed"),
    pytest.param(lambda: nn.ConvTranspose1d(8, 12, 1, groups=2), (3,), id="transposed1x1"),
]


@pytest.mark.parametrize(("make", "ranks"), MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_carried(make, ranks, dtype):
    module = make().to(dtype)
    for form in (decomposed(module, ranks)[0], skeleton(module, ranks)):
        assert {p.dtype for p in form.parameters()} == {dtype}


@pytest.mark.parametrize(("make", "ranks"), MODULES)
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
def test_requires_grad_is_carried(make, ranks, weight, bias):
    module = make()
    module.weight.requires_grad_(weight)
    module.bias.requires_grad_(bias)
    form, _ = decomposed(module, ranks)
    assert {part.weight.requires_grad for part in form} == {weight}
    assert form[-1].bias.requires_grad is bias


@pytest.mark.parametrize(("make", "ranks"), MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_train_flag_is_carried(make, ranks, training):
    form, _ = decomposed(make().train(training), ranks)
    assert {m.training for m in form.modules()} == {training}


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        (nn.Conv2d, torch.channels_last),
        (nn.ConvTranspose2d, torch.channels_last),
        (nn.Conv3d, torch.channels_last_3d),
        (nn.ConvTranspose3d, torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_memory_format_is_carried(kind, last, is_last):
    memory_format = last if is_last else torch.contiguous_format
    conv = kind(8, 12, 3).to(memory_format=memory_format)
    for form in (decomposed(conv, (4, 5))[0], skeleton(conv, (4, 5))):
        assert all(part.weight.is_contiguous(memory_format=memory_format) for part in form)
        assert form.core.weight.is_contiguous() != is_last
    again = resized(conv, conv.weight.detach().clone(memory_format=torch.contiguous_format), None)
    assert again.weight.is_contiguous() != is_last


@pytest.mark.parametrize(("make", "ranks"), MODULES)
def test_random_state_and_layer_are_left_alone(make, ranks):
    module = make()
    state = torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    form, _ = decomposed(module, ranks)
    skeleton(module, ranks)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for p in form.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_gradient_reaches_every_factor():
    form, _ = decomposed(nn.Conv2d(8, 12, 3), (4, 5))
    form(torch.randn(1, 8, 5, 5)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in form.parameters())


@pytest.mark.parametrize(
    ("module", "ratio", "code"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), 2, "depthwise"),
        (nn.Conv2d(8, 16, 3, groups=8), 2, "depthwise"),
        (nn.Conv2d(3, 64, 7), 100, "too-narrow"),
        (nn.Linear(8, 8), 5, "too-narrow"),
        (nn.Linear(512, 1), 2, "too-narrow"),
        (nn.Conv2d(16, 16, 1, groups=4), 4, "too-narrow"),
    ],
)
def test_reasons_for_no_ranks(module, ratio, code):
    assert ranks_by_ratio(module, ratio).code == code


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
        (nn.ConvTranspose2d(32, 128, 3), 2, (None, 44)),
        (nn.Conv3d(512, 512, (1, 3, 3)), 2, (309, 309)),
        (nn.Conv1d(64, 256, 1), 2, (25,)),
    ],
)
def test_ranks_by_ratio(module, ratio, ranks):
    assert ranks_by_ratio(module, ratio) == ranks


@settings(deadline=None)
@given(
    st.integers(1, 256),
    st.integers(1, 256),
    st.sampled_from([1, 3, (1, 3)]),
    st.integers(17, 80).map(lambda sixteenths: sixteenths / 16),
    st.sampled_from([0.5, 1, 2]),
)
def test_ranks_by_ratio_meet_the_ratio(c_in, c_out, kernel, ratio, beta):
    conv = nn.Conv2d(c_in, c_out, kernel, device="meta")
    ranks = ranks_by_ratio(conv, ratio, beta)
    if isinstance(ranks, Reason):
        assert (ranks.code == "ratio-too-large") == (min(c_in, c_out) >= 16)
        return
    assert parameters(conv, ranks) * ratio <= conv.weight.numel()
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
    reason = ranks_by_ratio(module, 5000, beta)
    assert reason.code == "ratio-too-large"
    assert "ratio=5000" in reason.text
    assert "\n" not in str(reason)
    largest = float(re.search(r"at most ([0-9.e+]+),", reason.remedy)[1])
    assert isinstance(ranks_by_ratio(module, largest, beta), tuple)


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
    assert explicit_ranks(module, given) == ranks


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
        explicit_ranks(module, given)
    assert "\n" not in str(caught.value)


def test_texts():
    assert ranks_text((204,)) == "204"
    assert ranks_text((None, 44)) == "-x44"
    assert kernel_text(nn.Conv2d(2, 2, (3, 5))) == "3×5"
    assert kernel_text(nn.Linear(2, 2)) == "1×1"
    assert (op(nn.Conv2d(2, 2, 1)), op(nn.Linear(2, 2))) == ("Conv2d", "Linear")
    assert kernel_text(nn.ConvTranspose1d(2, 2, 5)) == "5"
    assert op(nn.ConvTranspose1d(2, 2, 5)) == "ConvTranspose1d"


@settings(deadline=None)
@given(st.one_of(convs(), linears()))
def test_a_layer_of_the_same_size_is_the_same(module):
    bias = None if module.bias is None else module.bias.detach()
    new = resized(module, from_blocks(module, weight_blocks(module)), bias)
    assert repr(new) == repr(module)
    assert torch.equal(new.weight, module.weight)
    assert new.weight.is_contiguous() == module.weight.is_contiguous()


@pytest.mark.parametrize("kind", layers_TRANSPOSED)
def test_a_transposed_layer_takes_the_size_of_its_weight(kind):
    like = kind(8, 12, 3, stride=2, groups=2, output_padding=1)
    new = resized(like, torch.randn(6, 5, *like.kernel_size), None, groups=3)
    assert (new.in_channels, new.out_channels, new.groups) == (6, 15, 3)
    assert (new.stride, new.output_padding) == (like.stride, like.output_padding)


# -- fitted to data


def fitted_to(module, x, importance=None, by_patch=True):
    """What calibration on ``x`` alone would have the layer's factors fitted to."""
    read = x.movedim(channel_axis(module, x.dim()), -1).flatten(0, -2)
    saw = Statistics(Moments.empty(read.shape[1], x.device), None, importance)
    saw.input_moments.add(read)
    by_patch = by_patch and isinstance(module, CONVS) and kernel_area(module) > 1
    if by_patch and channels_per_group(module)[2] == 1:
        saw.patch_moments = Moments.empty(module.weight[0].numel(), x.device)
        saw.patch_moments.add(patches(module, x))
    return saw.fit(module)


def regularised(g, share):
    return g + torch.eye(len(g), dtype=g.dtype) * g.diagonal().mean() * share


def data(module, count=8):
    """Inputs whose channels depend on each other and have means."""
    shape = (count, *(9, 8, 5)[: spatial_dims(module)]) if isinstance(module, Conv) else (20 * count,)
    mixed = torch.randn(shape[0], *shape[1:], width(module)).double()
    mixed = mixed @ torch.randn(mixed.shape[-1], mixed.shape[-1]).double() * torch.logspace(0, -1, mixed.shape[-1]) + 1
    return mixed.movedim(-1, channel_axis(module, mixed.dim())).to(module.weight.dtype).contiguous()


def width(module):
    c_in, _, groups = channels_per_group(module)
    return c_in * groups


def double(make):
    return make().double()


def output_means(module, x):
    y = module(x).detach()
    made_by = module[-1] if isinstance(module, nn.Sequential) else module
    return y.movedim(channel_axis(made_by, y.dim()), -1).flatten(0, -2).mean(0)


FITTED = [
    pytest.param(lambda: nn.Linear(8, 12), (4,), id="linear"),
    pytest.param(lambda: nn.Linear(12, 8, bias=False), (3,), id="no bias"),
    pytest.param(lambda: nn.Conv2d(8, 12, 1), (4,), id="conv1x1"),
    pytest.param(lambda: nn.Conv2d(8, 12, 1, groups=2, bias=False), (2,), id="grouped conv1x1"),
    pytest.param(lambda: nn.Conv2d(8, 12, 3, padding=1), (4, 5), id="padded"),
    pytest.param(lambda: nn.Conv2d(8, 12, (3, 2), stride=2, padding=2, bias=False), (4, None), id="strided"),
    pytest.param(lambda: nn.Conv2d(8, 12, 3, padding="same", padding_mode="reflect"), (None, 3), id="reflect"),
    pytest.param(lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2, padding_mode="circular"), (2, 2), id="circular"),
    pytest.param(lambda: nn.Conv1d(8, 12, 3, padding=1), (4, 5), id="conv1d"),
    pytest.param(lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1, padding_mode="reflect"), (4, 5), id="strided conv1d"),
    pytest.param(lambda: nn.Conv3d(8, 12, (2, 3, 1), padding=1, dilation=(2, 1, 1)), (4, None), id="conv3d"),
    pytest.param(lambda: nn.Conv3d(8, 12, 1), (4,), id="conv1x1x1"),
]


@pytest.mark.parametrize(("make", "ranks"), FITTED)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_bias_keeps_the_mean_of_the_output(make, ranks, weighted):
    module = double(make)
    x = data(module)
    importance = torch.randn(20, 12).double().mT.cov() if weighted else None
    if importance is not None:
        importance = importance[: len(module.weight), : len(module.weight)]
    form, _ = decomposed(module, ranks, fit=fitted_to(module, x, importance))
    torch.testing.assert_close(output_means(form, x), output_means(module, x), rtol=0, atol=1e-10)
    plain, _ = decomposed(module, ranks)
    assert (output_means(plain, x) - output_means(module, x)).abs().max() > 1e-3
    assert form[-1].bias is not None
    assert all(part.bias is None for part in form[:-1])


def test_without_patches_the_mean_is_kept_where_there_is_no_padding():
    conv = nn.Conv2d(6, 8, 3, groups=2).double()
    x = data(conv)[..., :1, :1].expand(-1, -1, 9, 8)  # each image even, so that its border is like the rest
    form, _ = decomposed(conv, (2, 2), fit=fitted_to(conv, x, by_patch=False))
    torch.testing.assert_close(output_means(form, x), output_means(conv, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("make", "ranks"), FITTED)
def test_the_error_is_that_of_the_output_about_its_mean(make, ranks):
    module = double(make)
    x = data(module)
    fit = fitted_to(module, x)
    form, error = decomposed(module, ranks, fit=fit)
    change = (module.weight - rebuilt(module, form)).detach()
    # The ridge adds to each group its share of the mean variance of what that reads.
    groups, positions = channels_per_group(module)[2], module(x).numel() / len(module.weight)
    if fit.patch_covariance is not None:
        variance, share = fit.patch_covariance.diagonal().mean()[None], RIDGE + fit.patch_ridge
    else:
        variance, share = fit.covariance.diagonal().unflatten(0, (groups, -1)).mean(1), RIDGE + fit.ridge

    def size(outputs, weight):
        added = weight.detach().unflatten(0, (groups, -1)).flatten(1).square().sum(1) @ variance * share * positions
        centred = outputs.movedim(channel_axis(module, outputs.dim()), -1).flatten(0, -2)
        return (centred - centred.mean(0)).square().sum() + added

    found = (size((form(x) - module(x)).detach(), change) / size(module(x).detach(), module.weight)).sqrt().item()
    assert error == pytest.approx(found, rel=1e-8)
    plain, _ = decomposed(module, ranks)
    lost = (module.weight - rebuilt(module, plain)).detach()
    assert error < (size((plain(x) - module(x)).detach(), lost) / size(module(x).detach(), module.weight)).sqrt()


@pytest.mark.parametrize(("make", "ranks"), [p for p in FITTED if len(p.values[1]) == 1])
def test_the_error_is_weighted_by_what_matters(make, ranks):
    module = double(make)
    groups = channels_per_group(module)[2]
    importance = torch.randn(len(module.weight), 40).double().cov()
    fit = fitted_to(module, data(module), importance)
    form, error = decomposed(module, ranks, fit=fit)

    def size(weight):
        w = weight.detach().flatten(1).unflatten(0, (groups, -1))
        total = 0.0
        for i in range(groups):
            ins, outs = (slice(i * n, (i + 1) * n) for n in (w.shape[2], w.shape[1]))
            g = regularised(fit.covariance[ins, ins], RIDGE + fit.ridge)
            gamma = regularised(importance[outs, outs], RIDGE + IMPORTANCE_RIDGE)
            total += torch.einsum("st,sc,cd,td->", gamma, w[i], g, w[i]).item()
        return total

    assert error == pytest.approx((size(module.weight - rebuilt(module, form)) / size(module.weight)) ** 0.5, rel=1e-9)


TRANSPOSED = [
    pytest.param(lambda: nn.ConvTranspose2d(8, 12, 2, stride=2), (4, 5), id="up"),
    pytest.param(lambda: nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2, bias=False), (2, None), id="grouped"),
    pytest.param(lambda: nn.ConvTranspose2d(8, 12, (1, 2), stride=(1, 2)), (None, 5), id="one side"),
    pytest.param(lambda: nn.ConvTranspose1d(8, 12, 1), (4,), id="up1d"),
    pytest.param(lambda: nn.ConvTranspose3d(8, 12, 1, stride=(1, 2, 3), output_padding=(0, 1, 2)), (4,), id="apart"),
]
"""No output is reached by two taps: what is predicted from channels alone is exact then."""


@pytest.mark.parametrize(("make", "ranks"), TRANSPOSED)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_transposed_conv_is_fitted_to_what_each_output_sees(make, ranks, weighted):
    module = double(make)
    x = data(module)
    importance = torch.randn(12, 40).double().cov() if weighted else None
    form, error = decomposed(module, ranks, fit=fitted_to(module, x, importance))
    torch.testing.assert_close(output_means(form, x), output_means(module, x), rtol=0, atol=1e-10)
    plain, worse = decomposed(module, ranks)
    assert (output_means(plain, x) - output_means(module, x)).abs().max() > 1e-3
    if weighted:
        return
    # About the mean of what is read, so that every tap's own mean is out of it; the ridge is a share of that.
    fit = fitted_to(module, x)
    axis = channel_axis(module, x.dim())
    centred = x - fit.mean.view(-1, *[1] * (x.dim() - axis - 1))
    groups = channels_per_group(module)[2]
    variance = fit.covariance.diagonal().unflatten(0, (groups, -1)).mean(1) * (RIDGE + fit.ridge)
    without = torch.zeros(12).double()

    def size(weight):
        with torch.no_grad():
            stand_in = copy.deepcopy(module)
            stand_in.weight.copy_(weight)
            stand_in.bias = nn.Parameter(without)
            added = (
                weight.unflatten(0, (groups, -1)).flatten(1).square().sum(1) @ variance * (x.numel() / width(module))
            )
            return stand_in(centred).square().sum() + added

    weight = module.weight.detach()
    found = (size(weight - rebuilt(module, form)) / size(weight)).sqrt().item()
    assert error == pytest.approx(found, rel=1e-8)
    assert found < (size(weight - rebuilt(module, plain)) / size(weight)).sqrt()
    assert worse > 0


def test_where_taps_overlap_a_transposed_conv_keeps_the_mean_all_the_same():
    # As many positions are made as read times the stride: each input reaches all of the kernel.
    conv = nn.ConvTranspose2d(6, 8, 3, stride=2, padding_mode="zeros").double()
    x = nn.functional.pad(data(conv, 64) - 1, (1, 1, 1, 1))  # nothing is cut off that is not zero
    form, _ = decomposed(conv, (3, 4), fit=fitted_to(conv, x))
    made, lost = conv(x), (form(x) - conv(x)).detach()
    scale = x[0, 0].numel() * 4 / made[0, 0].numel()
    added = form.last.bias.detach() - conv.bias.detach()
    torch.testing.assert_close(lost.mean((0, 2, 3)), added * (1 - scale), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("make", "ranks"), [*FITTED, *TRANSPOSED])
def test_at_full_rank_a_fit_changes_nothing(make, ranks):
    module = double(make)
    full, x = full_ranks(module), data(module)
    fit = fitted_to(module, x, torch.eye(module(x).shape[channel_axis(module, x.dim())]).double())
    form, error = decomposed(module, full, fit=fit)
    assert described(form) == described(decomposed(module, full)[0])
    assert error <= 1e-12
    assert_same_outputs(form(x), module(x), 1e-9)


@pytest.mark.parametrize("ranks", [(8, None), (None, 12)])
def test_one_mode_alone_at_full_rank_loses_nothing(ranks):
    conv = nn.Conv2d(8, 12, 3, padding=1).double()
    x = data(conv)
    form, error = decomposed(conv, ranks, fit=fitted_to(conv, x))
    assert error < 1e-7, "the square root of rounding"
    assert_same_outputs(form(x), conv(x), 1e-7)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("kernel", "ranks"), [(1, (2,)), (3, (2, 3)), ((1, 3), (None, 2))])
def test_each_group_is_fitted_alone(kind, kernel, ranks):
    conv = kind(8, 12, kernel, groups=2).double()
    x, importance = data(conv), torch.randn(12, 40).double().cov()
    form, _ = decomposed(conv, ranks, fit=fitted_to(conv, x, importance))
    for ins, outs in ((slice(4), slice(6)), (slice(4, 8), slice(6, 12))):
        alone = kind(4, 6, kernel).double()
        alone.weight.data = conv.weight.detach()[ins if alone.transposed else outs]
        alone.bias.data = conv.bias.detach()[outs]
        fit = fitted_to(alone, x[:, ins], importance[outs, outs], by_patch=False)
        wanted, _ = decomposed(alone, ranks, fit=fit)
        assert_same_outputs(form(x)[:, outs], wanted(x[:, ins]), 1e-9)


def test_the_roots_are_those_of_the_groups():
    conv = nn.Conv2d(6, 4, 1, groups=2).double()
    x, importance = data(conv), torch.randn(4, 40).double().cov()
    fit = fitted_to(conv, x, importance)
    reads, weights = roots(conv, fit)
    for i in range(2):
        ins, outs = slice(3 * i, 3 * i + 3), slice(2 * i, 2 * i + 2)
        wanted = regularised(fit.covariance[ins, ins], RIDGE + fit.ridge)
        torch.testing.assert_close(reads.root[i] @ reads.root[i], wanted, rtol=1e-10, atol=1e-10)
        wanted = regularised(importance[outs, outs], RIDGE + IMPORTANCE_RIDGE)
        torch.testing.assert_close(weights.root[i] @ weights.root[i], wanted, rtol=1e-10, atol=1e-10)
    assert roots(conv, fit._replace(importance=None))[1] is None


@pytest.mark.parametrize(
    ("poor", "make", "ranks", "dtype", "importance"),
    [
        (torch.zeros_like, lambda: nn.Conv2d(8, 12, 1, groups=2, bias=False), (2,), torch.bfloat16, 1.0),
        (lambda x: x[:1], lambda: nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), (2, None), torch.float32, None),
        (lambda x: x * 1e6, lambda: nn.Conv2d(8, 12, 3, padding=1), (4, 5), torch.bfloat16, 0.0),
    ],
    ids=["zeros", "one sample", "huge"],
)
def test_poor_data_give_a_finite_form_of_moderate_size(poor, make, ranks, dtype, importance):
    """Three cases of what tests/factor/test_whiten.py proves for all poor data."""
    module = make().to(dtype)
    x = poor(data(module))
    _, c_out, groups = channels_per_group(module)
    gamma = None if importance is None else importance * torch.eye(c_out * groups)
    form, error = decomposed(module, ranks, fit=fitted_to(module, x, gamma))
    assert 0 <= error <= 1
    assert {p.dtype for p in form.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in form.parameters())
    weight = rebuilt(module, form).double()
    assert 0.05 * module.weight.double().norm() < weight.norm() < 20 * module.weight.double().norm()


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_new_bias_is_trained_if_the_weight_is(weight, bias):
    linear = nn.Linear(8, 12, bias).requires_grad_(weight)
    x = data(linear)
    before = {name: p.detach().clone() for name, p in linear.named_parameters()}
    form, _ = decomposed(linear, (4,), fit=fitted_to(linear, x))
    assert {p.requires_grad for p in form.parameters()} == {weight}
    assert all(torch.equal(p, before[name]) for name, p in linear.named_parameters())
    assert form.training


def test_factors_that_are_fitted_share_their_size():
    linear = nn.Linear(8, 12).double()
    form, _ = decomposed(linear, (4,), fit=fitted_to(linear, data(linear)))
    first, last = (torch.linalg.svdvals(part.weight.detach()) for part in form)
    torch.testing.assert_close(first, last, rtol=1e-9, atol=0)
    conv = nn.Conv2d(8, 12, 3).double()
    form, _ = decomposed(conv, (4, 5), fit=fitted_to(conv, data(conv)))
    for part, axis in ((form.first, 0), (form.last, 1)):
        flat = part.weight.detach()[..., 0, 0].movedim(axis, 0)
        torch.testing.assert_close(flat @ flat.mT, torch.eye(len(flat)).double(), rtol=0, atol=1e-12)
