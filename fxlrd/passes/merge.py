"""merge: as many layers as before, fewer parameters.

interpolative (approximate, the default)
    A producer makes C channels; operations that treat each channel alone follow; consumers read them:

        producer ─ BN ─ ReLU ─ (depthwise, pooling, flatten …) ─ consumer

    Keep r channels S and interpolate the rest, x ≈ T·x[S], where the consumer reads (factor/interpolative.py).
    Keeping channels commutes with everything between, so the kept rows go into the producer and T into the
    consumer, W' = W·T. The result computes exactly what producer → select S → interpolate T → consumer would.
    Needs the moments that `calibrate` leaves. A squeeze-excitation is one more consumer and one more producer.

exact
    Neighbours with only affine operations between become one layer where that costs less:

        1×1∘1×1,  1×1 into k×k,  k×k into 1×1,  linear∘linear,  with BN (eval mode) or dropout between;
        with ``norms``, also conv–BN

    A bias before a zero-padded k×k conv is refused: the border would differ.

relocate (approximate; needs fine-tuning)
    The paper's Fig. 3: Tucker-2 of a k×k conv between two 1×1 convs, its outer factors folded into those, with
    BN and activation moved into rank space. With U (r1×C) and V (S×r2) of the conv and BN(y) = g·y + h:

        1×1 ─ BN ─ act ─ k×k ─ BN ─ act ─ 1×1   →   U·g·1×1 ─ BN' ─ act ─ (Vᵀ·g·V)·core ─ BN' ─ act ─ 1×1·V

    where each BN' starts at unit statistics with the shift U·h, Vᵀ·h. Not the same function: an activation does
    not commute with a change of basis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from fxlrd.allocation.merges import choose, mergeable, readers
from fxlrd.allocation.plan import planned
from fxlrd.errors import FxlrdError, Reason, unknown
from fxlrd.factor.tucker import tucker2
from fxlrd.graph.captured import captured, refresh_shapes
from fxlrd.graph.channels import ELEMENTWISE_MODULES, MERGED, MERGED_NORMS, Group
from fxlrd.graph.facts import FACTORS, Provenance, provenance, retained_channels, shape, statistics
from fxlrd.graph.guards import check_names, matches, replaceable, skip_reason
from fxlrd.graph.surgery import annotate, calls, fork, layers, source
from fxlrd.layers.build import resized
from fxlrd.layers.compose import affine, composed, fold_inputs, keep_channels, keep_outputs, scaled, why_not_composable
from fxlrd.layers.kinds import as_layer, channels_per_group, depthwise, kernel_area
from fxlrd.passes.contract import UNNAMED, PassResult, Site, Skip, names
from fxlrd.progress import Progress, quiet
from fxlrd.ranks import check_ratio, tucker2_rank
from fxlrd.timing.groups import time_group
from fxlrd.timing.search import best_share, grid

UNMERGED = Reason("layer-type", "only Conv2d and Linear layers are merged")
PLANNED = Reason("original-planned", "allocate keeps all its channels")
NOT_BETWEEN = Reason("not-between", "no 1×1 conv with only BatchNorm, then activation between on both sides")
MODES = ("interpolative", "exact", "relocate")


@dataclass(frozen=True)
class Merge:
    """Fold factors into neighbouring layers; see the module docstring for ``mode``.

    ``ratio`` is the compression ratio α: where a k×k conv reads or makes the channels, r comes from it by the
    paper's eq. (7); elsewhere (depthwise, linear, 1×1) r = C/α. ``ranks`` overrides that: one int, or a mapping
    from the names or globs of producers to r, in which case only those are merged. ``skip`` takes names and
    globs; a group is left alone if any layer of it fits. ``norms`` lets mode exact fold conv–BN pairs.

    ``snap`` moves r down to a hardware multiple (not below ``floor``·r) where timing the group's layers says that
    it pays, as `snap` does; ``compile`` times under Inductor, ``seconds`` bounds the timing of one group.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    mode: str = "interpolative"
    ratio: float = 2.75
    ranks: int | Mapping[str, int] | None = None
    skip: tuple[str, ...] = ()
    norms: bool = False
    snap: bool = False
    floor: float = 0.75
    compile: bool = False
    seconds: float = 1.5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode of merge", self.mode, MODES)
        check_ratio(self.ratio)
        object.__setattr__(self, "skip", names(self.skip))
        given = self.ranks.values() if isinstance(self.ranks, Mapping) else [self.ranks]
        for rank in given:
            if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
                raise FxlrdError(f"merge: ranks={rank}: a rank is a whole number of at least 1")

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a merged copy of ``gm``.

        Raises FxlrdError for a name that fits no layer, and for a producer named in ``ranks`` that cannot be cut.
        """
        plan = planned(gm) if self.ranks is None and self.mode == "interpolative" else None
        if plan is not None:
            result = changed(self, ranks=dict(plan.kept), snap=False)(gm, progress)
            left = (changed(s, reason=PLANNED if s.reason.code == UNNAMED.code else s.reason) for s in result.skipped)
            return changed(result, skipped=tuple(left))
        gm = fork(gm)
        annotate(gm)
        self._check_named(gm)
        run = {"interpolative": self._interpolative, "exact": self._exact, "relocate": self._relocate}[self.mode]
        sites: list[Site] = []
        skipped: list[Skip] = []
        for found in run(gm, progress):
            (sites if isinstance(found, Site) else skipped).append(found)  # type: ignore[arg-type]
        gm.graph.lint()
        gm.recompile()
        if sites:
            refresh_shapes(gm)
        return PassResult(gm, tuple(sites), tuple(skipped))

    def _check_named(self, gm: fx.GraphModule) -> None:
        named = [*self.ranks] if isinstance(self.ranks, Mapping) else []
        check_names(gm, [*self.skip, *named])
        whole = captured(gm)
        for name in named:
            if whole is not None and name in whole.unreached:
                raise FxlrdError(f"merge: {name} cannot be merged: {whole.unreached[name].reason}")

    def _asked(self, name: str) -> bool:
        """Whether the user asked for exactly this layer."""
        return isinstance(self.ranks, Mapping) and name in self.ranks

    def _left_alone(self, name: str) -> Reason | None:
        """Return why the options leave a layer alone, if they do."""
        if (pattern := matches(name, self.skip)) is not None:
            return skip_reason(pattern)
        if isinstance(self.ranks, Mapping) and matches(name, list(self.ranks)) is None:
            return UNNAMED
        return None

    # -- interpolative

    def _interpolative(self, gm: fx.GraphModule, progress: Progress) -> Iterator[Site | Skip]:
        reasons = replaceable(gm, norms=True)
        cut: set[fx.Node] = set()
        for name, module in progress(list(layers(gm).items()), "merge"):
            node = calls(gm, name)[0]
            if node in cut:
                continue
            if depthwise(module) and (known := provenance(node)) is not None and known.role == "merged":
                continue
            found = self._plan(gm, name, node, reasons)
            if isinstance(found, Reason):
                if self._asked(name):
                    raise FxlrdError(f"merge: {name} cannot be merged: {found}")
                yield Skip(_origin(node), found)
                continue
            whole, rank = found
            error = _cut(gm, whole, rank)
            cut.update(whole.producers)
            readers = ", ".join(str(c.node.target) for c in whole.consumers)
            yield Site(
                _origin(node),
                False,
                f"{rank} of {whole.channels} channels kept, the others interpolated in {readers} (error {error:.2g})",
            )

    def _plan(
        self, gm: fx.GraphModule, name: str, node: fx.Node, reasons: Mapping[str, Reason | None]
    ) -> tuple[Group, int] | Reason:
        """Return the group of a producer's channels and how many to keep, or why it is left alone."""
        if (reason := self._left_alone(name)) is not None and not depthwise(gm.get_submodule(name)):
            return reason
        whole = mergeable(gm, node, reasons, self.skip, stem=isinstance(self.ranks, Mapping))
        if isinstance(whole, Reason):
            return whole
        rank = self._rank(gm, name, whole)
        if rank < 1:
            return Reason("no-channels", f"ratio={self.ratio:g} leaves none of its {whole.channels} channels")
        if rank >= whole.channels:
            if whole.channels < (before := _weight_before(gm, node)[0]):
                text = f"it is merged already: {whole.channels} of its {before} channels were kept"
                return Reason("merged", text)
            return Reason("no-saving", f"keeping {rank} of {whole.channels} channels saves nothing")
        if isinstance(known := readers(gm, whole), Reason):
            return known
        return whole, self._snapped(gm, whole, rank) if self.snap else rank

    def _snapped(self, gm: fx.GraphModule, whole: Group, rank: int) -> int:
        """Return r or the hardware multiple below it that pays, by timing the group's layers."""
        candidates = grid((rank,), (math.ceil(self.floor * rank),), 1)
        if len(candidates) == 1:
            return rank
        timings = time_group(gm, whole, [r for (r,) in candidates if r], self.compile, self.seconds)
        (best,) = best_share(candidates, timings, lambda ranks: float(ranks[0] or 0), trade=0.5)
        return best or rank

    def _rank(self, gm: fx.GraphModule, name: str, whole: Group) -> int:
        if self.ranks is not None:
            return self._explicit(name)
        for node in (*(c.node for c in whole.consumers), *whole.producers):
            c_out, c_in, *kernel = _weight_before(gm, node)
            if math.prod(kernel) > 1:
                return tucker2_rank(c_in, c_out, kernel, self.ratio)
        return math.floor(_weight_before(gm, whole.producers[0])[0] / self.ratio)

    # -- exact

    def _exact(self, gm: fx.GraphModule, progress: Progress) -> Iterator[Site | Skip]:
        again, skipped = True, dict[str, Skip]()
        while again:  # a merged layer may compose with its neighbours too
            reasons = replaceable(gm, norms=True)
            again, skipped = False, {}
            for name in progress(list(layers(gm)), "merge"):
                found = self._compose(gm, name, reasons)
                if isinstance(found, Site):
                    again = True
                    yield found
                elif found is not None:
                    skipped[name] = found
        yield from skipped.values()

    def _compose(self, gm: fx.GraphModule, name: str, reasons: Mapping[str, Reason | None]) -> Site | Skip | None:
        """Compose layer ``name`` with what follows it; None where nothing affine does."""
        first = calls(gm, name)[0]
        between, second = _affine_chain(gm, first)
        norms = [n for n in between if type(gm.get_submodule(str(n.target))) in MERGED_NORMS]
        if second is None and not (self.norms and norms):
            return None
        if not isinstance(gm.get_submodule(name), MERGED):
            return Skip(_origin(first), UNMERGED)
        for node in [first, *between, *([second] if second is not None else [])]:
            reason = reasons[str(node.target)]
            pattern = matches(str(node.target), self.skip)
            if reason is None and pattern is not None:
                reason = skip_reason(pattern)
            if reason is not None:
                return Skip(_origin(first), reason.at(str(node.target)))
            if _shared(gm, node):
                return Skip(_origin(first), Reason("called-again", f"{node.target} is called more than once"))
        module = gm.get_submodule(name)
        for norm in norms:
            module = scaled(module, *affine(gm.get_submodule(str(norm.target))))
        if second is None:
            return self._absorb(gm, first, norms, module)
        other = gm.get_submodule(str(second.target))
        shift = as_layer(module).bias
        reason = why_not_composable(module, other, shift is not None and bool(shift.count_nonzero()))
        if reason is None and not _cheaper(first, module, second, other, both := composed(module, other)):
            reason = Reason("costs-more", f"one layer in the place of it and {second.target} would cost more")
        if reason is not None:
            return (
                Skip(_origin(first), reason) if not (self.norms and norms) else self._absorb(gm, first, norms, module)
            )
        name = _origin(first)
        start = source(first)
        assert start is not None
        second.replace_input_with(second.all_input_nodes[0], start)
        for node in reversed([first, *between]):
            _remove(gm, node)
        _swap(gm, second, both)
        _no_form(gm, {name, _origin(second)})
        return Site(name, True, f"composed into {second.target}")

    def _absorb(self, gm: fx.GraphModule, first: fx.Node, norms: list[fx.Node], module: nn.Module) -> Site:
        for norm in norms:
            norm.replace_all_uses_with(norm.all_input_nodes[0])
            _remove(gm, norm)
        _swap(gm, first, module)
        return Site(_origin(first), True, f"took in {', '.join(str(n.target) for n in norms)}")

    # -- relocate

    def _relocate(self, gm: fx.GraphModule, progress: Progress) -> Iterator[Site | Skip]:
        reasons = replaceable(gm, norms=True)
        for name, module in progress(list(layers(gm).items()), "merge"):
            node = calls(gm, name)[0]
            found = self._between(gm, name, node, reasons)
            if isinstance(found, Reason):
                if self._asked(name):
                    raise FxlrdError(f"merge: {name} cannot be merged: {found}")
                if kernel_area(module) > 1:
                    yield Skip(_origin(node), found)
                continue
            before, after, rank = found
            error = _move_into_rank_space(gm, before, node, after, rank)
            note = f"BN and activation moved into rank space {rank}: not the same function, fine-tune it"
            yield Site(_origin(node), False, f"{note} (weight error {error:.2g})")

    def _between(
        self, gm: fx.GraphModule, name: str, node: fx.Node, reasons: Mapping[str, Reason | None]
    ) -> tuple[Chain, Chain, int] | Reason:
        """Return the chains before and after a k×k conv and its rank, or why it is left alone."""
        module = gm.get_submodule(name)
        c_in, c_out, groups = channels_per_group(module)
        if (reason := self._left_alone(name)) is not None:
            return reason
        if not isinstance(module, MERGED):
            return UNMERGED
        if groups > 1:
            return Reason("grouped", f"groups={groups}: only groups=1 has a Tucker form")
        if kernel_area(module) == 1:
            return Reason("no-kernel", "it is no k×k conv")
        before, after = _one_by_one_before(gm, node), _one_by_one_after(gm, node)
        if before is None or after is None:
            return NOT_BETWEEN
        for member in (before[0], after[-1]):
            if (pattern := matches(str(member.target), self.skip)) is not None:
                return Reason("skip", f"skip={pattern} keeps {member.target}")
        if (reason := _first_reason([node, *before, *after], gm, reasons)) is not None:
            return reason
        s, c, *kernel = _weight_before(gm, node)
        rank = self._explicit(name) if self.ranks is not None else tucker2_rank(c, s, kernel, self.ratio)
        if rank < 1:
            return Reason("no-channels", f"ratio={self.ratio:g} leaves none of its {c_in} channels")
        if rank >= min(c_in, c_out) and (c_in, c_out) != (c, s):
            return Reason("merged", f"it is merged already: {c_in}→{c_out} of its {c}→{s} channels were kept")
        if self.ranks is not None:
            return before, after, min(rank, c_in, c_out)
        if rank >= min(c_in, c_out):
            return Reason("no-saving", f"rank {rank} of {c_in}→{c_out} saves nothing")
        return before, after, rank

    def _explicit(self, name: str) -> int:
        if isinstance(self.ranks, int):
            return self.ranks
        assert self.ranks is not None
        pattern = matches(name, list(self.ranks))
        assert pattern is not None
        return self.ranks[pattern]


def _weight_before(gm: fx.GraphModule, node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a layer's weight before any merging, also by an earlier compress: α goes by that."""
    whole, known = captured(gm), provenance(node)
    if whole is not None and (shape := whole.weight_shapes.get(_origin(node))) is not None:
        return shape
    module = known.original if known is not None and known.original is not None else None
    return tuple(as_layer(module or gm.get_submodule(str(node.target))).weight.shape)


def _origin(node: fx.Node) -> str:
    known = provenance(node)
    return known.name if known is not None else str(node.target)


def _cut(gm: fx.GraphModule, whole: Group, rank: int) -> float:
    """Keep ``rank`` channels of a group and return the largest predicted relative error of a consumer's output."""
    known = readers(gm, whole)
    assert not isinstance(known, Reason)
    kept, matrices, errors = choose(known, rank)
    for reader, matrix, error in zip(known, matrices, errors, strict=True):
        folded = fold_inputs(reader.module, matrix, reader.consumer.block)
        _swap(gm, reader.consumer.node, folded, (rank, None), error)
    for node in whole.through:
        _swap(gm, node, keep_channels(gm.get_submodule(str(node.target)), kept))
    for node in whole.producers:
        if (saw := statistics(node)) is not None and saw.matters is not None:
            statistics.record(node, changed(saw, matters=saw.matters[kept][:, kept]))
        _swap(gm, node, keep_outputs(gm.get_submodule(str(node.target)), kept), (None, rank), max(errors))
        earlier = retained_channels(node)
        retained_channels.record(node, kept if earlier is None else earlier[kept])
    return max(errors)


def _swap(
    gm: fx.GraphModule,
    node: fx.Node,
    module: nn.Module,
    ranks: tuple[int | None, int | None] = (None, None),
    error: float | None = None,
) -> None:
    """Put ``module`` where the node's module was, and say so in its provenance."""
    target = str(node.target)
    gm.set_submodule(target, module)
    known = provenance(node) or Provenance(target)
    before = known.ranks if known.role == "merged" and len(known.ranks) == 2 else (None, None)
    both = tuple(new if new is not None else old for new, old in zip(ranks, before, strict=True))
    if known.role in FACTORS:
        both = known.ranks
    worst = max((e for e in (error, known.error) if e is not None), default=None)
    provenance.record(node, changed(known, role="merged", ranks=both, error=worst))


def _affine_chain(gm: fx.GraphModule, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """Return the identities, dropouts and BatchNorms after ``node``, each the only user, and a layer that follows."""
    linear = isinstance(gm.get_submodule(str(node.target)), nn.Linear)
    between: list[fx.Node] = []
    while len(node.users) == 1:
        (user,) = node.users
        module = gm.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, MERGED):
            return between, user
        if not isinstance(module, nn.Module) or not (type(module) in _PASSING or _affine_norm(module, node, linear)):
            break
        between.append(user)
        node = user
    return between, None


_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


def _affine_norm(module: nn.Module, node: fx.Node, linear: bool) -> bool:
    """Whether the module is a BatchNorm of fixed statistics over the channels that the layer before it makes."""
    if not isinstance(module, MERGED_NORMS) or type(module) not in MERGED_NORMS or module.running_mean is None:
        return False
    sizes = shape(node)
    # On (N, L, C) a BatchNorm1d counts L as channels.
    return not linear or (sizes is not None and len(sizes) == 2)


def _no_form(gm: fx.GraphModule, names: set[str]) -> None:
    """Mark what is left of the factors of these layers as merged: they are no low-rank form of one layer any more."""
    for node in gm.graph.nodes:
        known = provenance(node)
        if known is not None and known.name in names and known.role in FACTORS:
            provenance.record(node, changed(known, role="merged"))


def _remove(gm: fx.GraphModule, node: fx.Node) -> None:
    """Erase a call, and the module if nothing else calls it."""
    gm.graph.erase_node(node)
    if not calls(gm, str(node.target)):
        gm.delete_submodule(str(node.target))


def _cheaper(first: fx.Node, a: nn.Module, second: fx.Node, b: nn.Module, both: nn.Module) -> bool:
    """Whether one layer costs less than two: weights times the positions that they are applied at."""
    at_first, at_second = _positions(first), _positions(second)
    now = as_layer(a).weight.numel() * at_first + as_layer(b).weight.numel() * at_second
    return as_layer(both).weight.numel() * at_second < now


def _positions(node: fx.Node) -> int:
    sizes = shape(node) or ()
    return math.prod(sizes[2:]) if len(sizes) == 4 else 1


Chain = tuple[fx.Node, ...]


def _one_by_one_before(gm: fx.GraphModule, node: fx.Node) -> Chain | None:
    """Return (1×1 conv, BN or none…, activations) leading to ``node``, or None."""
    chain: list[fx.Node] = []
    current = source(node)
    while current is not None and len(current.users) == 1 and current.op == "call_module":
        chain.insert(0, current)
        module = gm.get_submodule(str(current.target))
        if isinstance(module, nn.Conv2d):
            return tuple(chain) if _plain_one_by_one(module) and _ordered(gm, chain[1:]) else None
        current = current.all_input_nodes[0]
    return None


def _one_by_one_after(gm: fx.GraphModule, node: fx.Node) -> Chain | None:
    """Return (BN or none…, activations, 1×1 conv) following ``node``, or None."""
    chain: list[fx.Node] = []
    while len(node.users) == 1:
        (node,) = node.users
        if node.op != "call_module":
            return None
        chain.append(node)
        module = gm.get_submodule(str(node.target))
        if isinstance(module, nn.Conv2d):
            return tuple(chain) if _plain_one_by_one(module) and _ordered(gm, chain[:-1]) else None
    return None


def _ordered(gm: fx.GraphModule, between: list[fx.Node]) -> bool:
    """Whether there are BatchNorms of fixed statistics, then activations, and nothing else."""
    modules = [gm.get_submodule(str(n.target)) for n in between]
    while modules and type(modules[0]) is nn.BatchNorm2d and modules[0].running_mean is not None:
        modules.pop(0)
    return all(type(m) in ELEMENTWISE_MODULES for m in modules)


def _plain_one_by_one(module: nn.Conv2d) -> bool:
    return kernel_area(module) == 1 and module.groups == 1 and module.padding in ((0, 0), "valid")


def _first_reason(nodes: list[fx.Node], gm: fx.GraphModule, reasons: Mapping[str, Reason | None]) -> Reason | None:
    for node in nodes:
        reason = reasons.get(str(node.target))
        if reason is None and _shared(gm, node):
            reason = Reason("called-again", "it is called more than once")
        if reason is not None:
            return reason.at(str(node.target))
    return None


def _shared(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a module with parameters or buffers is called from elsewhere as well."""
    target = str(node.target)
    return len(calls(gm, target)) > 1 and bool(gm.get_submodule(target).state_dict())


def _move_into_rank_space(gm: fx.GraphModule, before: Chain, node: fx.Node, after: Chain, rank: int) -> float:
    """Rewrite 1×1 ─ BN ─ act ─ k×k ─ BN ─ act ─ 1×1 as the module docstring says, and return the weight error."""
    conv = as_layer(gm.get_submodule(str(node.target)))
    triple = tucker2(conv.weight.detach().double()[None], rank, rank)
    assert triple.first is not None
    assert triple.last is not None
    u, core, v = triple.first[0], triple.core[0], triple.last[0]
    head, tail = before[0], after[-1]

    entry = as_layer(gm.get_submodule(str(head.target)))
    g, h = _norm_of(gm, before, len(entry.weight), v)
    weight = torch.einsum("rc,c,cs->rs", u, g, entry.weight.detach().double().flatten(1))
    constant = h if entry.bias is None else h + g * entry.bias.detach().double()
    _replace_norms(gm, before, u @ constant)
    _swap(gm, head, resized(entry, weight[..., None, None], _bias_without_norm(gm, before, u @ constant)), (None, rank))

    g, h = _norm_of(gm, after, len(conv.weight), v)
    weight = torch.einsum("so,s,sp,pqij->oqij", v, g, v, core)
    constant = h if conv.bias is None else h + g * conv.bias.detach().double()
    _replace_norms(gm, after, v.mT @ constant)
    _swap(gm, node, resized(conv, weight, _bias_without_norm(gm, after, v.mT @ constant)), (rank, rank), triple.error)

    exit_ = as_layer(gm.get_submodule(str(tail.target)))
    bias = None if exit_.bias is None else exit_.bias.detach()
    folded = exit_.weight.detach().double().flatten(1) @ v
    _swap(gm, tail, resized(exit_, folded[..., None, None], bias), (rank, None))
    return triple.error


def _norm_of(gm: fx.GraphModule, chain: Chain, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (g, h) of the BatchNorms of a chain together; (1, 0) where there is none."""
    g, h = like.new_ones(count), like.new_zeros(count)
    for n in chain:
        module = gm.get_submodule(str(n.target))
        if isinstance(module, nn.BatchNorm2d):
            scale, shift = affine(module)
            g, h = g * scale, h * scale + shift
    return g, h


def _replace_norms(gm: fx.GraphModule, chain: Chain, shift: Tensor) -> None:
    """Put a BatchNorm of unit statistics and the given shift in the place of each BatchNorm of the chain."""
    first = True
    for n in chain:
        module = gm.get_submodule(str(n.target))
        if not isinstance(module, nn.BatchNorm2d):
            continue
        new = nn.BatchNorm2d(len(shift), module.eps, module.momentum, device=shift.device, dtype=shift.dtype)
        with torch.no_grad():
            assert new.running_var is not None
            new.running_var.fill_(1 - module.eps)
            new.bias.copy_(shift if first else torch.zeros_like(shift))
        dtype = module.running_mean.dtype if module.running_mean is not None else torch.float32
        _swap(gm, n, new.to(dtype).train(module.training))
        first = False


def _bias_without_norm(gm: fx.GraphModule, chain: Chain, shift: Tensor) -> Tensor | None:
    """Return the shift as the conv's own bias where no BatchNorm of the chain carries it."""
    has_norm = any(isinstance(gm.get_submodule(str(n.target)), nn.BatchNorm2d) for n in chain)
    return None if has_norm else shift
