"""merge, mode exact: neighbours with only affine operations between become one layer, where that costs less.

    1×1 ∘ 1×1,  1×1 into k×k,  k×k into 1×1,  linear ∘ linear;  with ``norms`` also conv–BN

with BatchNorm in eval mode, dropout or nothing between. For layers W₁·x + b₁ and W₂·x + b₂, and a BatchNorm
g·y + h after the first,

    W = W₂·(g·W₁),    b = W₂·(g·b₁ + h) + b₂

where of two convs at most one has k×k positions and W₂·W₁ is a product for each of them. A constant before a
zero-padded k×k conv is refused: the padding does not contain it, so the border would differ.

Exact in eval mode. The cost of a layer is its number of weights times the positions that it is applied at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import fx, nn

from fxlrd.errors import Reason
from fxlrd.graph.channels import MERGED, MERGED_NORMS
from fxlrd.graph.facts import FACTORS, provenance, shape
from fxlrd.graph.guards import matches, replaceable, skip_reason
from fxlrd.graph.surgery import calls, layers, source
from fxlrd.layers.compose import affine, composed, scaled, why_not_composable
from fxlrd.layers.kinds import as_layer
from fxlrd.passes._merging import UNMERGED, is_shared, original_name, put_merged
from fxlrd.passes.contract import Site, Skip
from fxlrd.passes.driver import Run

_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
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


@dataclass(frozen=True)
class Compose:
    """The rewrite, with the options of `Merge` that it reads."""

    skip: tuple[str, ...]
    norms: bool

    def rewrite(self, run: Run) -> None:
        """Compose until nothing does any more: a composed layer may compose with its neighbours too."""
        sites = -1
        while sites < len(run.sites):
            sites = len(run.sites)
            run.skipped.clear()  # only the last round says what stays
            run.each(layers(run.gm), partial(self._visit, run.gm, replaceable(run.gm, norms=True)))

    def _visit(self, gm: fx.GraphModule, guards: Mapping[str, Reason | None], name: str) -> Site | Skip | None:
        """Compose the layer with what follows it; None where nothing affine does."""
        chain = _chain(gm, calls(gm, name)[0])
        absorbs = self.norms and bool(chain.norms)
        if chain.second is None and not absorbs:
            return None
        if (reason := self._why_not(gm, chain, guards)) is not None:
            return Skip(original_name(chain.first), reason)
        module = gm.get_submodule(name)
        for norm in chain.norms:
            module = scaled(module, *affine(gm.get_submodule(str(norm.target))))
        one = None if chain.second is None else _composed(gm, module, chain.first, chain.second)
        if chain.second is not None and isinstance(one, nn.Module):
            return _replace_both(gm, chain, chain.second, one)
        if absorbs:
            return _absorb(gm, chain, module)
        assert isinstance(one, Reason)
        return Skip(original_name(chain.first), one)

    def _why_not(self, gm: fx.GraphModule, chain: Chain, guards: Mapping[str, Reason | None]) -> Reason | None:
        """Return why the modules of a chain must stay as they are, if they must."""
        if not isinstance(gm.get_submodule(str(chain.first.target)), MERGED):
            return UNMERGED
        for node in chain.nodes:
            name = str(node.target)
            reason, pattern = guards[name], matches(name, self.skip)
            if reason is None and pattern is not None:
                reason = skip_reason(pattern)
            if reason is not None:
                return reason.at(name)
            if is_shared(gm, node):
                return Reason("called-again", f"{name} is called more than once")
        return None


def _chain(gm: fx.GraphModule, first: fx.Node) -> Chain:
    """Return the chain of affine operations that starts with a layer's call."""
    between: list[fx.Node] = []
    linear = isinstance(gm.get_submodule(str(first.target)), nn.Linear)
    second, node = None, first
    while second is None and len(node.users) == 1:
        (user,) = node.users
        module = gm.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, MERGED):
            second = user
        elif module is not None and (type(module) in _IDENTITIES or _is_affine_norm(module, node, linear)):
            between.append(user)
            node = user
        else:
            break
    norms = [n for n in between if type(gm.get_submodule(str(n.target))) in MERGED_NORMS]
    return Chain(first, tuple(between), tuple(norms), second)


def _is_affine_norm(module: nn.Module, node: fx.Node, linear: bool) -> bool:
    """Whether the module is a BatchNorm of fixed statistics over the channels that the layer before it makes."""
    if type(module) not in MERGED_NORMS or module.running_mean is None:
        return False
    sizes = shape(node)
    # On (N, L, C) a BatchNorm1d counts L as channels.
    return not linear or (sizes is not None and len(sizes) == 2)


def _composed(gm: fx.GraphModule, module: nn.Module, first: fx.Node, second: fx.Node) -> nn.Module | Reason:
    """Return the one layer that does what ``module`` and the layer ``second`` after it do, or why there is none."""
    other = gm.get_submodule(str(second.target))
    shift = as_layer(module).bias
    reason = why_not_composable(module, other, shift is not None and bool(shift.count_nonzero()))
    if reason is not None:
        return reason
    one = composed(module, other)
    cost = _cost(module, first) + _cost(other, second)
    if _cost(one, second) < cost:
        return one
    return Reason("costs-more", f"one layer in the place of it and {second.target} would cost more")


def _cost(module: nn.Module, node: fx.Node) -> int:
    """Return a layer's number of weights times the positions that the node applies it at."""
    sizes = shape(node) or ()
    return as_layer(module).weight.numel() * (math.prod(sizes[2:]) if len(sizes) == 4 else 1)


def _replace_both(gm: fx.GraphModule, chain: Chain, second: fx.Node, one: nn.Module) -> Site:
    """Put one layer in the place of a chain: at the second layer's call, under its name."""
    name, start = original_name(chain.first), source(chain.first)
    assert start is not None
    second.replace_input_with(second.all_input_nodes[0], start)
    for node in reversed([chain.first, *chain.between]):
        _remove(gm, node)
    put_merged(gm, second, one)
    _relabel_factors(gm, {name, original_name(second)})
    return Site(name, True, f"composed into {second.target}")


def _absorb(gm: fx.GraphModule, chain: Chain, module: nn.Module) -> Site:
    """Put a layer that does what its BatchNorms did in the place of the layer and of those."""
    for norm in chain.norms:
        norm.replace_all_uses_with(norm.all_input_nodes[0])
        _remove(gm, norm)
    put_merged(gm, chain.first, module)
    return Site(original_name(chain.first), True, f"took in {', '.join(str(n.target) for n in chain.norms)}")


def _relabel_factors(gm: fx.GraphModule, names: set[str]) -> None:
    """Relabel the other factors of these layers as merged: they no longer factor a single layer."""
    for node in gm.graph.nodes:
        origin = provenance(node)
        if origin is not None and origin.name in names and origin.role in FACTORS:
            provenance.record(node, replace(origin, role="merged"))


def _remove(gm: fx.GraphModule, node: fx.Node) -> None:
    """Erase a call, and the module if nothing else calls it."""
    gm.graph.erase_node(node)
    if not calls(gm, str(node.target)):
        gm.delete_submodule(str(node.target))
