"""How long the layers of a channel group take when r of its channels are retained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxlrd.graph.channels import Group
from fxlrd.graph.facts import tensor_meta
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.surgery import source
from fxlrd.layers.kinds import LAYERS, ConvOrLinear, as_layer, channel_axis
from fxlrd.layers.weights import resized
from fxlrd.timing.cache import signature
from fxlrd.timing.clock import Timing
from fxlrd.timing.stopwatch import Stopwatch
from fxlrd.timing.workload import Workload, example, layout


@dataclass(frozen=True)
class Making:
    """How a layer is cut that makes the channels: in so many equal parts."""

    parts: int


def time_group(gm: fx.GraphModule, group: Group, ranks: Sequence[int], stopwatch: Stopwatch) -> dict[str, Timing]:
    """Time the group's producers, depthwise convs and consumers together at each number of retained channels.

    Ratios are to the first of ``ranks``. Weights are arbitrary. The nodes need shapes.
    """
    parts: list[tuple[fx.Node, str | int | Making]] = [
        *((producer.node, Making(producer.parts)) for producer in group.producers),
        *((node, "through") for node in group.through if isinstance(gm.get_submodule(str(node.target)), LAYERS)),
        *((consumer.node, consumer.block) for consumer in group.consumers),
    ]
    texts = [_text_of(gm, node, how) for node, how in parts]
    device = next(gm.get_submodule(str(group.producers[0].node.target)).parameters()).device

    def workload(rank: int) -> Workload:
        first = {text: _cut(gm, node, how, rank) for text, (node, how) in dict(zip(texts, parts, strict=True)).items()}
        return Workload([first[text] for text in texts], stopwatch.under_inductor, inside=True)

    key = f"channel group, ratios to {ranks[0]} channels: {' + '.join(texts)}"
    return stopwatch.times(key, device, {str(rank): partial(workload, rank) for rank in ranks})


def _text_of(gm: fx.GraphModule, node: fx.Node, how: str | int | Making) -> str:
    """Return what the time of a group's layer depends on: those of the same text are one layer to a clock."""
    module, meta = as_layer(gm.get_submodule(str(node.target))), _input(node)
    text = signature(module, tuple(_shape(module, meta)), meta.dtype, layout(meta))
    if isinstance(how, Making):
        return f"{text}, {how.parts} parts" if how.parts > 1 else text
    return f"{text}, {how}"


def _cut(gm: fx.GraphModule, node: fx.Node, how: str | int | Making, rank: int) -> tuple[nn.Module, Inputs]:
    """Return a layer that makes, passes on ("through") or reads ``rank`` channels, and its inputs.

    A number is that of the features that a reader has for each channel.
    """
    module, meta = as_layer(gm.get_submodule(str(node.target))), _input(node)
    shape, weight, groups = _shape(module, meta), module.weight, None
    count, width = weight.shape[:2]
    if isinstance(how, Making):
        count = rank * how.parts
    elif how == "through":
        count = groups = rank
    else:
        width = rank * int(how)
    if not isinstance(how, Making):
        shape[channel_axis(module, len(shape))] = rank if how == "through" else width
    arbitrary = torch.full((count, width, *weight.shape[2:]), 1e-2, dtype=weight.dtype, device=weight.device)
    bias = None if module.bias is None else arbitrary.flatten(1)[:, 0]
    x = example(tuple(shape), meta.dtype, layout(meta), weight.device)
    return resized(module, arbitrary, bias, groups).eval(), Inputs((x,))


def _input(node: fx.Node) -> TensorMetadata:
    reads = source(node)
    meta = tensor_meta(reads) if reads is not None else None
    assert meta is not None, f"{node.target} reads a value without a shape"
    return meta


def _shape(module: ConvOrLinear, meta: TensorMetadata) -> list[int]:
    """Return the input's shape with the channels that the layer reads now: earlier merges may have cut some."""
    shape = list(meta.shape)
    shape[channel_axis(module, len(shape))] = module.weight.shape[1] * getattr(module, "groups", 1)
    return shape
