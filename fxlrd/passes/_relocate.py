"""merge, mode relocate: the paper's Fig. 3, a k×k conv between two 1×1 convs moves into rank space.

Tucker-2 of the k×k conv, its outer factors folded into the 1×1 convs, with BN and activation applied to the ranks. With
U (r1×C) and V (S×r2) of the conv and BN(y) = g·y + h:

    1×1 ─ BN ─ act ─ k×k ─ BN ─ act ─ 1×1   →   U·g·1×1 ─ BN' ─ act ─ (Vᵀ·g·V)·core ─ BN' ─ act ─ 1×1·V

where each BN' starts at unit statistics with the shift U·h, Vᵀ·h. The ranks are those of the paper's eq. (7).

Approximate, and in need of fine-tuning: an activation does not commute with a change of basis, so that this is another
function even at full rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxlrd.errors import Reason
from fxlrd.factor.failures import check_finite
from fxlrd.factor.tucker import tucker2
from fxlrd.graph.channels import MERGEABLE
from fxlrd.graph.guards import matches, why_not_replaceable
from fxlrd.graph.layer import origin
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.compose import affine, unit_norm
from fxlrd.layers.kinds import ConvOrLinear, as_layer, channels_per_group, kernel_area
from fxlrd.layers.weights import resized
from fxlrd.passes._merging import UNMERGED, Targets, is_shared, original_shape, put_merged
from fxlrd.passes._patterns import Side, following, previous, side
from fxlrd.passes.contract import Site, Skip
from fxlrd.passes.driver import Run
from fxlrd.ranks import tucker2_rank

NOT_BETWEEN = Reason("not-between", "no 1×1 conv with only BatchNorm, then activation between on both sides")


@dataclass(frozen=True)
class Bottleneck:
    """The call of a k×k conv with its two sides, and the rank to move it to."""

    before: Side
    node: fx.Node
    after: Side
    rank: int


@dataclass(frozen=True)
class Relocate(Targets):
    """The rewrite, with the options of `Merge` that it reads."""

    def rewrite(self, run: Run) -> None:
        """Move every k×k conv of the run's graph that the options do not leave alone into rank space."""
        self.check_named(run.gm)
        guards = why_not_replaceable(run.gm, norms=True)
        run.each(layers(run.gm), lambda name: self._visit(run.gm, calls(run.gm, name)[0], guards))

    def _visit(self, gm: fx.GraphModule, node: fx.Node, guards: Mapping[str, Reason | None]) -> Site | Skip | None:
        """Move a layer into rank space; None for one without a k×k kernel, which the report leaves out."""
        place = self._bottleneck(gm, node, guards)
        if isinstance(place, Reason):
            skip = self.refusal(node, place)
            return skip if kernel_area(gm.get_submodule(str(node.target))) > 1 else None
        error = _move_into_rank_space(gm, place)
        note = f"BN and activation moved into rank space {place.rank}: not the same function, fine-tune it"
        return Site(origin(node), False, f"{note} (weight error {error:.2g})")

    def _bottleneck(
        self, gm: fx.GraphModule, node: fx.Node, guards: Mapping[str, Reason | None]
    ) -> Bottleneck | Reason:
        """Return the chains around a k×k conv and its rank, or why it is left alone."""
        name = str(node.target)
        if (reason := self.left_alone(name)) is not None:
            return reason
        if (reason := _why_no_core(gm.get_submodule(name))) is not None:
            return reason
        before, after = side(gm, node, previous), side(gm, node, following)
        if before is None or after is None:
            return NOT_BETWEEN
        for member in (before.conv, after.conv):
            if (pattern := matches(str(member.target), self.skip)) is not None:
                return Reason("skip", f"skip={pattern} keeps {member.target}")
        members = (node, before.conv, *before.between, *after.between, after.conv)
        if (reason := _first_reason(gm, members, guards)) is not None:
            return reason
        rank = self._rank(gm, node)
        return rank if isinstance(rank, Reason) else Bottleneck(before, node, after, rank)

    def _rank(self, gm: fx.GraphModule, node: fx.Node) -> int | Reason:
        """Return the rank that ``ranks`` or else ``ratio`` asks for, or why that is not to be had."""
        c_in, c_out, _ = channels_per_group(gm.get_submodule(str(node.target)))
        s, c, *kernel = original_shape(gm, node)
        explicit = self.explicit_rank(str(node.target))
        rank = tucker2_rank(c, s, kernel, self.ratio) if explicit is None else explicit
        if rank < 1:
            return Reason("no-channels", f"ratio={self.ratio:g} leaves none of its {c_in} channels")
        if rank >= min(c_in, c_out) and (c_in, c_out) != (c, s):
            return Reason("merged", f"it is merged already: {c_in}→{c_out} of its {c}→{s} channels were kept")
        if explicit is None and rank >= min(c_in, c_out):
            return Reason("no-saving", f"rank {rank} of {c_in}→{c_out} saves nothing")
        return min(rank, c_in, c_out)


def _why_no_core(module: nn.Module) -> Reason | None:
    """Return why a layer has no Tucker-2 form of one core, if it has none."""
    groups = channels_per_group(module)[2]
    if not isinstance(module, MERGEABLE):
        return UNMERGED
    if groups > 1:
        return Reason("grouped", f"groups={groups}: only groups=1 has a Tucker form")
    return Reason("no-kernel", "it is no k×k conv") if kernel_area(module) == 1 else None


def _first_reason(gm: fx.GraphModule, nodes: Sequence[fx.Node], guards: Mapping[str, Reason | None]) -> Reason | None:
    """Return why one of the modules must stay as it is, if one must."""
    for node in nodes:
        reason = guards.get(str(node.target))
        if reason is None and is_shared(gm, node):
            reason = Reason("called-again", "it is called more than once")
        if reason is not None:
            return reason.at(str(node.target))
    return None


def _move_into_rank_space(gm: fx.GraphModule, place: Bottleneck) -> float:
    """Rewrite a bottleneck as the module docstring says, and return the weight error of the Tucker-2 form."""
    first, node, last, rank = place.before.conv, place.node, place.after.conv, place.rank
    conv = as_layer(gm.get_submodule(str(node.target)))
    triple = tucker2(conv.weight.detach().double()[None], rank, rank)
    assert triple.first is not None
    assert triple.last is not None
    check_finite(triple.core)
    u, core, v = triple.first[0], triple.core[0], triple.last[0]

    entry = as_layer(gm.get_submodule(str(first.target)))
    g, h = _affine_of(gm, place.before, entry)
    weight = torch.einsum("rc,c,cs->rs", u, g, entry.weight.detach().double().flatten(1))
    bias = _move_norms(gm, place.before, u @ h)
    put_merged(gm, first, resized(entry, weight[..., None, None], bias), (None, rank), entangled=True)

    g, h = _affine_of(gm, place.after, conv)
    weight = torch.einsum("so,s,sp,pqij->oqij", v, g, v, core)
    bias = _move_norms(gm, place.after, v.mT @ h)
    put_merged(gm, node, resized(conv, weight, bias), (rank, rank), triple.error, entangled=True)

    exit_ = as_layer(gm.get_submodule(str(last.target)))
    weight = exit_.weight.detach().double().flatten(1) @ v
    bias = None if exit_.bias is None else exit_.bias.detach()
    put_merged(gm, last, resized(exit_, weight[..., None, None], bias), (rank, None), entangled=True)
    return triple.error


def _norms(gm: fx.GraphModule, side: Side) -> list[fx.Node]:
    return [n for n in side.between if isinstance(gm.get_submodule(str(n.target)), nn.BatchNorm2d)]


def _affine_of(gm: fx.GraphModule, side: Side, conv: ConvOrLinear) -> tuple[Tensor, Tensor]:
    """Return (g, h) of the BatchNorms after a conv together, h with its bias; (1, bias) where there is none."""
    g = conv.weight.new_ones(len(conv.weight), dtype=torch.float64)
    h = torch.zeros_like(g)
    for node in _norms(gm, side):
        scale, shift = affine(gm.get_submodule(str(node.target)))
        g, h = g * scale, h * scale + shift
    return g, h if conv.bias is None else h + g * conv.bias.detach().double()


def _move_norms(gm: fx.GraphModule, side: Side, shift: Tensor) -> Tensor | None:
    """Put BatchNorms of unit statistics in the place of a side's, the first of which adds the shift.

    Without any, return the shift as the bias of the conv before.
    """
    norms = _norms(gm, side)
    for i, node in enumerate(norms):
        put_merged(gm, node, unit_norm(gm.get_submodule(str(node.target)), torch.zeros_like(shift) if i else shift))
    return None if norms else shift
