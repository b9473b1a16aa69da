"""refit: the last factor of each layer, by least squares, on what the compressed network feeds it.

Factors are fitted to the inputs that the *original* network gives each layer. In the compressed one those have moved
by the errors of all layers before. From the first layer to the last, with z the input of the last factor (or of a
merged layer) in the compressed network, and y the output of the layer in the original one:

    min ‖y − (A + Δ)·z − b‖² + ρ·‖Δ‖²       over Δ and b

so that each layer also makes up for the ones before (asymmetric reconstruction, Zhang et al. 2016). Where the layer has
no bias, b goes into the mean of a BatchNorm after it, or is left out. Both networks run
in step, a node at a time for all inputs: one pass each. Approximate. Where `calibrate` held inputs out, the result is
kept only if it brings the outputs on those closer to the original's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.batches import as_batches, as_inputs, first_examples, rows_are_examples, to_fit
from fxlrd.calibration.holdout import Disabled, TooFew, held_out, keep_if_better, reference
from fxlrd.calibration.patches import patches, stride_for
from fxlrd.calibration.stepper import Stepper
from fxlrd.errors import Reason
from fxlrd.factor.failures import check_finite
from fxlrd.factor.ridge import with_ridge
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.facts import FACTORS, provenance, retained_channels
from fxlrd.graph.guards import hooked
from fxlrd.graph.layer import NOT_REACHED
from fxlrd.graph.run import evaluating
from fxlrd.graph.surgery import calls, source
from fxlrd.layers.fit import Moments
from fxlrd.layers.kinds import BATCH_NORMS, CONVS, LAYERS, TRANSPOSED, as_layer, channel_axis, op
from fxlrd.layers.weights import resized
from fxlrd.passes.contract import PassResult, Site, Skip
from fxlrd.passes.driver import start
from fxlrd.progress import Progress, quiet

RIDGE = 1e-3
"""ρ, relative to the mean variance of z."""

ROWS, FEW = 32, 16384
"""Rows used per batch: all if at most `FEW`; otherwise about `ROWS` × fan-in, evenly strided."""

WIDEST = 2304
"""Layers with a larger fan-in than this are left alone: the fit would take too long."""

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
        places = {}
        for name, nodes in _rewritten(run.gm).items():
            place = _place(run.gm, original, name, nodes)
            if isinstance(place, Reason):
                run.add(Skip(name, place))
            else:
                places[name] = place
        inputs_held_out = held_out(gm) if self.guard else Disabled()
        if isinstance(inputs_held_out, TooFew):
            run.skipped += [Skip(name, inputs_held_out.reason) for name in places]
            return run.result()
        if not places:
            return run.result()
        batches = first_examples(
            to_fit(as_inputs(run.gm, as_batches(self.calibration)), divisible=partial(rows_are_examples, original)),
            self.inputs,
        )
        with evaluating(run.gm), evaluating(original), torch.no_grad():
            steppers = Stepper(run.gm, batches), Stepper(original, batches)
            run.each(places, lambda name: _refit(run.gm, name, places[name], *steppers))
        verdict = keep_if_better(inputs_held_out, gm, run.gm)
        return run.result(verdict.note) if verdict.keep else run.undone(WORSE, verdict.note)


@dataclass(frozen=True)
class Place:
    """The call of the module to refit, and that of the layer in the original network."""

    call: fx.Node
    original: fx.Node


def _rewritten(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Return the calls of factors, and of layers that read merged channels, by the layer's name, in graph order."""
    by_name: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        p = provenance(node)
        if p is not None and (p.role in FACTORS or (p.role == "merged" and p.ranks[:1] not in ((), (None,)))):
            by_name.setdefault(p.name, []).append(node)
    return by_name


def _place(gm: fx.GraphModule, original: fx.GraphModule, name: str, nodes: list[fx.Node]) -> Place | Reason:
    """Return where to refit a layer, or why it is left alone."""
    last = [n for n in nodes if not any(user in nodes for user in n.users)]
    original_calls = calls(original, name)
    if len(last) != 1 or len(original_calls) != 1:
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
    if captured_or_bare(gm).fed_by_the_original(source(nodes[0])):
        return REGION_INPUT
    return Place(last[0], original_calls[0])


def _refit(gm: fx.GraphModule, name: str, place: Place, compressed: Stepper, original: Stepper) -> Site | Skip:
    """Refit the module at a place to the output of the original layer. Both networks run up to it."""
    read = source(place.call)
    assert read is not None
    original.through(place.original)
    compressed.before(place.call)
    values = compressed.values(read)
    if not values:
        return Skip(name, NOT_REACHED)
    pairs = zip(values, original.values(place.original), strict=True)
    module, norm = gm.get_submodule(str(place.call.target)), _norm_after(gm, place.call)
    has_bias = as_layer(module).bias is not None
    solved = _solved(module, retained_channels(place.call), pairs, has_bias or norm is not None)
    if solved is None:
        return Skip(name, NOT_FINITE)
    weight, bias = solved
    gm.set_submodule(str(place.call.target), resized(module, weight, bias if has_bias else None).eval())
    if norm is not None and not has_bias:
        gm.set_submodule(norm, _shifted(gm.get_submodule(norm), bias))
    return Site(name, False, "refitted")


def _norm_after(gm: fx.GraphModule, call: fx.Node) -> str | None:
    """Return the name of the BatchNorm that alone reads a layer's output, if its statistics may be changed."""
    user = next(iter(call.users))
    if len(call.users) != 1 or user.op != "call_module" or len(calls(gm, str(user.target))) != 1:
        return None
    module = gm.get_submodule(str(user.target))
    statistics = type(module) in BATCH_NORMS and module.running_mean is not None and not hooked(module)
    return str(user.target) if statistics else None


def _shifted(norm: nn.Module, constant: Tensor) -> nn.Module:
    """Return a copy of a BatchNorm that computes norm(x + constant) in eval mode."""
    new = copy.deepcopy(norm)
    new.running_mean = norm.running_mean - constant.to(norm.running_mean)  # type: ignore[operator, arg-type]
    return new


def _solved(
    module: nn.Module, retained: Tensor | None, pairs: Iterable[tuple[Tensor, Tensor]], constant: bool
) -> tuple[Tensor, Tensor] | None:
    """Return the weight and bias of the least squares fit, or None where values are not finite.

    ``pairs`` are z, which the layer reads, and y, of which it makes the channels ``retained`` (all if None). Without a
    ``constant`` the bias is zero: budgets count parameters, so that a layer gets no bias that had none.
    """
    weight = as_layer(module).weight.detach().double().flatten(1)
    count, width = weight.shape
    read = Moments.empty(width, weight.device)
    cross, total = weight.new_zeros(count, width), weight.new_zeros(count)
    for z, y in pairs:
        made = y.movedim(channel_axis(module, y.dim()), -1)
        made = (made if retained is None else made[..., retained]).reshape(-1, count)
        most = max(ROWS * width, FEW)
        rows, made = _rows(module, z, most), made[:: stride_for(len(made), most)].double()
        read.add(rows)
        cross += made.mT @ rows
        total += made.sum(0)
    mean = total / max(read.count, 1)
    inner, cross = read.second, cross / max(read.count, 1)
    if constant:
        inner, cross = read.covariance, cross - torch.outer(mean, read.mean)
    if not bool(inner.isfinite().all() and cross.isfinite().all()):
        return None
    scale = inner.diagonal().mean() * RIDGE
    if not scale > 0:
        return None
    regularised = with_ridge(inner, read.ridge) + scale * torch.eye(width, dtype=inner.dtype, device=inner.device)
    change = torch.linalg.solve(regularised, (cross - weight @ inner).mT).mT
    weight = weight + change
    bias = (mean - weight @ read.mean) * constant
    check_finite(weight, bias)
    return weight.view_as(as_layer(module).weight), bias


def _rows(module: nn.Module, x: Tensor, most: int) -> Tensor:
    """Return what the layer's outputs are computed from, one row a position; about ``most`` of more rows."""
    if isinstance(module, CONVS):
        return patches(module, x, most)
    rows = x.reshape(-1, x.shape[-1])
    return rows[:: stride_for(len(rows), most)].double()
