"""Random small networks and random valid pipelines, each from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, nn.LeakyReLU, nn.Sigmoid)
FULL_RANK = 100_000
"""Ranks are clipped to full rank."""


class RandomNetwork(nn.Module):
    """A chain of random steps over (N, C, …), with ``dims`` dimensions after the channels; with 0, of linear layers.

    ``traceable=False`` may add a step that branches on values. Weights, norms and the structure follow from ``seed``.
    """

    def __init__(self, seed: int, traceable: bool = True) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.dims = self.draw.choice((0, 1, 2, 2, 2, 3))
        self.width = self.draw.choice((6, 8, 12, 16))
        self.size = {0: (), 1: (17,), 2: (11, 9), 3: (6, 7, 5)}[self.dims]
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.steps = nn.ModuleList()
        self.kinds: list[str] = []
        self.stem = self.layer(3, self.width)
        kinds = [
            "layer", "layer", "norm", "activation", "residual", "concat", "split", "shared", "dropout", "in-place",
            "shortcut read after an in-place activation",
        ]  # fmt: skip
        if self.dims:
            kinds += ["depthwise", "grouped", "strided", "transposed"]
        channels = self.width
        for _ in range(self.draw.randint(3, 6)):
            kind = self.draw.choice(kinds)
            channels = self.add(kind, channels)
        self.branch_at = None if traceable else self.draw.randrange(len(self.kinds))
        self.head = nn.Linear(channels, self.draw.choice((5, 10)))
        self.outputs = self.draw.choice(("tensor", "tuple", "dict"))
        self.counts_calls = self.draw.random() < 0.3
        del self.draw  # a random state is no part of a model
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, t in self.named_parameters():
                t.copy_(torch.randn(t.shape, generator=generator) / max(1, t[0].numel() if t.dim() > 1 else 1) ** 0.5)
                if "norm" in name:
                    t.abs_()
            for name, t in self.named_buffers():
                if t.is_floating_point():
                    t.copy_(torch.rand(t.shape, generator=generator) + (0.5 if name.endswith("var") else -0.5))

    def layer(self, c_in: int, c_out: int, kind: str = "layer") -> nn.Module:
        """Return a conv or linear layer that keeps the size, unless it is strided or transposed."""
        bias = self.draw.random() < 0.6
        if self.dims == 0:
            return nn.Linear(c_in, c_out, bias=bias)
        kernel = self.draw.choice((1, 3, 3, (3, 1, 3)[: self.dims] if self.dims > 1 else 5))
        dilation = self.draw.choice((1, 1, 2))
        sizes = kernel if isinstance(kernel, tuple) else (kernel,) * self.dims
        padding = tuple(dilation * (k - 1) // 2 for k in sizes)
        options: dict[str, Any] = {"bias": bias, "padding": padding, "dilation": dilation}
        if kind == "depthwise":
            options["groups"] = c_in
        elif kind == "grouped":
            options["groups"] = 2
        elif kind == "strided":
            options["stride"] = 2
        if kind == "transposed":
            return TRANSPOSED[self.dims](c_in, c_out, kernel, **options)
        if self.draw.random() < 0.2 and all(s > p for s, p in zip(self.size, padding, strict=True)):
            options["padding_mode"] = self.draw.choice(("reflect", "replicate", "circular"))
            if self.dims == 3 and options["padding_mode"] == "reflect":
                options["padding_mode"] = "circular"
        return CONVS[self.dims](c_in, c_out, kernel, **options)

    def add(self, kind: str, channels: int) -> int:
        """Add a step and return the channels after it."""
        out = channels
        if kind == "layer":
            out = self.draw.choice((6, 8, 12, 16))
            step: nn.Module = self.layer(channels, out)
        elif kind in ("depthwise", "grouped", "strided", "transposed"):
            if kind == "strided" and "strided" in self.kinds:
                kind = "grouped"
            step = self.layer(channels, channels, kind)
        elif kind == "norm":
            step = BATCH_NORMS[self.dims](channels)
        elif kind == "activation":
            step = self.draw.choice(ACTIVATIONS)()
        elif kind in ("in-place", "shortcut read after an in-place activation"):
            step = nn.Sequential(self.layer(channels, channels), nn.ReLU(inplace=True))
            if kind != "in-place":
                step.append(self.layer(channels, channels)).append(self.layer(channels, channels))
        elif kind == "dropout":
            step = nn.Dropout(0.2)
        elif kind == "split":
            step = nn.ModuleList([self.layer(channels // 2, channels // 2), self.layer(channels // 2, channels // 2)])
        elif kind == "concat":
            step, out = self.layer(channels, 4), channels + 4
        else:  # residual, shared
            step = self.layer(channels, channels)
        self.steps.append(step)
        self.kinds.append(kind)
        return out

    def forward(self, x: Tensor) -> Any:
        if self.counts_calls:
            self.calls += 1
        x = self.stem(x)
        for i, (kind, step) in enumerate(zip(self.kinds, self.steps, strict=True)):
            x = self.run(kind, step, x)
            if i == self.branch_at:
                x = x * 2 if bool(x.sum() > 0) else x - 1
        features = x.flatten(2).mean(2) if self.dims else x
        scores = self.head(features)
        return {"tensor": scores, "tuple": (scores, features), "dict": {"scores": scores, "map": x}}[self.outputs]

    def run(self, kind: str, step: Any, x: Tensor) -> Tensor:
        if kind == "residual":
            return x + step(x).tanh()
        if kind == "concat":
            return torch.cat([x, step(x)], 1)
        if kind == "split":
            a, b = x.chunk(2, 1)
            return torch.cat([step[0](a), step[1](b).relu()], 1)
        if kind == "shared":
            return step(step(x).relu())
        if kind == "shortcut read after an in-place activation":
            y = step[0](x)
            z = step[1](y)
            return step[2](z) + step[3](y)
        return step(x)


def inputs(model: RandomNetwork, seed: int, batch: int = 4) -> Tensor:
    """Return inputs of the network in the dtype of its weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, 3, *model.size), generator=generator)
    return x.to(model.head.weight.dtype)


EXACT: tuple[Callable[[random.Random], str], ...] = (
    lambda draw: f"decompose{{ranks={FULL_RANK},sweeps={draw.randint(1, 2)}}}",
    lambda draw: "merge{mode=exact}",
    lambda draw: "merge{mode=exact,norms=true}",
    lambda draw: f"freeze{{schedule={draw.choice(('paper', 'sequential'))}}}",
)
APPROXIMATE: tuple[Callable[[random.Random], str], ...] = (
    lambda draw: f"decompose{{ratio={draw.choice((1.5, 2, 3))},skip=head}}",
    lambda draw: f"branch{{groups={draw.choice((2, 4))}}}",
    lambda draw: f"allocate{{params={draw.choice((0.9, 0.97))}}},merge,decompose",
    lambda draw: f"merge{{ratio={draw.choice((1.5, 2.5))}}}",
    lambda draw: "refit",
    lambda draw: "recalibrate",
)


def exact_pipeline(seed: int) -> str:
    """Return a pipeline that leaves the function as it is, in text form."""
    draw = random.Random(seed)
    steps = [draw.choice(EXACT)(draw) for _ in range(draw.randint(1, 3))]
    return ",".join(steps)


def pipeline(seed: int) -> str:
    """Return a valid pipeline in text form, calibrated first."""
    draw = random.Random(seed)
    steps = [draw.choice(EXACT + APPROXIMATE)(draw) for _ in range(draw.randint(1, 3))]
    return ",".join(["calibrate{effects=8,patches=200,holdout=true}", *steps])
