"""Magnitude pruning of whole channels by torch-pruning (``pip install -e '.[bench]'``): the peer of other kind."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def pruned(model: nn.Module, x: Tensor, removed: float, ignored: Sequence[nn.Module]) -> nn.Module:
    """Return a copy without the channels of least magnitude, the same share of each group of coupled layers.

    Outputs of the layers in ``ignored`` keep their channels.
    """
    import torch_pruning

    counterparts = dict(zip(model.modules(), (copied := copy.deepcopy(model)).modules(), strict=True))
    pruner = torch_pruning.pruner.MagnitudePruner(
        copied,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=removed,
        ignored_layers=[counterparts[module] for module in ignored],
        round_to=8,
    )
    pruner.step()
    return copied.to(memory_format=torch.channels_last)
