"""Every model of torchvision.models.list_models() but the quantized ones.

Weights are random, seeded, and the examples about as small as the model takes.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torchvision import models

from fxlrd.graph.inputs import Inputs
from fxlrd.layers.kinds import LAYERS

_SMALL = {"min_size": 128, "max_size": 128}
EXAMPLES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "raft_*": ({}, (1, 3, 128, 128)),
    "ssd*": ({}, (3, 128, 128)),  # these scale to the size that they are made for
    "*rcnn_*": (_SMALL, (3, 128, 128)),
    "fcos_*": (_SMALL, (3, 128, 128)),
    "retinanet_*": (_SMALL, (3, 128, 128)),
    "s3d": ({}, (1, 3, 14, 224, 224)),  # the last pooling takes 2×7×7
    "mvit_*": ({}, (1, 3, 16, 224, 224)),  # positions are learned for this size
    "swin3d_*": ({}, (1, 3, 4, 64, 64)),
    "mc3_18": ({}, (1, 3, 4, 32, 32)),
    "r*d_18": ({}, (1, 3, 4, 32, 32)),
    "vit_h_14": ({"image_size": 56}, (1, 3, 56, 56)),
    "vit_*": ({"image_size": 64}, (1, 3, 64, 64)),
    "maxvit_t": ({}, (1, 3, 224, 224)),  # partitions of 7 at every stage
    "inception_v3": ({}, (1, 3, 75, 75)),
    "*": ({}, (1, 3, 64, 64)),
}
"""Name or glob, the first that fits: the builder's options, and the shape of an input."""


def names() -> list[str]:
    """Return the names of the models."""
    return [n for n in models.list_models() if not n.startswith("quantized")]


def parameters(name: str) -> int:
    """Return the number of a model's parameters, without building it."""
    return int(next(iter(models.get_model_weights(name))).meta["num_params"])


def build(name: str) -> nn.Module:
    """Return a model with seeded random weights in eval mode."""
    options, _ = _example(name)
    # Detectors and segmenters would fetch a backbone's weights unless told not to.
    backbone = {"weights_backbone": None} if name in _with_backbone() else {}
    quiet = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # they warn of it otherwise
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, **backbone, **quiet, **options)
    # Some start with branches, or the last layer, at nothing or nearly so: no error would show. Larger weights, as for
    # ReLU, make EfficientNets so chaotic that rounding alone moves their outputs.
    for module in model.modules():
        if isinstance(module, LAYERS):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if isinstance(getattr(module, "layer_scale", None), nn.Parameter):
            nn.init.ones_(module.layer_scale)
    return model.eval()


def inputs(name: str) -> Inputs:
    """Return seeded inputs: one image, clip or pair of images; detectors take a list of images between 0 and 1."""
    _, shape = _example(name)
    generator = torch.Generator().manual_seed(0)
    if name in models.list_models(models.detection):
        return Inputs(([torch.rand(shape, generator=generator)],))
    number = 2 if name in models.list_models(models.optical_flow) else 1
    return Inputs(tuple(torch.randn(shape, generator=generator) for _ in range(number)))


def _example(name: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    return next(example for pattern, example in EXAMPLES.items() if fnmatch(name, pattern))


def _with_backbone() -> list[str]:
    return models.list_models(models.detection) + models.list_models(models.segmentation)
