"""What stands in the way of a trace is said in words for the model's author."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from fxlrd.capturing.whole import capture
from fxlrd.errors import CaptureError
from tests.support.compression import quick

X = torch.linspace(-1, 1, 32).reshape(4, 8)


def message(forward):
    with pytest.raises(CaptureError) as caught:
        capture(model(forward), X)
    text = str(caught.value)
    assert "Proxy" not in text
    assert "\n" not in text
    return text.split(";")[0]


def model(forward):
    cls = type("Model", (nn.Module,), {"forward": forward})
    made = cls()
    made.fc = nn.Linear(8, 8)
    return made


def branches(self, x):
    return self.fc(x) if x.sum() > 0 else x


def asserts(self, x):
    assert x.shape[0] < 5
    return self.fc(x)


def iterates(self, x):
    return torch.stack([self.fc(row) for row in x])


def takes_length(self, x):
    return self.fc(x) * len(x)


def assigns(self, x):
    y = self.fc(x)
    y[0] = 0
    return y


def ranges(self, x):
    return sum(self.fc(x) * i for i in range(x.shape[0]))


def makes_numbers(self, x):
    return self.fc(x) * int(x.shape[0])


def makes_tensors(self, x):
    return self.fc(x) + torch.zeros(x.shape[0], 8)


class Hidden:
    def __init__(self, module):
        self.module = module


outside = Hidden(nn.Linear(8, 8))


def calls_others(self, x):
    return outside.module(self.fc(x))


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (branches, "it branches on values or sizes of tensors"),
        (asserts, "it branches on values or sizes of tensors"),
        (iterates, "it iterates over a tensor or its sizes"),
        (takes_length, "it takes the len() of a tensor or of its sizes"),
        (assigns, "it assigns to an element or a slice of a tensor"),
        (ranges, "it counts with a size of a tensor"),
        (makes_numbers, "it makes a number of a tensor or its size, with int()"),
        (makes_tensors, "it calls zeros() with a number that depends on its inputs"),
        (calls_others, "it calls a module that is no attribute of it"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_the_words(forward, words):
    line = forward.__code__.co_firstlineno
    text = message(forward)
    assert text.startswith("Model cannot be traced at test_obstacles.py:")
    assert line <= int(text.split(":")[1]) <= line + 4
    assert words in text


def logged(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        kwargs.pop("verbose", None)
        return forward(self, *args, **kwargs)

    return wrapper


@logged
def decorated(self, x, **kwargs):
    return self.fc(x)


def test_a_decorator_around_forward_is_named():
    line = logged.__code__.co_firstlineno + 1
    assert message(decorated) == (
        f"Model cannot be traced: its forward is wrapped in a decorator (logged, test_obstacles.py:{line}) that "
        "torch.fx cannot see through"
    )


def test_the_warning_of_compress_has_the_words():
    warnings = quick(model(decorated), X, ratio=1.5).report.warnings
    assert any("its forward is wrapped in a decorator (logged" in warning for warning in warnings)
