"""Control characters in names reach no terminal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd.escaping import printable, visible

NAME = "\x1b]0;owned\x07\u202e"


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module(NAME, nn.Linear(64, 64))

    def forward(self, x):
        return self._modules[NAME](x)


def shown(text):
    assert r"\x1b]0;owned\x07\u202e" in text
    assert not {*"\x1b\x07\u202e"} & {*text}


def test_text():
    assert visible("ä → ×") == "ä → ×"
    assert visible("\ud800\x9b") == r"\ud800\x9b"
    assert printable({"a\n": ["b\t", ("c\x7f", 1, None)]}) == {r"a\n": [r"b\t", [r"c\x7f", 1, None]]}


def test_reports_diffs_and_errors():
    model, x = Named(), torch.randn(2, 64)
    result = fxlrd.compress(model, x, measure=False)
    shown(result.report.to_table())
    shown(str(fxlrd.diff(model, result)))
    shown(fxlrd.diff(model, result).to_text(color=False))
    with pytest.raises(fxlrd.FxlrdError) as error:
        fxlrd.compress(model, x, pipeline=[fxlrd.passes.Decompose(ranks=(1, 2))], measure=False)
    shown(str(error.value))
    assert result.report.layers[0]["name"] == NAME, "data stay as they are"


def test_a_name_of_the_class():
    model = nn.Sequential(nn.Linear(64, 64))
    model.__class__ = type("\x1b[2J", (nn.Sequential,), {})
    result = fxlrd.compress(model, torch.randn(2, 64), measure=False)
    assert "\x1b" not in repr(result) + repr(result.report) + result.report.to_table()
