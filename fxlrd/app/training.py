"""--finetune: training of a compressed model on the user's examples."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxlrd.app.evaluation import scores_on
from fxlrd.app.examples import Examples, Shuffled
from fxlrd.errors import FxlrdError
from fxlrd.finetuning import finetune
from fxlrd.training.checkpoint import Epoch

_SGD, _ADAM = 0.005, 1e-4
"""Learning rates of models with BatchNorm, and of others."""


class _Scores(nn.Module):
    """A model whose forward takes tensors in order, as training has them, and returns scores alone."""

    def __init__(self, model: nn.Module, where: str, names: tuple[str, ...], constants: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.where = where
        self.names = names
        self.constants = constants

    def forward(self, *values: Tensor) -> Tensor:
        if not self.names:
            return scores_on(self.where, self.model, values)
        named = dict(zip(self.names, values, strict=True))
        return scores_on(self.where, self.model, {**named, **self.constants})


class _Pairs:
    """Pairs of inputs and targets; the targets of running text are its own tokens."""

    def __init__(self, batches: Shuffled) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for inputs, labels in self.batches:
            values = (
                tuple(v for v in inputs.values() if isinstance(v, Tensor)) if isinstance(inputs, dict) else (inputs,)
            )
            tensors = tuple(value for value in values if isinstance(value, Tensor))
            yield tensors, labels if self.batches.examples.labels else inputs["input_ids"]


def train(
    model: nn.Module, original: nn.Module, examples: Examples, size: int, options: argparse.Namespace
) -> list[Epoch]:
    """Train a compressed model in place, on labelled examples or on running text.

    Models with BatchNorm are trained by SGD with momentum, others by AdamW. Raises FxlrdError as `fxlrd.finetune` does.
    """
    first, _ = next(iter(examples.batches(1)))
    names: tuple[str, ...] = ()
    constants: dict[str, Any] = {}
    if isinstance(first, dict):
        names = tuple(name for name, value in first.items() if isinstance(value, Tensor))
        constants = {name: value for name, value in first.items() if name not in names}
    has_statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    lr = options.lr if options.lr is not None else _SGD if has_statistics else _ADAM
    labelled = bool(examples.labels)
    return finetune(
        _Scores(model, examples.where, names, constants),
        _Pairs(Shuffled(examples, size)),
        epochs=1 if options.epochs is None else options.epochs,
        lr=lr,
        optimizer=None if has_statistics else lambda ps: torch.optim.AdamW(ps, lr, weight_decay=0.01),
        loss=F.cross_entropy if labelled else _next_token,
        teacher=_Scores(original, examples.where, names, constants) if options.distill else None,
        distill=options.distill or 0.0,
        seed=options.seed,
    )


def check_training(options: argparse.Namespace) -> None:
    """Raise FxlrdError, before the work instead of after it, for options out of range."""
    if options.epochs is not None and options.epochs < 1:
        raise FxlrdError(f"--epochs {options.epochs}: at least one is needed")
    if options.lr is not None and not 0 < options.lr < math.inf:
        raise FxlrdError(f"--lr {options.lr}: a learning rate is a finite number above 0")
    if options.distill is not None and not 0 <= options.distill <= 1:
        raise FxlrdError(f"--distill {options.distill}: a weight is between 0 and 1")


def check_trainable(model: nn.Module, examples: Examples, distill: float | None) -> None:
    """Raise FxlrdError for examples that say nothing to learn, and for weights too coarse for small steps."""
    where = f"--finetune {examples.where}"
    if examples.noun == "sequences" and distill:
        raise FxlrdError(f"{where}: --distill is for classifiers; leave it out")
    if examples.noun != "sequences" and not examples.labels:
        fields = "" if examples.noun == "images" else ", or .jsonl or .csv with fields text and label"
        raise FxlrdError(f"{where}: its {examples.noun} have no classes: put them into a folder for each{fields}")
    if examples.noun != "sequences" and len(set(examples.labels)) == 1:
        raise FxlrdError(f"{where}: all {examples.noun} are of one class: at least two are needed")
    coarse = {p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    if coarse:
        raise FxlrdError(f"--finetune: small steps are lost in {str(coarse.pop())[6:]}: give --dtype float32")


def _next_token(scores: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
