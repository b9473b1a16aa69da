"""Fashion-MNIST, and the small bottleneck ResNet that is trained on it.

``python -m bench.fashion CHECKPOINT`` trains the network from seed 0 and writes its state_dict.
Data: torchvision.datasets.FashionMNIST's files; Debian's package dataset-fashion-mnist puts them under
/usr/share/datasets/fashion-mnist. MIT licence, Zalando SE.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from tqdm import tqdm

FOLDER = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530
EPOCHS, BATCH, LR = 12, 128, 0.1


def network() -> nn.Module:
    """Return the untrained network: stem 3×3, bottlenecks of 32/64/128 planes, two each; about 0.9 M parameters."""
    model = ResNet(Bottleneck, [2, 2, 2, 2], num_classes=10)
    model.inplanes = 32
    model.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(32)
    model.maxpool = nn.Identity()
    model.layer1 = model._make_layer(Bottleneck, 32, 2)
    model.layer2 = model._make_layer(Bottleneck, 64, 2, stride=2)
    model.layer3 = model._make_layer(Bottleneck, 128, 2, stride=2)
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(512, 10)
    return model


def load(train: bool, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Return (images N×1×28×28 normalised, labels)."""
    prefix = "train" if train else "t10k"
    with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz") as file:
        images = torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=16).copy()).view(-1, 1, 28, 28)
    with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz") as file:
        labels = torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).copy()).long()
    return (images.float() / 255 - MEAN) / STD, labels


def augmented(images: Tensor, labels: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches, flipped and shifted by up to two pixels at random."""
    for index in torch.randperm(len(images)).split(batch):
        x = nn.functional.pad(images[index], (2, 2, 2, 2), value=-MEAN / STD)
        dy, dx = torch.randint(0, 5, (2,)).tolist()
        x = x[:, :, dy : dy + 28, dx : dx + 28]
        flip = torch.rand(len(x)) < 0.5
        x[flip] = x[flip].flip(3)
        yield x.contiguous(memory_format=torch.channels_last), labels[index]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers, in eval mode."""
    was = model.training
    model.eval()
    right = sum(
        (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    model.train(was)
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fashion")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--bf16", action="store_true", help="autocast the forward: twice as fast where the CPU has AMX")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = network().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    images, labels = load(train=True)
    test = load(train=False)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = arguments.epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.2)
    for epoch in range(arguments.epochs):
        total = 0.0
        for x, y in tqdm(augmented(images, labels, BATCH), total=-(-len(images) // BATCH), leave=False, disable=None):
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
                loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(y)
        print(f"epoch {epoch}: loss {total / len(images):.4f}, test {accuracy(model, *test):.4f}", flush=True)
        torch.save(model.state_dict(), arguments.checkpoint)


if __name__ == "__main__":
    main()
