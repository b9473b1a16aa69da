"""How long the layers of a channel group take when r of its channels are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxlrd.graph.channels import Group
from fxlrd.graph.facts import tensor_meta
from fxlrd.graph.surgery import source
from fxlrd.layers.build import resized
from fxlrd.layers.kinds import LAYERS, ConvOrLinear, as_layer, channel_axis
from fxlrd.timing.cache import Cache, Setting, example, layout, signature
from fxlrd.timing.clock import Timing, compare
from fxlrd.timing.inductor import compiled


def time_group(
    gm: fx.GraphModule, whole: Group, ranks: Sequence[int], under_inductor: bool, seconds: float, cached: bool = True
) -> dict[str, Timing]:
    """Time the group's producers, depthwise convs and consumers together at each number of kept channels.

    Ratios are to the first of ``ranks``. Weights are arbitrary; shapes are those on the nodes, which must be known.
    What the timing cache holds is not timed again.
    """
    parts: list[tuple[fx.Node, str | int]] = [
        *((n, "out") for n in whole.producers),
        *((n, "both") for n in whole.through if isinstance(gm.get_submodule(str(n.target)), LAYERS)),
        *((c.node, c.block) for c in whole.consumers),
    ]
    texts = []
    for node, _ in parts:
        module, meta = as_layer(gm.get_submodule(str(node.target))), _input(node)
        texts.append(signature(module, tuple(_shape(module, meta)), meta.dtype, layout(meta)))
    device = next(gm.get_submodule(str(whole.producers[0].target)).parameters()).device
    setting, key = Setting.here(device, under_inductor), "merged: " + " + ".join(texts)
    cache = Cache() if cached else None
    found = cache.load(setting, key) if cache is not None else {}
    wanted = [str(r) for r in ranks]
    if all(name in found for name in wanted):
        return found
    with torch.no_grad():
        calls = {str(r): _together([_cut(gm, n, how, r) for n, how in parts], under_inductor) for r in ranks}
        found = compare(calls, device, seconds=seconds)
    if cache is not None:
        cache.store(setting, key, found)
    return found


def _cut(gm: fx.GraphModule, node: fx.Node, how: str | int, rank: int) -> tuple[nn.Module, Tensor]:
    """Return a layer that makes ("out") or reads (block features each) ``rank`` channels, and an input for it."""
    module, meta = as_layer(gm.get_submodule(str(node.target))), _input(node)
    shape, weight, groups = _shape(module, meta), module.weight, None
    count, width = weight.shape[:2]
    if how == "out":
        count = rank
    elif how == "both":
        count = groups = rank
    else:
        width = rank * int(how)
    if how != "out":
        shape[channel_axis(module, len(shape))] = rank if how == "both" else width
    arbitrary = torch.full((count, width, *weight.shape[2:]), 1e-2, dtype=weight.dtype, device=weight.device)
    bias = None if module.bias is None else arbitrary.flatten(1)[:, 0]
    x = example(tuple(shape), meta.dtype, layout(meta), weight.device)
    return resized(module, arbitrary, bias, groups).eval(), x


def _together(parts: list[tuple[nn.Module, Tensor]], under_inductor: bool) -> Callable[[], object]:
    calls = [(compiled(nn.Sequential(m)) if under_inductor else m, x) for m, x in parts]
    return lambda: [call(x) for call, x in calls]


def _input(node: fx.Node) -> TensorMetadata:
    given = source(node)
    meta = tensor_meta(given) if given is not None else None
    assert isinstance(meta, TensorMetadata), f"{node.target}: shapes are not known"
    return meta


def _shape(module: ConvOrLinear, meta: TensorMetadata) -> list[int]:
    """Return the input's shape with the channels that the layer reads by now: groups before may have cut some."""
    shape = list(meta.shape)
    shape[channel_axis(module, len(shape))] = module.weight.shape[1] * getattr(module, "groups", 1)
    return shape
