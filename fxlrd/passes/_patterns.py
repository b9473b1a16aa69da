"""What the rewrites of `merge` look for: chains of affine operations, and what is beside a k×k conv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx, nn

from fxlrd.graph.channels import MERGEABLE
from fxlrd.graph.facts import shape
from fxlrd.graph.operations import ELEMENTWISE_MODULES
from fxlrd.graph.surgery import source
from fxlrd.graph.values import MERGEABLE_NORMS
from fxlrd.layers.absorbed import IDENTITIES
from fxlrd.layers.kinds import kernel_area

_IDENTITIES = (*IDENTITIES, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
"""The modules that pass their input on in eval mode."""


@dataclass(frozen=True)
class Chain:
    """A layer's call, the calls of identities and BatchNorms after it, and the layer that follows those, if one does.

    Every call but the last has the next one as its only user.
    """

    first: fx.Node
    between: tuple[fx.Node, ...]
    norms: tuple[fx.Node, ...]
    second: fx.Node | None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All calls of the chain."""
        return (self.first, *self.between, *(() if self.second is None else (self.second,)))


def affine_chain(gm: fx.GraphModule, first: fx.Node) -> Chain:
    """Return the chain of affine operations that starts with a layer's call."""
    between: list[fx.Node] = []
    linear = isinstance(gm.get_submodule(str(first.target)), nn.Linear)
    second, node = None, first
    while second is None and len(node.users) == 1:
        (user,) = node.users
        module = gm.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, MERGEABLE):
            second = user
        elif module is not None and (type(module) in _IDENTITIES or _is_affine_norm(module, node, linear)):
            between.append(user)
            node = user
        else:
            break
    norms = [n for n in between if type(gm.get_submodule(str(n.target))) in MERGEABLE_NORMS]
    return Chain(first, tuple(between), tuple(norms), second)


def _is_affine_norm(module: nn.Module, node: fx.Node, linear: bool) -> bool:
    """Whether the module is a BatchNorm of fixed statistics over the channels that the layer before it makes."""
    if type(module) not in MERGEABLE_NORMS or module.running_mean is None:
        return False
    sizes = shape(node)
    # On (N, L, C) a BatchNorm1d counts L as channels.
    return not linear or (sizes is not None and len(sizes) == 2)


@dataclass(frozen=True)
class Side:
    """A plain 1×1 conv beside a k×k conv, and the BatchNorms, then activations between them, in graph order."""

    conv: fx.Node
    between: tuple[fx.Node, ...]


def previous(node: fx.Node) -> fx.Node | None:
    """Return the node that this one reads, if no other does."""
    read = source(node)
    return read if read is not None and len(read.users) == 1 else None


def following(node: fx.Node) -> fx.Node | None:
    """Return the node that reads this one, if it is the only one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def side(gm: fx.GraphModule, node: fx.Node, step: Callable[[fx.Node], fx.Node | None]) -> Side | None:
    """Return the side of a k×k conv that ``step`` leads to, or None where it is anything else."""
    between: list[fx.Node] = []
    current = step(node)
    while current is not None and current.op == "call_module":
        module = gm.get_submodule(str(current.target))
        if isinstance(module, nn.Conv2d):
            plain = kernel_area(module) == 1 and module.groups == 1 and module.padding in ((0, 0), "valid")
            ordered = between if step is following else between[::-1]
            return Side(current, tuple(ordered)) if plain and _norms_come_first(gm, ordered) else None
        between.append(current)
        current = step(current)
    return None


def _norms_come_first(gm: fx.GraphModule, between: list[fx.Node]) -> bool:
    """Whether there are BatchNorms of fixed statistics, then activations, and nothing else."""
    modules = [gm.get_submodule(str(n.target)) for n in between]
    while modules and type(modules[0]) is nn.BatchNorm2d and modules[0].running_mean is not None:
        modules.pop(0)
    return all(type(m) in ELEMENTWISE_MODULES for m in modules)
