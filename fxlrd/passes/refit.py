"""refit: the last factor of each layer, by least squares, on what the compressed network feeds it.

Factors are fitted to the inputs that the *original* network gives each layer. In the compressed one those have moved
by the errors of all layers before. From the first layer to the last, with z the input of the last factor (or of a
merged layer) in the compressed network, and y the output of the layer in the original one:

    min ‖y − (A + Δ)·z − b‖² + ρ·‖Δ‖²       over Δ and b

so that each layer also makes up for the ones before (asymmetric reconstruction, Zhang et al. 2016). Where the layer has
no bias, b goes into the mean of a BatchNorm after it, or is left out. Both networks run in step: graphs one node at a
time for all inputs, in one pass; models that keep their own forward unit by unit (fxlrd/passes/_refit_regions.py).
Approximate. Where `calibrate` held inputs out, the result is kept only if it brings the outputs on those closer to the
original's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxlrd.calibration.batches import as_batches, as_inputs, examples, first_examples, rows_are_examples, to_fit
from fxlrd.calibration.holdout import Disabled, TooFew, held_out, keep_if_better, reference
from fxlrd.calibration.padding import tokens_of
from fxlrd.calibration.stepper import Stepper
from fxlrd.errors import Reason
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.facts import FACTORS, entangle, provenance, shape
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.run import evaluating
from fxlrd.graph.settings import settings_restored
from fxlrd.graph.surgery import calls, source
from fxlrd.layers.kinds import LAYERS, TRANSPOSED, as_layer, channel_axis, op
from fxlrd.passes._least_squares import CALLED_AGAIN, NOT_FINITE, LeastSquares
from fxlrd.passes._refit_regions import WORSE, refit_regions
from fxlrd.passes.contract import PassResult, Site, Skip
from fxlrd.passes.driver import start
from fxlrd.progress import Progress, quiet

RIDGE = 1e-3
"""ρ, relative to the mean variance of z."""

WIDEST = 2304
"""Layers with a larger fan-in than this are left alone: the fit would take too long."""

ENOUGH, FEWEST = 32, 65536
"""Positions for each number that a layer reads, and for each layer, from which on further inputs are left out."""

ENTANGLED = Reason("entangled", "it does another part of the work than the original layer: a neighbour is in it")
NO_LAYER = Reason("no-layer", "it is no layer")


@dataclass(frozen=True)
class Refit:
    """Refit the last factor of each decomposed layer, and each merged layer, to the original's outputs.

    ``calibration`` are batches as for `Calibrate`, of which the first ``inputs`` examples are used: their activations
    are in memory all at once. Fewer are used where these give each layer positions enough (`ENOUGH`), as sequences of
    many tokens do. ``guard`` keeps the result only where that lowers the error on the inputs that
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
        divisible = partial(rows_are_examples, original)
        readable = to_fit(as_inputs(run.gm, as_batches(self.calibration)), divisible=divisible)
        enough = _inputs_enough(run.gm, original, places)
        batches = first_examples(_until_enough(readable, original, enough), self.inputs)
        with evaluating(run.gm), evaluating(original), settings_restored(), torch.no_grad():
            if captured_or_bare(gm).user_forward:
                replaceable = {name: place.call for name, place in places.items()}
                return refit_regions(run, original, replaceable, batches, inputs_held_out)
            steppers = Stepper(run.gm, batches), Stepper(original, batches)
            tokens = [tokens_of(run.gm, inputs) for inputs in batches]
            run.each(places, lambda name: _refit(run.gm, name, places[name], *steppers, tokens))
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
    if any(p is not None and p.entangled for p in map(provenance, nodes)):
        return ENTANGLED
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
    return Place(last[0], original_calls[0])


def _inputs_enough(gm: fx.GraphModule, original: fx.GraphModule, places: Mapping[str, Place]) -> int:
    """Return how many examples give each layer `ENOUGH` positions, by the shapes for the example inputs."""
    given, enough = examples(captured_or_bare(original).inputs), 1
    for place in places.values():
        module, made = gm.get_submodule(str(place.call.target)), shape(place.original)
        if made is None:
            return sys.maxsize
        width, channels = as_layer(module).weight[0].numel(), made[channel_axis(module, len(made))]
        positions = max(ENOUGH * width, FEWEST)
        enough = max(enough, math.ceil(positions * given * channels / max(math.prod(made), 1)))
    return enough


def _until_enough(batches: Iterable[Inputs], gm: fx.GraphModule, enough: float) -> Iterator[Inputs]:
    """Yield batches until they have the positions of ``enough`` examples without padding."""
    for inputs in batches:
        yield inputs
        tokens = tokens_of(gm, inputs)
        enough -= examples(inputs) * (1.0 if tokens is None else float(tokens.double().mean()))
        if enough <= 0:
            return


def _refit(
    gm: fx.GraphModule,
    name: str,
    place: Place,
    compressed: Stepper,
    original: Stepper,
    tokens: Sequence[Tensor | None],
) -> Site | Skip:
    """Refit the module at a place to the output of the original layer. Both networks run up to it."""
    read = source(place.call)
    assert read is not None
    original.through(place.original)
    compressed.before(place.call)
    fit = LeastSquares(gm, place.call, RIDGE)
    for z, y, each in zip(compressed.values(read), original.values(place.original), tokens, strict=True):
        fit.add(z, y, each)
    made = fit.modules()
    if made is None:
        return Skip(name, NOT_FINITE)
    for target, module in made.items():
        gm.set_submodule(target, module)
    if len(made) > 1:  # a BatchNorm holds the constant
        entangle(gm, name)
    return Site(name, False, "refitted")
