"""Which layers must not be replaced, and why; which layers a name means."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations

from fxlrd.capturing.whole import capture
from fxlrd.errors import FxlrdError
from fxlrd.graph.guards import check_names, is_stem, matches, shared_parameter, why_not_replaceable
from tests.support.models import CalledTwice

X = (2, 4, 6, 6)


def captured(model: nn.Module) -> fx.GraphModule:
    return capture(model.double().eval(), torch.randn(X, dtype=torch.float64))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Read(nn.Module):
    """The layer is called, and its weight is used on its own as well."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return nn.functional.linear(self.a(x), self.a.weight.t())


def with_hook(register):
    linear = nn.Linear(6, 6)
    getattr(linear, register)(lambda *_: None)
    return nn.Sequential(linear)


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("register", HOOKS)
def test_a_layer_with_hooks_is_left_alone(register):
    assert why_not_replaceable(captured(with_hook(register)))["0"].code == "hooks"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_each_kind_of_addition_has_its_reason():
    old = captured(nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6))))
    assert why_not_replaceable(old)["0"].code == "hooks"
    new = captured(nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6))))
    assert why_not_replaceable(new)["0"].code == "parametrized"
    sub = captured(nn.Sequential(Scaled(6, 6)))
    assert why_not_replaceable(sub)["0"].code == "subclass"
    assert why_not_replaceable(captured(nn.Sequential(nn.Linear(6, 6)))) == {"0": None}


def test_adapters_are_left_alone():
    class Adapted(nn.Module):
        """As a layer of PEFT."""

        def __init__(self, n):
            super().__init__()
            self.lora_A = nn.ModuleDict({"default": nn.Linear(n, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, n, bias=False)})
            self.base_layer = nn.Linear(n, n)

        def forward(self, x):
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    reasons = why_not_replaceable(captured(nn.Sequential(Adapted(6))))
    assert reasons.pop("0.base_layer") is None
    assert {name: reason.code for name, reason in reasons.items()} == {
        "0.lora_A.default": "adapter",
        "0.lora_B.default": "adapter",
    }


def test_tied_weights_name_each_other():
    assert why_not_replaceable(captured(Tied())) == {
        "a": shared_parameter("weight", "b.weight"),
        "b": shared_parameter("weight", "a.weight"),
        "c": None,
    }


def test_a_weight_read_beside_its_layer_is_left_alone():
    reason = why_not_replaceable(captured(Read()))["a"]
    assert reason.code == "read-directly"


def test_a_layer_inside_a_module_that_is_called_too_is_left_alone():
    root = nn.Module()
    root.a = nn.Sequential(nn.Linear(6, 6))
    g = fx.Graph()
    x = g.placeholder("x")
    g.output(g.call_module("a", (g.call_module("a.0", (x,)),)))
    gm = fx.GraphModule(root, g)
    assert why_not_replaceable(gm)["a.0"].code == "container-called"


def test_reasons_are_one_line():
    for model in (Tied(), with_hook("register_forward_hook"), nn.Sequential(Scaled(6, 6))):
        assert not any("\n" in str(reason) for reason in why_not_replaceable(captured(model)).values())


class Initialised(nn.Conv2d):
    """A layer with another construction."""

    __constants__ = ("stride",)
    own: int

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)
        self.own = 3

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def helper(self):
        return self.own


class Further(Initialised):
    def _conv_forward(self, *args):
        return super()._conv_forward(*args) + 1


def test_a_subclass_with_another_construction_is_like_its_stock_type():
    model = nn.Sequential(Initialised(6), Further(6)).double()
    gm = capture(model, torch.randn(1, 6, 5, 5).double())
    assert why_not_replaceable(gm)["0"] is None
    assert why_not_replaceable(gm)["1"].code == "subclass"


def test_a_module_that_is_called_twice_is_no_tie():
    assert why_not_replaceable(captured(CalledTwice(nn.Linear(6, 6)))) == {"a": None}


def test_norms_are_guarded_where_asked():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model[1].register_forward_hook(lambda *_: None)
    gm = captured(model)
    assert why_not_replaceable(gm) == {"0": None}
    reasons = why_not_replaceable(gm, norms=True)
    assert (reasons["0"], reasons["1"].code, reasons["2"]) == (None, "hooks", None)


@pytest.mark.parametrize(("channels", "stem"), [(1, True), (4, True), (5, False)])
def test_the_stem_is_a_conv_of_few_channels_with_no_layer_before(channels, stem):
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 2))
    gm = capture(model, torch.randn(2, channels, 6, 6))
    assert {name: is_stem(gm, name, gm.get_submodule(name)) for name in ("1", "2", "4")} == {
        "1": stem,
        "2": False,
        "4": False,
    }
    assert not is_stem(gm, "4", nn.Linear(4, 2)), "a linear layer is none"


def test_a_name_or_glob_means_a_module_and_all_inside_it():
    assert matches("body.0.conv", ["head", "body"]) == "body"
    assert matches("body.0.conv", ["*.0"]) == "*.0"
    assert matches("body.0.conv", ["conv", "0"]) is None


def test_names_are_those_of_layers_also_of_unreached_ones():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.never = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(x)

    gm = captured(Model())
    check_names(gm, ["fc", "never", "f*"])
    with pytest.raises(FxlrdError, match=r"^unknown layer 'fd': choose from fc, never$"):
        check_names(gm, ["fd"])


def test_complex_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64), nn.Linear(8, 8, dtype=torch.complex64)).eval()
    reasons = why_not_replaceable(capture(model, torch.randn(2, 8, dtype=torch.complex64)))
    assert [reason.code for reason in reasons.values()] == ["complex", "complex"]
