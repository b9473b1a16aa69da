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

import torch
from torch import fx, nn

from fxlrd.errors import Reason
from fxlrd.graph.channels import MERGEABLE
from fxlrd.graph.facts import FACTORS, entangle, output_moments, provenance, shape, statistics
from fxlrd.graph.guards import matches, skip_reason, why_not_replaceable
from fxlrd.graph.layer import origin
from fxlrd.graph.surgery import calls, layers, source
from fxlrd.layers.compose import affine, composed, scaled, why_not_composable
from fxlrd.layers.kinds import as_layer, kernel_area
from fxlrd.passes._merging import UNMERGED, is_shared, put_merged
from fxlrd.passes._patterns import Chain, affine_chain
from fxlrd.passes.contract import Site, Skip
from fxlrd.passes.driver import Run


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
            run.each(layers(run.gm), partial(self._visit, run.gm, why_not_replaceable(run.gm, norms=True)))

    def _visit(self, gm: fx.GraphModule, guards: Mapping[str, Reason | None], name: str) -> Site | Skip | None:
        """Compose the layer with what follows it; None where nothing affine does."""
        chain = affine_chain(gm, calls(gm, name)[0])
        absorbs = self.norms and bool(chain.norms)
        if chain.second is None and not absorbs:
            return None
        if (reason := self._why_not(gm, chain, guards)) is not None:
            return Skip(origin(chain.first), reason)
        module = gm.get_submodule(name)
        for norm in chain.norms:
            module = scaled(module, *affine(gm.get_submodule(str(norm.target))))
        if chain.second is not None:
            one = _composed(gm, module, chain.first, chain.second)
            if isinstance(one, nn.Module):
                return _replace_both(gm, chain, chain.second, one)
            if not absorbs:
                return Skip(origin(chain.first), one)
        return _absorb(gm, chain, module)

    def _why_not(self, gm: fx.GraphModule, chain: Chain, guards: Mapping[str, Reason | None]) -> Reason | None:
        """Return why the modules of a chain must stay as they are, if they must."""
        if not isinstance(gm.get_submodule(str(chain.first.target)), MERGEABLE):
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
    """Return a layer's number of weights times the positions of an image that the node applies it at.

    Linear layers that follow each other have as many positions each.
    """
    sizes = shape(node) or ()
    conv = not isinstance(module, nn.Linear) and len(sizes) == 4
    return as_layer(module).weight.numel() * (math.prod(sizes[2:]) if conv else 1)


def _replace_both(gm: fx.GraphModule, chain: Chain, second: fx.Node, one: nn.Module) -> Site:
    """Put one layer in the place of a chain: at the second layer's call, under its name."""
    name, start = origin(chain.first), source(chain.first)
    assert start is not None
    _record_statistics_of_both(gm, chain.first, second)
    second.replace_input_with(second.all_input_nodes[0], start)
    for node in reversed([chain.first, *chain.between]):
        _remove(gm, node)
    put_merged(gm, second, one, entangled=True)
    _relabel_factors(gm, {name, origin(second)})
    return Site(name, True, f"composed into {second.target}")


def _absorb(gm: fx.GraphModule, chain: Chain, module: nn.Module) -> Site:
    """Put a layer that does what its BatchNorms did in the place of the layer and of those."""
    _record_statistics_with_norms(gm, chain)
    for norm in chain.norms:
        norm.replace_all_uses_with(norm.all_input_nodes[0])
        _remove(gm, norm)
    put_merged(gm, chain.first, module, entangled=True)
    entangle(gm, origin(chain.first))
    return Site(origin(chain.first), True, f"took in {', '.join(str(n.target) for n in chain.norms)}")


def _record_statistics_of_both(gm: fx.GraphModule, first: fx.Node, second: fx.Node) -> None:
    """Let the one layer at ``second`` have the input's moments of the first one; nothing where those are not known.

    What is measured of a factor is that of its whole layer.
    """
    measured = statistics(first)
    made = statistics(second)
    recorded = [p.role for node in (first, second) if (p := provenance(node)) is not None]
    if measured is None or made is None or any(role in FACTORS for role in recorded):
        statistics.drop(second)
        return
    patches = measured.patch_moments if kernel_area(gm.get_submodule(str(second.target))) == 1 else None
    statistics.record(
        second, replace(made, input_moments=measured.input_moments, patch_moments=patches, called=measured.called)
    )


def _record_statistics_with_norms(gm: fx.GraphModule, chain: Chain) -> None:
    """Let a layer have the moments of what its BatchNorms made, and Γ of that: Γ / (g·gᵀ), 0 where g is."""
    made = output_moments(chain.norms[-1])
    if made is None:
        output_moments.drop(chain.first)
    else:
        output_moments.record(chain.first, made)
    measured = statistics(chain.first)
    if measured is None or measured.importance is None:
        return
    scales = [affine(gm.get_submodule(str(norm.target)))[0] for norm in chain.norms]
    scale = torch.stack(scales).prod(0)
    made_of_one = torch.outer(scale, scale).to(measured.importance)
    importance = torch.where(made_of_one == 0, 0.0, measured.importance / made_of_one)
    statistics.record(chain.first, replace(measured, importance=importance))


def _relabel_factors(gm: fx.GraphModule, names: set[str]) -> None:
    """Relabel the other factors of these layers as merged: they no longer factor a single layer."""
    for node in gm.graph.nodes:
        recorded = provenance(node)
        if recorded is not None and recorded.name in names:
            if recorded.role in FACTORS:
                recorded = replace(recorded, role="merged")
                statistics.drop(node)  # those of the whole layer
            provenance.record(node, replace(recorded, entangled=True))


def _remove(gm: fx.GraphModule, node: fx.Node) -> None:
    """Erase a call, and the module if nothing else calls it."""
    gm.graph.erase_node(node)
    if not calls(gm, str(node.target)):
        gm.delete_submodule(str(node.target))
