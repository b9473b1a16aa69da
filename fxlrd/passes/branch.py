"""branch: Tucker cores into grouped convs (paper, §2.4, eq. 8-20).

    x ─ first ─ core (r1→r2) ─ last   →   x ─ P·first ─ core' (r1→r2, N groups) ─ last·Qᵀ

With both ranks multiples of N, a grouped conv is the sum of N parallel branches of ranks r1/N and r2/N. It has 1/N of
the core's parameters and drops the off-diagonal blocks of the core. The bases are rotated first, by P and Q, so that
these blocks have little energy (fxlrd/factor/block_term.py); the paper drops them without a rotation. Ranks that are
not multiples of N are rounded down by another Tucker-2 of the core.

Approximate; exact for a core that is block-diagonal in some bases. Each site reports the share of energy that the
branches retain, with and without the rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from fxlrd.errors import FxlrdError, Reason
from fxlrd.factor.block_term import STEPS, Blocks, block_term
from fxlrd.factor.failures import check_finite
from fxlrd.factor.tucker import tucker2
from fxlrd.graph.facts import provenance
from fxlrd.graph.layer import Layer, decomposed_layers
from fxlrd.graph.surgery import calls, infer_shape
from fxlrd.layers.kinds import Conv, as_layer, spatial_dims
from fxlrd.layers.weights import from_blocks, resized, weight_blocks
from fxlrd.passes.contract import PassResult, Site, Skip, names
from fxlrd.passes.driver import start
from fxlrd.progress import Progress, quiet
from fxlrd.timing.branches import time_branches
from fxlrd.timing.clock import Timer, compare
from fxlrd.timing.inductor import Compile
from fxlrd.timing.stopwatch import Stopwatch

GROUPS = (1, 2, 4, 8, 16)
NO_CORE = Reason("no-core", "no Tucker-2 form with both outer factors: there is no core to split")
BIASED_CORE = Reason("biased-core", "a layer was composed into its first factor or core, which has a bias now")
ONE_BRANCH = Reason("one-branch", "one branch is the core itself")


@dataclass(frozen=True)
class Branch:
    """Split the core of each Tucker-2 form into ``groups`` branches.

    Attributes:
        groups: N, the number of branches.
        timed: choose N among 1, 2, 4, 8 and 16 by timing: the smallest that no other beats by more than the noise.
        rotate: rotate the bases first; without, the core is split as in the paper.
        skip: names and globs of layers to leave as they are.
        steps: a bound on the steps of the search for the rotation.
        compile: time under Inductor.
        timer: what times.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    groups: int = 4
    timed: bool = False
    rotate: bool = True
    skip: tuple[str, ...] = ()
    steps: int = STEPS
    compile: Compile = False
    timer: Timer = field(default=compare, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.groups, int) or self.groups < 1:
            raise FxlrdError(f"branch: groups={self.groups}: a number of branches is a whole number of at least 1")
        object.__setattr__(self, "skip", names(self.skip))

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` with branched cores. Raises FxlrdError for a name that fits no layer."""
        run = start(self, gm, progress, self.skip)
        run.each(decomposed_layers(run.gm), lambda layer: self._branch(run.gm, layer))
        return run.result()

    def _branch(self, gm: fx.GraphModule, layer: Layer) -> Site | Skip:
        parts = dict(layer.module.named_children())
        if (reason := layer.why_left_alone(self.skip) or _why_no_core(parts)) is not None:
            return Skip(layer.name, reason)
        core = parts["core"]
        assert isinstance(core, Conv)
        limit = min(core.in_channels, core.out_channels)
        groups = self._fastest(gm, layer.name, core) if self.timed else self.groups
        if groups > limit:
            return Skip(layer.name, Reason("too-many-groups", f"groups={groups} is more than its rank {limit}"))
        if groups == 1:
            return Skip(layer.name, ONE_BRANCH)
        blocks, first, last = _split(parts, groups, self.steps if self.rotate else 0)
        error = _install(gm, layer, blocks, first, last)
        return Site(
            layer.name,
            False,
            f"core {core.in_channels}→{core.out_channels} in {groups} branches: "
            f"{100 * blocks.retained:.1f} % of its energy kept ({100 * blocks.unrotated:.1f} % without rotation)"
            + (f", weight error {error:.2g}" if error is not None else ""),
            ranks=(first.shape[0], last.shape[1]),
            ranks_before=(core.in_channels, core.out_channels),
        )

    def _fastest(self, gm: fx.GraphModule, name: str, core: Conv) -> int:
        """Return the number of branches at which the core alone runs fastest on this device."""
        groups = [n for n in GROUPS if n <= min(core.in_channels, core.out_channels)]
        timings = time_branches(calls(gm, f"{name}.core"), core, groups, Stopwatch(self.compile, timer=self.timer))
        if isinstance(timings, Reason):
            raise FxlrdError(f"branch: {name}: {timings}")
        fastest = min(timings, key=lambda key: timings[key].ratio)
        return next(int(key) for key, t in timings.items() if key == fastest or not timings[fastest].faster(t))


def _why_no_core(parts: Mapping[str, nn.Module]) -> Reason | None:
    """Return why these factors of a layer have no core that can be split."""
    if set(parts) != {"first", "core", "last"}:
        return NO_CORE
    if any(as_layer(parts[role]).bias is not None for role in ("first", "core")):
        return BIASED_CORE
    groups = parts["core"].groups
    return Reason("branched", f"its core has groups={groups} already") if groups != 1 else None


def _split(parts: dict[str, nn.Module], groups: int, steps: int) -> tuple[Blocks, Tensor, Tensor]:
    """Return the blocks of the core and the outer factors (r1×C, S×r2) in their bases."""
    core = weight_blocks(parts["core"])[0].double().flatten(2)
    # With orthonormal outer factors, which training may have changed, the core's energy is that of the weight.
    rows, mix_in = torch.linalg.qr(as_layer(parts["first"]).weight.detach().double().flatten(1).mT)
    columns, mix_out = torch.linalg.qr(as_layer(parts["last"]).weight.detach().double().flatten(1))
    core = torch.einsum("ai,ijk,bj->abk", mix_out, core, mix_in)
    first, last = rows.mT, columns
    r2, r1 = core.shape[0] // groups * groups, core.shape[1] // groups * groups
    if (r2, r1) != core.shape[:2]:
        triple = tucker2(core[None], r1, r2)
        assert triple.first is not None
        assert triple.last is not None
        core, first, last = triple.core[0], triple.first[0] @ first, last @ triple.last[0]
    blocks = block_term(core.cpu(), groups, steps)
    return blocks, blocks.p.to(first) @ first, last @ blocks.q.to(last).mT


def _install(gm: fx.GraphModule, layer: Layer, blocks: Blocks, first: Tensor, last: Tensor) -> float | None:
    """Put the branched form in the place of the Tucker-2 form; return its weight error if the original is known."""
    cores = blocks.cores.to(first)
    check_finite(cores, first, last)
    gm.set_submodule(layer.name, _branched(dict(layer.module.named_children()), cores, first, last))
    for node in layer.calls:
        infer_shape(node, gm.get_submodule(str(node.target)))
    p = layer.provenance
    if p is None or p.name != layer.name:  # the model was already compressed: the original is not known
        return None
    error = _weight_error(p.original, cores, first, last)
    for node in layer.calls:
        factor = provenance(node)
        assert factor is not None
        role = "branch" if factor.role == "core" else factor.role
        ranks = (first.shape[0], last.shape[1])
        provenance.record(node, changed(factor, role=role, ranks=ranks, error=error, channel_error=None, latency=None))
    return error


def _branched(parts: Mapping[str, nn.Module], cores: Tensor, first: Tensor, last: Tensor) -> nn.Sequential:
    """Return the form of N cores (N×r2/N×r1/N×K) with its outer factors, configured as ``parts``."""
    core = as_layer(parts["core"])
    bias = as_layer(parts["last"]).bias
    ones = (1,) * spatial_dims(core)
    weight = from_blocks(core, cores.unflatten(3, core.weight.shape[2:]))
    form = nn.Sequential()
    form.add_module("first", resized(parts["first"], first.view(*first.shape, *ones), None))
    form.add_module("core", resized(core, weight, None, groups=len(cores)))
    bias = None if bias is None else bias.detach()
    form.add_module("last", resized(parts["last"], last.view(*last.shape, *ones), bias))
    return form.train(core.training)


def _weight_error(original: nn.Module | None, cores: Tensor, first: Tensor, last: Tensor) -> float | None:
    """Return ‖W − Σⱼ lastⱼ·coreⱼ·firstⱼ‖ / ‖W‖ for the original layer's weight W."""
    if original is None:
        return None
    weight = weight_blocks(original)[0].double().flatten(2)
    n = len(cores)
    inner = torch.einsum("nabk,nbc->nack", cores, first.unflatten(0, (n, -1)))
    kernel = torch.einsum("sna,nack->sck", last.unflatten(1, (n, -1)), inner)
    norm = weight.norm().item()
    return ((weight - kernel).norm().item() / norm) if norm else 0.0
