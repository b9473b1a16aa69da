"""Which operations act on each entry, or on each channel, of a tensor by itself."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxlrd.graph.facts import shape
from fxlrd.layers.absorbed import IDENTITIES

ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    *IDENTITIES, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Hardtanh,
    nn.Hardsigmoid, nn.Hardswish, nn.Threshold,
)  # fmt: skip
POOLING_MODULES: tuple[type[nn.Module], ...] = (
    nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.sigmoid, F.logsigmoid, F.tanh,
    F.softplus, F.softsign, F.hardtanh, F.hardsigmoid, F.hardswish, F.dropout, F.relu_, torch.relu, torch.relu_,
    F.dropout2d, torch.sigmoid, torch.tanh, torch.exp, torch.square, torch.abs, torch.clamp, torch.clone,
}  # fmt: skip
ELEMENTWISE_METHODS = {
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp", "clamp_", "contiguous", "abs", "square",
    "exp", "float", "clone", "detach",
}  # fmt: skip
POOLING_FUNCTIONS = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate}
PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply}
SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub}
ARITHMETIC = PRODUCTS | SUMS | {operator.truediv, operator.itruediv, torch.div}


def is_flatten(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node flattens everything but the batch, so that each channel becomes a run of features."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
        return (*node.args[1:], *node.kwargs.values()) in ((1,), (1, -1))
    if node.op == "call_method" and node.target in ("view", "reshape") and len(node.args) == 3:
        batch, rest = node.args[1:]  # x.view(x.size(0), -1)
        return bool(rest == -1) and isinstance(batch, fx.Node) and _is_batch_size(batch)
    return False


def features_per_channel(gm: fx.GraphModule, node: fx.Node) -> int:
    """Return how many features of the node's value make up one channel of the tensor that was flattened into it.

    1 where nothing was flattened. Elementwise operations may follow the flatten.
    """
    while is_elementwise(gm, node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if not is_flatten(gm, node):
        return 1
    sizes = shape(node.all_input_nodes[0]) or ()
    return math.prod(sizes[2:]) if len(sizes) == 4 else 1


def is_elementwise(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the operation computes each entry of its output from the same entry of one input."""
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))) in ELEMENTWISE_MODULES
    if node.op == "call_function":
        return node.target in ELEMENTWISE_FUNCTIONS or (node.target in ARITHMETIC and not takes_two_tensors(node))
    return node.op == "call_method" and node.target in ELEMENTWISE_METHODS


def _is_batch_size(node: fx.Node) -> bool:
    """Whether the node is ``x.size(0)`` or ``x.shape[0]``."""
    if node.op == "call_method":
        return node.target == "size" and (*node.args[1:], *node.kwargs.values()) == (0,)
    return node.target is operator.getitem and node.args[1:] == (0,) and _is_shape(node.args[0])


def _is_shape(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is getattr and node.args[1:] == ("shape",)


def reads_only_batch_size(node: fx.Node) -> bool:
    """Whether all that the node takes of its input is the size of the batch."""
    return _is_batch_size(node) or (_is_shape(node) and all(_is_batch_size(user) for user in node.users))


def takes_two_tensors(node: fx.Node) -> bool:
    """Whether two of the arguments are values of the graph."""
    return len([a for a in node.args if isinstance(a, fx.Node)]) == 2
