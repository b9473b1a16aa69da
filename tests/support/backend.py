"""torch.compile(…, backend="fxlrd") of a small network, and what it is compared with."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import fxlrd
from fxlrd.backend.compressed import Compressed
from tests.support.models import ResidualNet

EAGER = {"inner": "eager"}


def net(seed=0, **changes):
    """Return a network with BatchNorm statistics, the same for the same seed; ``changes`` are those of `.to()`."""
    torch.manual_seed(seed)
    model = ResidualNet().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-1, 1)
            m.running_var.uniform_(0.5, 2)
    return model.to(**changes)


def images(n=2, **changes):
    """Return the same images every time."""
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(**changes)


def compiled(model, **options):
    """Return the model compiled by the backend, with eager mode as its inner compiler unless ``inner`` is given."""
    arguments = {k: options.pop(k) for k in ("fullgraph", "dynamic") if k in options}
    return torch.compile(model, backend="fxlrd", options={**EAGER, **options}, **arguments)


def expected(model, x, **options):
    """Return the outputs of the model that `compress` makes."""
    with torch.inference_mode(False), torch.no_grad():
        return fxlrd.compress(model, x, measure=False, **options).model(x)


def close(a, b):
    """Check that outputs are equal but for rounding in their dtype."""
    torch.testing.assert_close(a, b)


def refused(match, *args, model=None, **options):
    """Check that compiling fails with one line, and return it."""
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=match) as caught:
        compiled(model or net(), **options)(*(args or (images(),)))
    message = str(caught.value.inner_exception)
    assert isinstance(caught.value.inner_exception, fxlrd.FxlrdError)
    assert "\n" not in message
    return message


def serving(call):
    """Return the compressed graphs that came about in a call."""
    before = {id(o) for o in gc.get_objects() if type(o) is Compressed}
    call()
    return [o for o in gc.get_objects() if type(o) is Compressed and id(o) not in before]
