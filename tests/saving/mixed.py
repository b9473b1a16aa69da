"""A small model that uses every part of the checkpoint format, and how data/mixed was made of it.

All values are small multiples of powers of two in float64, so that every sum in the model is exact: outputs are
bit-equal on any machine and with any thread count.
"""

from __future__ import annotations

import torch
from torch import nn

import fxlrd
from fxlrd.passes import Branch, Calibrate, Decompose, Merge

CHANNELS = 8


def images():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-2, 3, (2, 3, 4, 4), generator=generator).double()


class Mixed(nn.Module):
    """Layers to decompose, branch, merge and skip; shared, tied and frozen tensors; every kind of buffer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS, eps=0.25)
        self.act = nn.ReLU()
        self.tucker = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.branched = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.after = nn.BatchNorm2d(CHANNELS, eps=0.25)
        self.cut = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.cut_norm = nn.BatchNorm2d(CHANNELS, eps=0.25)
        self.reduce = nn.Conv2d(CHANNELS, 4, 1)
        self.expand = nn.Conv2d(4, CHANNELS, 1)
        self.drop = nn.Dropout(0.5)
        self.shared = nn.Linear(CHANNELS, CHANNELS)
        self.again = self.shared
        self.tied = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.other = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.other.weight = self.tied.weight
        self.conv1d = nn.Conv1d(CHANNELS, CHANNELS, 1)
        self.head = nn.Linear(CHANNELS, 5)
        self.register_buffer("scale", torch.full((CHANNELS,), 0.5, dtype=torch.float64))
        self.register_buffer("shift", torch.arange(CHANNELS, dtype=torch.float64), persistent=False)
        self.plain = torch.full((CHANNELS,), 2.0, dtype=torch.float64)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.tucker(x))
        x = self.act(self.after(self.branched(x)))
        x = self.act(self.cut_norm(self.cut(x)))
        x = self.expand(self.reduce(x)).mean((2, 3)) * self.scale + self.shift
        x = self.act(self.again(self.drop(self.shared(x)))) * self.plain
        x = self.other(self.act(self.tied(x)))
        x = self.conv1d(x[:, :, None])[:, :, 0]
        return self.head(x)


class Switched(nn.Module):
    """A model whose own forward does not compute what its graph computes: the graph is saved, with ``double``."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(CHANNELS, CHANNELS)
        self.unused = nn.Linear(CHANNELS, 2)

    def forward(self, x, double=False):
        self.unused(x)
        y = self.fc(x)
        if double:
            y = y * 2 + torch.ones(CHANNELS, dtype=x.dtype)
        return y if isinstance(self.fc, nn.Linear) else y * 0


def exact(model):
    """Give every tensor values that add and multiply exactly."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-1, 2, p.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randint(-2, 3, (module.num_features,), generator=generator))
                module.running_var.fill_(3.75)  # (3.75 + eps) ** -0.5 is exactly 0.5
                module.num_batches_tracked.fill_(7)
    return model


def compressed_mixed():
    """The compressed Mixed that data/mixed holds."""
    model = exact(Mixed().double().to(memory_format=torch.channels_last)).eval()
    rest = ("stem", "cut", "reduce", "expand", "tied", "other", "head")
    pipeline = [
        Calibrate(),
        Decompose(ranks=4, skip=(*rest, "tucker")),
        Branch(groups=2),
        Decompose(ranks=(3, None), skip=(*rest, "branched", "shared", "conv1d")),
        Merge(ranks={"cut": 4}),
        Merge(mode="exact", norms=True, skip="cut"),
    ]
    result = fxlrd.compress(model, images(), calibration=images(), pipeline=pipeline, measure=False).model
    exact(result)
    result.get_submodule("tucker.first").weight.requires_grad_(False)
    result.get_submodule("act").train()
    return result


def compressed_switched():
    """The compressed Switched that data/switched holds."""
    model = exact(Switched().double()).eval()
    x = torch.ones(2, CHANNELS, dtype=torch.float64)
    return exact(fxlrd.compress(model, (x, True), pipeline=[Decompose(ranks=2)], measure=False).model)
