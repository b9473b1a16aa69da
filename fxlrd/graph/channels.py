"""Which nodes share one set of channels: producers, the operations between that treat each channel alone, consumers.

Keeping some of a tensor's channels commutes with every operation that acts on each channel alone. A `Group` is
everything that has to be cut together: the layers that make the channels, the per-channel parameters on the way
(BatchNorm, depthwise conv, PReLU), and the layers that read them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxlrd.errors import Reason
from fxlrd.graph.facts import shape
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.kinds import op

ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
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
MERGED = (nn.Conv2d, nn.Linear)
"""The layers whose channels are cut."""
MERGED_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
"""The BatchNorms that can stand between such layers: none of three dimensions."""


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the group's channels from ``seen``; each channel is ``block`` features of its input."""

    node: fx.Node
    seen: fx.Node
    block: int = 1


@dataclass
class Group:
    """Nodes that share C ``channels``: what makes them, what has parameters for each, what reads them."""

    channels: int
    producers: list[fx.Node] = field(default_factory=list)
    through: list[fx.Node] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)


def is_flatten(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node flattens everything but the batch, so that each channel becomes a run of features."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    if node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
        return (*node.args[1:], *node.kwargs.values()) in ((1,), (1, -1))
    if node.op == "call_method" and node.target in ("view", "reshape") and len(node.args) == 3:
        batch, rest = node.args[1:]  # x.view(x.size(0), -1)
        return bool(rest == -1) and isinstance(batch, fx.Node) and _is_batch_size(batch)
    return False


def flattened(gm: fx.GraphModule, node: fx.Node) -> int:
    """Return how many features of the node's value make up one channel of the tensor that was flattened into it.

    1 where nothing was flattened. Elementwise operations may lie between.
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
        return node.target in ELEMENTWISE_FUNCTIONS or (node.target in ARITHMETIC and not _two_tensors(node))
    return node.op == "call_method" and node.target in ELEMENTWISE_METHODS


def _is_batch_size(node: fx.Node) -> bool:
    """Whether the node is ``x.size(0)`` or ``x.shape[0]``."""
    if node.op == "call_method":
        return node.target == "size" and (*node.args[1:], *node.kwargs.values()) == (0,)
    return node.target is operator.getitem and node.args[1:] == (0,) and _is_shape(node.args[0])


def _is_shape(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is getattr and node.args[1:] == ("shape",)


def _reads_only_batch(node: fx.Node) -> bool:
    return _is_batch_size(node) or (_is_shape(node) and all(_is_batch_size(user) for user in node.users))


class _Mixes(Exception):
    """The walk met something that does not treat each channel alone."""

    def __init__(self, code: str, text: str, remedy: str = "") -> None:
        super().__init__(text)
        self.reason = Reason(code, text, remedy)


def group(gm: fx.GraphModule, producer: fx.Node, replaceable: Mapping[str, Reason | None]) -> Group | Reason:
    """Return the group of the channels that layer call ``producer`` makes, or why it has none.

    ``replaceable`` names the layers that must not be replaced, with the reason (`fxlrd.graph.guards.replaceable`).
    """
    walk = _Walk(gm, producer, replaceable)
    try:
        walk.backward(producer)
    except _Mixes as stop:
        return stop.reason
    if not walk.found.consumers:
        return Reason("unread", "no layer reads its output")
    return walk.found


class _Walk:
    def __init__(self, gm: fx.GraphModule, producer: fx.Node, replaceable: Mapping[str, Reason | None]) -> None:
        self.gm = gm
        self.replaceable = replaceable
        self.layers = layers(gm)
        module = self.layers[str(producer.target)]
        self.linear = isinstance(module, nn.Linear)
        self.found = Group(_out_channels(module))
        self.visited: set[fx.Node] = set()

    def backward(self, node: fx.Node) -> None:
        """Take in a node whose value carries the channels, what made it, and all its users."""
        if node in self.visited:
            return
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if str(node.target) in self.layers and module is not None and not self._depthwise(module):
            self._take_producer(node, module)
            self.forward(node, 1)
        elif self._alone(node, 1) and node.all_input_nodes:
            self.backward(node.all_input_nodes[0])
        else:
            text = f"its output meets {_name(node)}, which no layer of {self.found.channels} channels feeds"
            raise _Mixes("mixed", text)

    def forward(self, node: fx.Node, block: int) -> None:
        """Follow the channels from ``node`` to the layers that read them."""
        if node in self.visited:
            return
        self.visited.add(node)
        for user in node.users:
            if user in self.visited or _reads_only_batch(user):
                continue
            if user.op == "output":
                raise _Mixes("model-output", "its output is an output of the model")
            module = self.gm.get_submodule(str(user.target)) if user.op == "call_module" else None
            if str(user.target) in self.layers and module is not None and not self._depthwise(module):
                self._take_consumer(user, node, module, block)
            elif is_flatten(self.gm, user) and not self.linear and block == 1:
                self.forward(user, self._features(node) if self._dims(node) > 2 else 1)
            elif user.target in PRODUCTS and _two_tensors(user):
                if block > 1:
                    raise _Mixes("product-after-flatten", f"{_name(user)} multiplies it after it is flattened")
                self.visited.add(user)
                for operand in user.all_input_nodes:
                    self.backward(operand)
                self.visited.discard(user)
                self.forward(user, block)
            elif user.target in SUMS and _two_tensors(user):
                raise _Mixes("residual", f"its output joins a residual at {_name(user)}")
            elif self._alone(user, block):
                if module is not None and module.state_dict():
                    self._take_through(user)
                self.forward(user, block)
            else:
                raise _Mixes("mixed", f"{_name(user)} does not treat each channel alone")

    def _alone(self, node: fx.Node, block: int) -> bool:
        """Whether the operation acts on each channel by itself."""
        if is_elementwise(self.gm, node):
            return True
        if block > 1:
            return False
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            if isinstance(module, nn.PReLU):
                return module.num_parameters in (1, self.found.channels) and not (self.linear and self._dims(node) > 2)
            if type(module) in MERGED_NORMS:
                # On (N, L, C) a BatchNorm1d counts L as channels.
                return not (self.linear and self._dims(node) > 2)
            return not self.linear and (type(module) in POOLING_MODULES or self._depthwise(module))
        if node.target in (torch.mean, "mean"):
            return self._spatial_mean(node)
        return not self.linear and node.target in POOLING_FUNCTIONS

    def _spatial_mean(self, node: fx.Node) -> bool:
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return not self.linear and isinstance(dims, (list, tuple)) and sorted(d % 4 for d in dims) == [2, 3]

    def _depthwise(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1

    def _take_producer(self, node: fx.Node, module: nn.Module) -> None:
        self._check_type(node, module)
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            raise _Mixes("grouped", f"{node.target} has groups={module.groups}: its outputs cannot be cut one by one")
        if _out_channels(module) != self.found.channels or isinstance(module, nn.Linear) != self.linear:
            raise _Mixes("other-channels", f"{node.target} makes other channels that are multiplied in")
        self._check(node)
        if node not in self.found.producers:
            self.found.producers.append(node)

    def _take_consumer(self, node: fx.Node, seen: fx.Node, module: nn.Module, block: int) -> None:
        self._check_type(node, module)
        conv = isinstance(module, nn.Conv2d)
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            raise _Mixes("grouped", f"{node.target} reads it with groups={module.groups}")
        if (conv and self.linear) or (not self.linear and self._dims(seen) != (4 if conv else 2)):
            raise _Mixes("other-axis", f"{node.target} reads it along another axis than the channels")
        self._check(node)
        self.found.consumers.append(Consumer(node, seen, block))

    def _take_through(self, node: fx.Node) -> None:
        self._check(node)
        if node not in self.found.through:
            self.found.through.append(node)

    def _check_type(self, node: fx.Node, module: nn.Module) -> None:
        if not isinstance(module, MERGED):
            raise _Mixes("layer-type", f"{node.target} is a {op(module)}: only Conv2d and Linear layers are merged")

    def _check(self, node: fx.Node) -> None:
        target = str(node.target)
        reason = self.replaceable.get(target)
        if reason is not None:
            raise _Mixes(reason.code, reason.at(target).text, reason.remedy)
        if len(calls(self.gm, target)) > 1:
            raise _Mixes("called-again", f"{target} is called more than once")

    def _dims(self, node: fx.Node) -> int:
        return len(_shape(node))

    def _features(self, node: fx.Node) -> int:
        return math.prod(_shape(node)[2:])


def _shape(node: fx.Node) -> tuple[int, ...]:
    sizes = shape(node)
    if sizes is None:
        raise _Mixes("no-shapes", "shapes are not known", "give example inputs")
    return sizes


def _out_channels(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else int(module.out_channels)  # type: ignore[arg-type]


def _two_tensors(node: fx.Node) -> bool:
    return len([a for a in node.args if isinstance(a, fx.Node)]) == 2


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
