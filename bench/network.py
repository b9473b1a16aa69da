"""The trained network (fxlrd/app/fashion.py) as the tables of accuracy take it: its images, accuracy and training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, fx, nn

from bench.fashion import accuracy, augmented, load
from fxlrd import capture, finetune
from fxlrd.app import fashion
from fxlrd.graph import cost
from fxlrd.passes import Recalibrate

BATCH, LR = 128, 0.005
"""Of the training, the same for all: images a step, and the peak of the learning rate."""
EPOCH = 469
"""Steps that see each of the 60,000 training images."""


class Batches:
    """The training images, augmented anew in each epoch; ``count`` batches of them."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int = BATCH, count: int | None = None) -> None:
        self.images, self.labels, self.batch = images, labels, batch
        self.count = count or -(-len(images) // batch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(augmented(self.images, self.labels, self.batch), self.count)


class Network:
    """The trained network and the images of Fashion-MNIST: 1,024 to calibrate with, those it trains on, those of tests.

    ``quick`` takes a few images that ship with fxlrd in their place, and one small step of training.

    Attributes:
        model: the network, in channels_last.
        calibration: training images without labels, in batches.
        loader: ``steps`` batches of training images with labels.
        test: images and labels.
    """

    def __init__(self, steps: int, quick: bool = False) -> None:
        self.model = channels_last(fashion.trained())
        if quick:  # the images that ship have no labels but the network's own
            images, self.test = fashion.calibration()[:128], tuple(t[:50] for t in fashion.test())
            labels = self.model(images).argmax(1).detach()
            self.loader = Batches(images, labels, batch=16, count=1)
        else:
            images, labels = load(train=True)
            self.test = load(train=False)
            self.loader = Batches(images, labels, count=steps)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1024]
        self.calibration = list(images[chosen].split(len(chosen) // 8))
        self.x = self.calibration[0][:8]

    def top1(self, model: nn.Module) -> float:
        """Return the share of right answers in per cent."""
        return 100 * accuracy(model, *self.test)

    def share(self, model: nn.Module) -> float:
        """Return a model's parameters as a share of the network's."""
        return cost.params(model) / cost.params(self.model)

    def estimated(self, model: nn.Module) -> fx.GraphModule:
        """Return the model with BatchNorm statistics from the calibration images."""
        return Recalibrate(calibration=self.calibration, guard=False)(capture(model, self.x)).graph_module

    def trained(self, model: nn.Module, seed: int = 0, teacher: nn.Module | None = None) -> float:
        """Return what share of answers of a copy is right, in per cent, after training on the loader."""
        model = channels_last(model)
        finetune(model, self.loader, epochs=1, lr=LR, seed=seed, teacher=teacher, progress=False)
        return self.top1(model)


def channels_last(model: nn.Module) -> nn.Module:
    """Return a copy in the layout in which CPUs run and train convs faster."""
    return copy.deepcopy(model).to(memory_format=torch.channels_last)
