"""Dynamic shapes, graph breaks, threads, inference mode and autocast."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fxlrd
from tests.support.backend import EAGER, close, compiled, expected, images, net, serving
from tests.support.cases import cases
from tests.support.models import ResidualNet


@pytest.mark.slow
@pytest.mark.parametrize("inner", cases(["eager", "inductor"], slow=["inductor"]))
@torch.no_grad()
def test_dynamic_shapes(inner):
    model = net()
    f = torch.compile(model, backend="fxlrd", dynamic=True, options={"inner": inner})
    for n in (2, 5, 7):
        close(f(images(n)), expected(model, images(n)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(net(3).state_dict())
        close(f(images(5)), expected(model, images(5)))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_new_weights_that_need_another_graph(dynamic):
    """As where a pass chooses other ranks for other weights."""
    model = net()
    f = torch.compile(model, backend="fxlrd", dynamic=dynamic, options={"inner": "aot_eager"})
    (served,) = serving(lambda: f(images(2)))
    model.load_state_dict(net(3).state_dict())
    served.code = ()  # that of another graph
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (2, 3) if dynamic else (2,):
            close(f(images(n)), expected(model, images(n)))
    assert any("runs uncompiled" in str(w.message) for w in caught) is dynamic


@pytest.mark.slow
@torch.no_grad()
def test_threads_with_models_of_their_own():
    models, x = [net(i) for i in range(2)], images()
    want = [expected(m, x) for m in models]
    f = torch.compile(lambda m, v: m(v), backend="fxlrd", options=EAGER)
    f(models[0], x)

    def wrong(i):
        with torch.no_grad():
            return sum(not torch.allclose(f(models[i], x), want[i], atol=1e-6) for _ in range(50))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(wrong, range(2))) == [0, 0]


@pytest.mark.slow
@torch.no_grad()
def test_automatic_dynamic_shapes():
    model = net()
    f = compiled(model)
    for n in (2, 5, 7):
        close(f(images(n)), expected(model, images(n)))


class Broken(ResidualNet):
    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        torch._dynamo.graph_break()
        x = self.blocks[1](x)
        torch._dynamo.graph_break()
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
@torch.no_grad()
def test_graph_breaks():
    torch.manual_seed(0)
    model, x = Broken().eval(), images()
    unbroken = ResidualNet().eval()
    unbroken.load_state_dict(model.state_dict())
    made = serving(lambda: close(compiled(model)(x), expected(unbroken, x)))
    assert len(made) == 3
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="in this graph"):
        close(compiled(model, skip="blocks.1")(x), expected(unbroken, x, skip="blocks.1"))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(model, fullgraph=True)(x)


@pytest.mark.slow
@torch.no_grad()
def test_fullgraph():
    model, x = net(), images()
    close(compiled(model, fullgraph=True)(x), expected(model, x))


@pytest.mark.parametrize("inner", cases(["eager", "aot_eager"], slow=["aot_eager"]))
def test_inference_mode(inner):
    model, x = net(), images()
    f = torch.compile(model, backend="fxlrd", options={"inner": inner})
    with torch.inference_mode():
        close(f(x), expected(model, x))
        close(f(x.clone() + 0), expected(model, x))
    model.load_state_dict(net(4).state_dict())
    with torch.inference_mode():
        close(f(x), expected(model, x))


@pytest.mark.parametrize("inner", cases(["eager", "inductor"], slow=["inductor"]))
@torch.no_grad()
def test_autocast(inner):
    model, x = net(), images()
    small = fxlrd.compress(model, x, measure=False).model
    f = torch.compile(model, backend="fxlrd", options={"inner": inner})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = serving(lambda: f(x))
        got, want = f(x), small(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    factors = {f for s in made for f in s.sets.latest.factors}
    exact = dict(small.named_parameters())
    assert any(torch.equal(f, exact["head.first.weight"]) for f in factors)  # factors are made in full precision


@torch.no_grad()
def test_autocast_inside():
    class Inside(ResidualNet):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    plain, x = net(), images()
    model = Inside().eval()
    model.load_state_dict(plain.state_dict())
    small = fxlrd.compress(plain, x, measure=False).model
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is verified all the same
        got = compiled(model)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(got, small(x))
    assert got.dtype == torch.bfloat16


@torch.no_grad()
def test_a_graph_that_does_not_run_on_its_own():
    class Casting(ResidualNet):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.head(self.blocks(self.stem(x)).mean((2, 3)).bfloat16())

    plain, x = net(), images()
    model = Casting().eval()
    model.load_state_dict(plain.state_dict())
    small = fxlrd.compress(plain, x, measure=False).model
    with pytest.warns(UserWarning, match="does not run on its own"):
        got = compiled(model)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(got, small(x))


@torch.no_grad()
def test_the_random_state_stays():
    model, x = net(), images()
    state = torch.get_rng_state()
    compiled(model)(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@torch.no_grad()
def test_buffers_are_not_written_while_verifying():
    class Counting(ResidualNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x):
            self.runs.add_(1)
            return super().forward(x)

    model, x = Counting().eval(), images()
    compiled(model)(x)
    assert model.runs == 1
    model = net().train()
    compiled(model)(x)
    assert model.blocks[0].bn1.num_batches_tracked == 1


@pytest.mark.slow
@torch.no_grad()
def test_compiles_once():
    counter = CompileCounterWithBackend("fxlrd")
    model, x = net(), images()
    f = torch.compile(model, backend=counter)
    f(x)
    model.load_state_dict(net(2).state_dict())
    f(x)
    assert counter.frame_count == 1
