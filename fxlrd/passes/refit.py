"""refit: the last factor of each layer, by least squares, on what the compressed network feeds it.

Factors are fitted to the inputs that the *original* network gives each layer. In the compressed one those have moved
by the errors of all layers before. From the first layer to the last, with z what reaches the last factor there (or a
merged layer), and y what the original layer makes of the same input in the original network:

    min ‖y − (A + Δ)·z − b‖² + ρ·‖Δ‖²       over Δ and b

so that each layer also makes up for the ones before (asymmetric reconstruction, Zhang et al. 2016). Both networks run
in step, a node at a time for all inputs: one pass each. Approximate. Where `calibrate` held inputs out, the result is
kept only if it brings the outputs on those closer to the original's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.batches import NOTHING, as_batches, as_inputs, failed, split
from fxlrd.calibration.holdout import Disabled, TooFew, held_out, keep_if_better, reference
from fxlrd.calibration.patches import patches, spread
from fxlrd.errors import FxlrdError, Reason
from fxlrd.graph.captured import captured_or_bare, feed
from fxlrd.graph.facts import FACTORS, provenance, retained_channels
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating
from fxlrd.graph.surgery import calls, source
from fxlrd.layers.build import resized
from fxlrd.layers.fit import Moments
from fxlrd.layers.kinds import CONVS, LAYERS, TRANSPOSED, as_layer, channel_axis, op
from fxlrd.passes.contract import PassResult, Site, Skip
from fxlrd.passes.driver import start
from fxlrd.progress import Progress, quiet

RIDGE = 1e-3
"""ρ, relative to the mean variance of z."""

ROWS, FEW = 32, 16384
"""Positions of a batch that are fitted to: all of up to FEW, of more about ROWS for each number that an output is
computed from, evenly spread."""

WIDEST = 2304
"""Layers that read more numbers for each output than this are left alone: the fit would take too long."""

NOT_FINITE = Reason("not-finite", "the calibration inputs give NaN or Inf there")
WORSE = Reason("not-better", "held-out inputs fit better as it was")
REGION_INPUT = Reason("region-input", "what the compressed model feeds it is not known: only regions could be captured")
CALLED_AGAIN = Reason("called-again", "it is called more than once")
NO_LAYER = Reason("no-layer", "it is no layer")


@dataclass(frozen=True)
class Refit:
    """Refit the last factor of each decomposed layer, and each merged layer, to the original's outputs.

    ``calibration`` are batches as for `Calibrate`, of which the first ``inputs`` examples are used: their activations
    are in memory all at once. ``guard`` keeps the result only where that lowers the error on the inputs that
    `Calibrate` was asked to hold out. Needs `Calibrate` before the first pass that rewrites. Raises FxlrdError for data
    that is empty, does not fit the model or is not finite.
    """

    needs: ClassVar[tuple[str, ...]] = ("calibration", "reference")

    calibration: Any = field(default=None, compare=False, repr=False)
    inputs: int = 512
    guard: bool = True

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` with refitted layers."""
        run = start(self, gm, progress)
        original = reference(gm)
        assert original is not None  # a need of this pass
        places, run.skipped = _places(run.gm, original)
        inputs_held_out = held_out(gm) if self.guard else Disabled()
        if isinstance(inputs_held_out, TooFew):
            run.skipped += [Skip(name, inputs_held_out.reason) for name in places]
            return run.result()
        if not places:
            return run.result()
        batches = _few(split(as_inputs(run.gm, as_batches(self.calibration)), []), self.inputs)
        with evaluating(run.gm), evaluating(original), torch.no_grad():
            networks = _Networks(run.gm, original, batches)
            run.each(places, lambda name: networks.refit(name, *places[name]))
        verdict = keep_if_better(inputs_held_out, gm, run.gm)
        return run.result(verdict.note) if verdict.kept else run.undone(WORSE, verdict.note)


def _places(gm: fx.GraphModule, original: fx.GraphModule) -> tuple[dict[str, tuple[fx.Node, fx.Node]], list[Skip]]:
    """Return for each layer to refit the node to refit and the original layer's call, in graph order."""
    by_name: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        known = provenance(node)
        if known is not None and (
            known.role in FACTORS or (known.role == "merged" and known.ranks[:1] not in ((), (None,)))
        ):
            by_name.setdefault(known.name, []).append(node)
    found, skipped = {}, []
    for name, nodes in by_name.items():
        last = [n for n in nodes if not any(user in nodes for user in n.users)]
        there = calls(original, name)
        reason = _why_not(gm, name, last, there) or _fed_by_the_original(gm, nodes)
        if reason is None:
            found[name] = (last[0], there[0])
        else:
            skipped.append(Skip(name, reason))
    return found, skipped


def _fed_by_the_original(gm: fx.GraphModule, nodes: list[fx.Node]) -> Reason | None:
    """Return why a layer at the start of a region is left alone: it gets the original's activations there."""
    if not captured_or_bare(gm).fed_by_the_original(source(nodes[0])):
        return None
    return REGION_INPUT


def _why_not(gm: fx.GraphModule, name: str, last: list[fx.Node], there: list[fx.Node]) -> Reason | None:
    if len(last) != 1 or len(there) != 1:
        return CALLED_AGAIN
    module = gm.get_submodule(str(last[0].target))
    if not isinstance(module, LAYERS):
        return NO_LAYER
    if getattr(module, "groups", 1) > 1:
        return Reason("grouped", f"groups={module.groups}: only groups=1 is refitted")
    if isinstance(module, TRANSPOSED):
        return Reason("layer-type", f"what makes its output is a {op(module)}, which is not refitted")
    if (width := as_layer(module).weight[0].numel()) > WIDEST:
        return Reason("too-wide", f"it reads {width} numbers for each output, more than {WIDEST}")
    return None


def _few(batches: Iterable[Inputs], limit: int) -> list[Inputs]:
    """Return the first batches, until they hold ``limit`` examples."""
    found: list[Inputs] = []
    seen = 0
    for inputs in batches:
        found.append(inputs)
        seen += max((len(t) for t in tensors((inputs.args, inputs.kwargs)) if t.dim()), default=1)
        if seen >= limit:
            break
    if not found:
        raise FxlrdError(NOTHING)
    return found


class _Stepper:
    """Runs a graph on several inputs, a node at a time for all of them."""

    def __init__(self, gm: fx.GraphModule, batches: list[Inputs]) -> None:
        self.runs = []
        self.pending = list(gm.graph.nodes)
        for inputs in batches:
            run = fx.Interpreter(gm)
            run.args_iter = iter(feed(gm, inputs))
            self.runs.append((run, inputs))

    def until(self, node: fx.Node, included: bool) -> None:
        """Go on until just before ``node``, or just after."""
        while self.pending and (included or self.pending[0] is not node):
            current = self.pending.pop(0)
            for i, (run, inputs) in enumerate(self.runs):
                try:
                    run.env[current] = run.run_node(current)
                except Exception as error:
                    raise failed(i, inputs, error) from error
                for dead in run.user_to_last_uses.get(current, ()):
                    del run.env[dead]
            if current is node:
                return

    def values(self, node: fx.Node) -> list[Tensor]:
        """Return the node's value for each input."""
        return [run.env[node] for run, _ in self.runs]


class _Networks:
    """The compressed and the original network, run in step up to the layer that is refitted."""

    def __init__(self, gm: fx.GraphModule, original: fx.GraphModule, batches: list[Inputs]) -> None:
        self.gm = gm
        self.compressed, self.original = _Stepper(gm, batches), _Stepper(original, batches)

    def refit(self, name: str, node: fx.Node, original_call: fx.Node) -> Site | Skip:
        """Refit the layer that ``node`` calls to what the original layer makes."""
        read = source(node)
        assert read is not None
        self.original.until(original_call, included=True)
        self.compressed.until(node, included=False)
        pairs = zip(self.compressed.values(read), self.original.values(original_call), strict=True)
        new = _solved(self.gm.get_submodule(str(node.target)), retained_channels(node), pairs)
        if new is None:
            return Skip(name, NOT_FINITE)
        self.gm.set_submodule(str(node.target), new.eval())
        return Site(name, False, "refitted")


def _solved(module: nn.Module, kept: Tensor | None, pairs: Iterable[tuple[Tensor, Tensor]]) -> nn.Module | None:
    """Return the layer with the weight and bias of the least squares fit, or None where values are not finite.

    Pairs are what it reads and what the original layer makes, of which only the channels ``kept`` count.
    """
    weight = as_layer(module).weight.detach().double().flatten(1)
    count, width = weight.shape
    seen = Moments.empty(width + count, weight.device)
    for z, y in pairs:
        made = y.movedim(channel_axis(module, y.dim()), -1)
        made = (made if kept is None else made[..., kept]).reshape(-1, count).double()
        most = max(ROWS * width, FEW)
        seen.add(torch.cat([_rows(module, z, most), made[:: spread(len(made), most)]], 1))
    both = seen.covariance
    if not bool(both.isfinite().all()):
        return None
    inner, cross = both[:width, :width], both[width:, :width]
    scale = inner.diagonal().mean() * (RIDGE + seen.ridge)
    if not scale > 0:
        return None
    regularised = inner + scale * torch.eye(width, dtype=inner.dtype, device=inner.device)
    change = torch.linalg.solve(regularised, (cross - weight @ inner).mT).mT
    weight = weight + change
    bias = seen.mean[width:] - weight @ seen.mean[:width]
    return resized(module, weight.view_as(as_layer(module).weight), bias)


def _rows(module: nn.Module, x: Tensor, most: int) -> Tensor:
    """Return what the layer's outputs are computed from, one row a position; of more than ``most``, about so many."""
    if isinstance(module, CONVS):
        return patches(module, x, most)
    rows = x.flatten(0, -2)
    return rows[:: spread(len(rows), most)].double()
