"""Fashion-MNIST, and the training of the embedded network (fxlrd/app/fashion.py).

``python -m bench.fashion CHECKPOINT`` trains it from seed 0 and writes a safetensors file after each epoch;
``--slice FILE`` writes the images that ship with it as .npz instead. Data: torchvision.datasets.FashionMNIST's files;
Debian's package dataset-fashion-mnist puts them under /usr/share/datasets/fashion-mnist. MIT licence, Zalando SE.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from fxlrd.app.fashion import MEAN, STD, network, normalise

FOLDER = Path("/usr/share/datasets/fashion-mnist")
EPOCHS, BATCH, LR = 12, 128, 0.1


def pixels(train: bool, folder: Path = FOLDER) -> Tensor:
    """Return the images as grey values (N×28×28, uint8)."""
    with gzip.open(folder / f"{'train' if train else 't10k'}-images-idx3-ubyte.gz") as file:
        return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=16).copy()).view(-1, 28, 28)


def targets(train: bool, folder: Path = FOLDER) -> Tensor:
    """Return the labels."""
    with gzip.open(folder / f"{'train' if train else 't10k'}-labels-idx1-ubyte.gz") as file:
        return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).copy()).long()


def load(train: bool) -> tuple[Tensor, Tensor]:
    """Return (images N×1×28×28 normalised, labels)."""
    return normalise(pixels(train)), targets(train)


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
    pairs = zip(images.split(50), labels.split(50), strict=True)  # fewer numbers at a time stay in a cache
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in pairs)
    model.train(was)
    return right / len(labels)


def write_slice(path: Path) -> None:
    """Write 1,024 training images, chosen by seed 0, and the first 2,000 test images with labels."""
    chosen = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))[:1024]
    train, test, labels = pixels(True)[chosen], pixels(False)[:2000], targets(False)[:2000]
    arrays = {"calibration": train, "test_images": test, "test_labels": labels.to(torch.uint8)}
    np.savez_compressed(path, **{name: t.numpy() for name, t in arrays.items()})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fashion")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--slice", action="store_true", help="write images for calibration and test, and stop")
    parser.add_argument("--bf16", action="store_true", help="autocast the forward: twice as fast where the CPU has AMX")
    arguments = parser.parse_args()
    if arguments.slice:
        write_slice(arguments.checkpoint)
        return
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
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, arguments.checkpoint)


if __name__ == "__main__":
    main()
