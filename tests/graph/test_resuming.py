from __future__ import annotations

import pytest
import torch
from torch import nn

from fxlrd.graph.inputs import Inputs
from fxlrd.graph.resuming import Resumable, units


class Block(nn.Module):
    def __init__(self, log):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.log = log

    def forward(self, x):
        self.log.append(1)
        return x + self.b(self.a(x).relu()), x[:, :2]


class Net(nn.Module):
    """Blocks, one of them called twice, that add in place to what comes in."""

    def __init__(self, log):
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Linear(6, 6),
            nn.ModuleList(Block(log) for _ in range(4)),
            nn.Linear(6, 3),
        )
        self.count = 0

    def forward(self, x):
        x = self.embed(x)
        for block in (*self.blocks, self.blocks[1]):
            x, part = block(x)
            x += 1
            part.zero_()
        return self.head(x)


class Remembering(Net):
    """What it gives depends on a list that its blocks write to: a block that does not run is missed."""

    def forward(self, x):
        before = len(self.blocks[0].log)
        y = super().forward(x)
        return y + len(self.blocks[0].log) - before


LAYERS = [*(f"blocks.{i}.{name}" for i in range(4) for name in "ab"), "head"]


def test_units_are_the_largest_modules_with_few_of_the_layers():
    assert units(Net([]), LAYERS) == [*(f"blocks.{i}" for i in range(4)), "head"]
    assert units(Net([]), LAYERS[:3]) == LAYERS[:3]


@pytest.mark.parametrize("name", LAYERS)
def test_what_follows_a_changed_layer_runs_and_gives_what_the_whole_model_gives(name):
    log = []
    net = Net(log).double().eval()
    batches = [Inputs((torch.randn(n, 6).double(),)) for n in (3, 5)]
    resumable = Resumable(net, batches, LAYERS)
    net.set_submodule(name, nn.Linear(6, net.get_submodule(name).out_features).double())
    log.clear()
    results = list(resumable.results([name]))
    runs = len(log)
    with torch.no_grad():
        expected = [net(batch.args[0].clone()) for batch in batches]
    assert all(torch.allclose(a, b, rtol=1e-12) for (a,), b in zip(results, expected, strict=True))
    assert runs == 2 * (0 if name == "head" else 5 - int(name.split(".")[1]))
    assert all("forward" not in vars(module) and not module._forward_pre_hooks for module in net.modules())


def test_where_blocks_do_more_than_give_their_output_all_of_the_model_runs():
    net = Remembering([]).double().eval()
    resumable = Resumable(net, [Inputs((torch.randn(3, 6).double(),))], LAYERS)
    assert not resumable.outputs
    (result,) = resumable.results(["head"])
    assert torch.allclose(result[0], resumable.original[0][0])


def test_layers_that_are_called_without_the_module_that_they_are_in_run():
    class Holding(nn.Module):
        """Its second layer stands in a module without a forward."""

        def __init__(self):
            super().__init__()
            self.first, self.holder, self.last = nn.Linear(6, 6), nn.Module(), nn.Linear(6, 6)
            self.holder.layer = nn.Linear(6, 6)
            self.rest = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

        def forward(self, x):
            x = self.last(self.holder.layer(self.first(x)))
            return self.rest[1](self.rest[0](x))

    torch.manual_seed(0)
    net, batch = Holding().double().eval(), Inputs((torch.randn(3, 6).double(),))
    resumable = Resumable(net, [batch], ["first", "holder.layer", "last", "rest.0", "rest.1"])
    assert "holder" in resumable.units
    net.holder.layer = nn.Linear(6, 6).double()
    ((result,),) = resumable.results(["holder.layer"])
    with torch.no_grad():
        assert torch.allclose(result, net(*batch.args), rtol=1e-12)
