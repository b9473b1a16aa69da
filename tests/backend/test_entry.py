"""The entry point: which graphs it compresses, and with what outputs."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import fxlrd
from tests.support.backend import close, compiled, expected, images, net, serving
from tests.support.cases import cases
from tests.support.clothes import CLOTHES


@pytest.mark.slow
def test_entry_point_without_importing_fxlrd():
    script = (
        "import torch, sys; m = torch.nn.Sequential(torch.nn.Linear(64, 64)); x = torch.randn(2, 64)\n"
        "torch.set_grad_enabled(False)\n"
        "c = torch.compile(m, backend='fxlrd', options={'inner': 'eager', 'ratio': 2.0})\n"
        "assert not torch.equal(c(x), m(x)) and 'fxlrd' in torch._dynamo.list_backends()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


OPTIONS = [
    {},
    {"ratio": 3.0},
    {"skip": "blocks.0"},
    {"skip": ("head", "blocks.*.conv2")},
    {"preset": "branch"},
    {"preset": "freeze"},
    {"passes": "decompose{ranks=5}"},
    {"passes": "decompose{ratio=3,skip=head|blocks.1}"},
    {"passes": "merge{mode=exact,norms=true}"},
    {"passes": "decompose,merge{mode=exact,norms=true}"},
]


@pytest.mark.parametrize("options", cases(OPTIONS, slow=OPTIONS[5:]), ids=str)
@torch.no_grad()
def test_same_numbers_as_compress(options):
    model, x = net(), images()
    want = {"pipeline" if k == "passes" else k: v for k, v in options.items()}
    got = compiled(model, **options)(x)
    assert torch.equal(got, expected(model, x, **want))
    assert not torch.equal(got, model(x))


@torch.no_grad()
def test_preset_ranks_is_timed_on_the_example_inputs():
    model, x = net(), images()
    close(compiled(model, preset="ranks", passes=None)(x), expected(model, x, preset="ranks"))


@pytest.mark.slow
@torch.no_grad()
def test_ranks_are_timed_under_the_inner_compiler(monkeypatch):
    model, x = nn.Sequential(nn.Conv2d(128, 256, 1)).eval(), torch.randn(2, 128, 28, 28)
    runs = []
    monkeypatch.setattr(fxlrd.Pipeline, "__call__", _collecting(runs, fxlrd.Pipeline.__call__))
    got = torch.compile(model, backend="fxlrd", options={"passes": "decompose{ratio=8},snap{seconds=0.2}"})(x)
    assert runs[0].ledger[1].text == "snap{compile=true,seconds=0.2}"
    close(got, runs[0].graph_module(x)[0])


def _collecting(runs, call):
    def recorded(self, *args, **others):
        runs.append(call(self, *args, **others))
        return runs[-1]

    return recorded


@pytest.mark.parametrize("inner", cases(["aot_eager", "inductor"], slow=["inductor"]))
@torch.no_grad()
def test_inner_compilers(inner):
    model, x = net(), images()
    close(torch.compile(model, backend="fxlrd", options={"inner": inner})(x), expected(model, x))


@torch.no_grad()
def test_channels_last_and_bfloat16():
    model, x = net(memory_format=torch.channels_last), images(memory_format=torch.channels_last)
    assert torch.equal(compiled(model)(x), expected(model, x))
    model, x = net(dtype=torch.bfloat16), images(dtype=torch.bfloat16)
    got = compiled(model)(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected(model, x))


@torch.no_grad()
def test_factors_keep_channels_last():
    model, x = net(memory_format=torch.channels_last), images(memory_format=torch.channels_last)
    (served,) = serving(lambda: compiled(model)(x))
    cores = [f for f in served.sets.latest.factors if f.dim() == 4 and f.shape[2] == 3]
    assert cores
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in cores)


@torch.no_grad()
def test_graphs_without_layers_or_with_all_of_them_skipped_stay_as_they_are(recwarn):
    x = torch.randn(3, 5)
    assert torch.equal(compiled(lambda v: v.sin() + 1)(x), x.sin() + 1)
    model = net()
    assert torch.equal(compiled(model, skip=("head", "blocks"))(images()), model(images()))


def test_training_is_refused():
    with pytest.raises(BackendCompilerFailed, match=r"is for inference.*no_grad"):
        compiled(net())(images())


def test_weights_that_require_no_gradient_may_run_outside_of_no_grad():
    model, x = net().requires_grad_(False), images()
    close(compiled(model)(x), expected(model, x))


def test_gradient_of_the_input():
    model, x = net().requires_grad_(False), images().requires_grad_()
    compiled(model)(x).sum().backward()
    y = x.detach().clone().requires_grad_()
    fxlrd.compress(model, x.detach(), measure=False).model(y).sum().backward()
    close(x.grad, y.grad)


@pytest.mark.parametrize("cls", CLOTHES)
@torch.no_grad()
def test_layers_in_other_clothes_are_those_of_compress(cls):
    torch.manual_seed(0)
    model, x = nn.Sequential(cls(32, 48), nn.ReLU(), cls(48, 32)).eval(), torch.randn(3, 32)
    wanted = expected(model, x, ratio=2.0)
    assert (wanted - model(x)).norm() > 0.1 * wanted.norm()
    close(compiled(model, ratio=2.0)(x), wanted)


class OwnAttributes(nn.Module):
    """As the models of diffusers and PEFT: Dynamo reaches what it holds by the dictionary of its modules."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(64, 64)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.head(self.inner(x))


class AssignedForward(nn.Module):
    """As FasterNet and fused models: forward is a method that was assigned."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"a b": nn.Linear(64, 64)})
        self.forward = self.forward_fast

    def forward_fast(self, x):
        return self.blocks["a b"](x)


@torch.no_grad()
def test_layers_have_the_names_that_compress_gives_them_however_dynamo_reaches_them():
    model, x = nn.Sequential(OwnAttributes(AssignedForward())).eval(), torch.randn(2, 64)
    assert torch.equal(compiled(model, ratio=2.0)(x), expected(model, x, ratio=2.0))
    names = ["0.head", "0.inner.blocks.a b"]
    assert sorted(row["name"] for row in fxlrd.compress(model, x, measure=False).report.layers) == names
    for name in names:
        torch._dynamo.reset()
        assert torch.equal(compiled(model, ratio=2.0, skip=name)(x), expected(model, x, ratio=2.0, skip=name))


@pytest.mark.parametrize("name", ["class", 'a"b', "a\nb"])
@torch.no_grad()
def test_names_that_break_code(name):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({name: nn.Linear(64, 64)})

        def forward(self, x):
            return self.parts[name](x)

    torch._dynamo.reset()
    model, x = Named().eval(), torch.randn(2, 64)
    assert torch.equal(compiled(model)(x), expected(model, x))


def test_a_graph_that_writes_into_its_weights_is_compiled_as_it_is():
    class Rescaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.done = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), False

        def forward(self, x):
            if not self.done:
                self.b.weight.div_(4)
                self.done = True
            return self.b(self.a(x)) * 4

    torch.manual_seed(0)
    model, x = Rescaled().eval(), torch.randn(2, 16)
    weight, expected = model.b.weight.detach().clone(), copy.deepcopy(model)
    compiled_model = torch.compile(model, backend="fxlrd", options={"inner": "eager"})
    with torch.no_grad():
        with pytest.warns(UserWarning, match="writes into .*: this graph is compiled as it is"):
            made = compiled_model(x)
        torch.testing.assert_close(made, expected(x))
    torch.testing.assert_close(model.b.weight, weight / 4)


def test_no_grad_may_be_inside_what_is_compiled():
    model, x = nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(2, 16)

    @torch.compile(backend="fxlrd", options={"inner": "eager"})
    def inside(x):
        with torch.no_grad():
            return model(x)

    assert inside(x).shape == (2, 16)


def test_what_is_written_into_arguments_is_written_once():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, total, position):
            total.add_(x)
            position.add_(1)
            return self.b(self.a(x).relu()) + total

    call = torch.compile(Decoder().eval(), backend="fxlrd", options={"ratio": 2.0, "inner": "eager"})
    total, position = torch.zeros(4, 64), torch.zeros(1)
    with torch.no_grad():
        call(torch.ones(4, 64), total, position)
    assert float(total.max()) == 1.0
    assert float(position) == 1.0
