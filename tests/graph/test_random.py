from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from fxlrd.graph.random import OwnGenerators

DRAWS = {
    "rand": lambda x: torch.rand(3),
    "randn": lambda x: torch.randn(3, dtype=torch.float64),
    "randint": lambda x: torch.randint(100, (3,)),
    "randint from": lambda x: torch.randint(2, 100, (3,)),
    "randperm": lambda x: torch.randperm(20),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 100),
    "normal": lambda x: torch.normal(x, x.abs() + 1),
    "in place": lambda x: x.clone().uniform_(),
    "bernoulli": lambda x: torch.bernoulli(torch.full((40,), 0.5)),
    "multinomial": lambda x: torch.multinomial(torch.ones(50), 5),
    "dropout": lambda x: F.dropout(torch.ones(64), 0.5, True),
    "feature dropout": lambda x: F.dropout1d(torch.ones(64, 4), 0.5, True),
    "alpha dropout": lambda x: F.alpha_dropout(torch.ones(64), 0.5, True),
    "attention": lambda x: F.scaled_dot_product_attention(*[torch.ones(1, 1, 16, 4)] * 3, dropout_p=0.5),
    "rrelu": lambda x: F.rrelu(-torch.ones(40), training=True),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_depend_on_the_seed_alone_and_leave_the_generator_of_the_process(draw):
    x, state = torch.arange(1.0, 4.0), torch.get_rng_state()

    def drawn(seed):
        with OwnGenerators(seed) as generators:
            pair = draw(x), draw(x)
        assert generators.drawn
        return pair

    (one, two), again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip((one, two), again, strict=True))
    assert not torch.equal(one, other[0])


def test_a_dropout_keeps_the_mean():
    with OwnGenerators(0):
        dropped = F.dropout(torch.ones(100_000), 0.25, True)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(dropped.mean() - 1) < 0.01


def test_a_generator_that_is_given_is_used():
    with OwnGenerators(0) as generators:
        drawn = torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert not generators.drawn
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_other_threads_draw_what_they_would_without():
    drawn, start, stop = [], threading.Event(), threading.Event()

    def draw():
        start.wait()
        while not stop.is_set() and len(drawn) < 20_000:
            drawn.append(torch.rand(()).item())

    torch.manual_seed(7)
    thread = threading.Thread(target=draw)
    thread.start()
    start.set()
    for seed in range(50):
        with OwnGenerators(seed):
            torch.rand(100)
    stop.set()
    thread.join()
    torch.manual_seed(7)
    assert drawn == [torch.rand(()).item() for _ in drawn]
