"""The checkpoint that finetune() writes after each epoch, and resumes from."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from fxlrd.errors import FxlrdError, one_line

_FORMAT = 1


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number from 0, the mean loss over all examples, its duration in seconds, the number of parameters
    that were trained, and the value of ``evaluate``.
    """

    epoch: int
    loss: float
    seconds: float
    trained: int
    metric: float | None = None


def save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], history: list[Epoch]
) -> None:
    """Replace the checkpoint atomically: the file is the old one or the new one, never a part of it."""
    content = {
        "format": _FORMAT,
        "settings": tree_map(_plain, settings),
        "model": model.state_dict(),
        "optimizer": tree_map(_plain, optimizer.state_dict()),
        "history": tree_map(_plain, [vars(epoch) for epoch in history]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        torch.save(content, scratch)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def resume(
    path: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    device: torch.device,
) -> list[Epoch]:
    """Load the checkpoint into model and optimizer, if the file exists, and return the epochs in it."""
    if path is None or not path.exists():
        return []
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        saved = content["settings"]
    except Exception as error:
        raise FxlrdError(
            f"finetune: {path} is not a checkpoint of finetune ({type(error).__name__}): remove it"
        ) from error
    if content["format"] != _FORMAT or saved != settings:
        raise FxlrdError(f"finetune: {path} has other settings ({saved}): remove it, or train with those")
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:  # what torch raises for other names, shapes or groups
        reason = "is of another model, or trains other parameters of it"
        raise FxlrdError(f"finetune: {path} {reason}: remove it ({one_line(error)})") from error
    return [Epoch(**fields) for fields in content["history"]]


def _plain(value: Any) -> Any:
    """Return a number of numpy's, such as a learning rate, as one of Python's: others are refused when it is read."""
    return value.item() if isinstance(value, np.generic) else value
