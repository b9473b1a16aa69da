"""Layers of every configuration, and what their factors stand for."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from fxlrd.graph.compare import difference
from fxlrd.layers.forms import form
from fxlrd.layers.kinds import CONVS, TRANSPOSED, channels_per_group

SIZES = (9, 7, 6)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(tensor):
    """Return the tensor in the channels_last format, if its number of dimensions has one."""
    return tensor.contiguous(memory_format=LAST.get(tensor.dim(), torch.contiguous_format))


def each(dims, values):
    """Tuples of one value for each dimension: all the same, or not."""
    return st.one_of(st.sampled_from([(v,) * dims for v in values]), st.tuples(*[st.sampled_from(values)] * dims))


@st.composite
def convs(draw):
    """Convs and transposed convs of any configuration, in float64."""
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
    kinds = TRANSPOSED if "output_padding" in options else CONVS
    conv = kinds[dims - 1](c_in, c_out, **options, groups=groups, bias=draw(st.booleans()), dtype=torch.float64)
    if draw(st.booleans()):
        conv.weight.data = channels_last(conv.weight.data)
    return conv


@st.composite
def linears(draw):
    """Linear layers in float64."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return nn.Linear(draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.booleans()), dtype=torch.float64)


@st.composite
def with_ranks(draw, modules, full=False):
    """(module, ranks of its form): any, or full rank."""
    module = draw(modules)
    c_in, c_out, _ = channels_per_group(module)
    if form(module) == "svd":
        tops = [min(c_in, c_out)]
        cut = [True]
    else:
        tops = [c_in, c_out]
        cut = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    low = [top if full else draw(st.integers(1, top)) for top in tops]
    return module, tuple(r if is_cut else None for r, is_cut in zip(low, cut, strict=True))


def image(conv):
    """Return a batch of two inputs."""
    return torch.randn(2, conv.in_channels, *SIZES[: len(conv.kernel_size)], dtype=conv.weight.dtype)


def assert_same_outputs(actual, expected, atol):
    """Check shape, dtype and values."""
    assert difference([actual], [expected], "form").max_abs <= atol


def rebuilt(module, form):
    """Return the weight that the factors stand for."""
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
    """Return all about the parameters but their values."""
    return [(n, p.shape, p.dtype, p.is_contiguous(), p.requires_grad) for n, p in form.named_parameters()]
