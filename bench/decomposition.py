"""Decomposing all of ResNet-152 at 2×: fxlrd against the same job through torch.linalg.svd.

The same job: the same ranks, forms and half-steps of orthogonal iteration, each dominant basis from a full
SVD of the unfolding. Target: at least 4 times as fast, weight errors within 1e-4 of the optimal truncation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torchvision import models
from tqdm import tqdm

from fxlrd.layers.build import decomposed
from fxlrd.layers.forms import ranks_by_ratio
from fxlrd.layers.kinds import LAYERS

ROUNDS = 3


def svd_basis(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[0][..., :rank]


def job(layers: list[nn.Module]) -> list[float]:
    return [decomposed(layer, ranks_by_ratio(layer, 2.0))[1] for layer in layers]


def timed(call: Callable[[], list[float]]) -> tuple[float, list[float]]:
    start = time.perf_counter()
    errors = call()
    return time.perf_counter() - start, errors


def main() -> None:
    torch.manual_seed(0)
    model = models.resnet152()
    layers = [m for name, m in model.named_modules() if isinstance(m, LAYERS) and name != "conv1"]
    times: dict[str, list[float]] = {"fxlrd": [], "torch.linalg.svd": []}
    for _ in tqdm(range(ROUNDS), desc="rounds", leave=False, disable=None):
        seconds, ours = timed(lambda: job(layers))
        times["fxlrd"].append(seconds)
        with mock.patch("fxlrd.factor.basis.left_basis", svd_basis):
            seconds, reference = timed(lambda: job(layers))
        times["torch.linalg.svd"].append(seconds)
    rows = [[k, f"{statistics.median(v):.2f} s", f"{min(v):.2f}-{max(v):.2f}"] for k, v in times.items()]
    print(tabulate(rows, headers=[f"{len(layers)} layers of ResNet-152", "median", "range"]))
    speed = statistics.median(times["torch.linalg.svd"]) / statistics.median(times["fxlrd"])
    excess = max((a - b) / b for a, b in zip(ours, reference, strict=True))
    print(f"fxlrd is {speed:.1f} times as fast (target: 4)")
    print(f"largest relative excess of a weight's error over torch.linalg.svd's: {excess:.1e} (limit 1e-4)")
    optimal = 0.0
    for layer in layers:
        if isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1):
            (rank,) = ranks_by_ratio(layer, 2.0)
            sigma = torch.linalg.svdvals(layer.weight.detach().flatten(1).double())
            best = (sigma[rank:].square().sum() / sigma.square().sum()).sqrt().item()
            optimal = max(optimal, decomposed(layer, (rank,))[1] / best - 1)
    print(f"largest relative excess over the optimal truncation (float64, 1x1 and linear layers): {optimal:.1e}")


if __name__ == "__main__":
    main()
