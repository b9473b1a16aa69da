"""Error curves that are measured: predicted ones, scaled by what changes of the layer or group alone do to the model.

A predicted error takes the errors at different positions of a tensor as independent. Before a mean over positions they
add up, and by how much differs from layer to layer. So each layer is replaced alone by its form at a rank or two, each
group cut alone to a number of channels or two, where the budget may land, and the error of the model's output is
measured (fxlrd/allocation/trials.py). With the predicted errors eᵢ of these changes and the measured ones mᵢ,

    e → e·f(e),   log f linear in log e between log(mᵢ / eᵢ), constant beyond

The scaled curve rises with the predicted one; where it would not, f is the geometric mean of the two.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

from torch import fx

from fxlrd.allocation.choices import Choice
from fxlrd.allocation.factored import Factored
from fxlrd.allocation.merges import Merging, readers
from fxlrd.allocation.trials import Modules, Trial, measure
from fxlrd.calibration.batches import examples
from fxlrd.calibration.holdout import Holdout, first_held_out
from fxlrd.errors import Reason
from fxlrd.factor.interpolative import reconstruction
from fxlrd.graph import cost
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.layer import Layer
from fxlrd.layers.compose import fold_inputs
from fxlrd.layers.forms import Ranks
from fxlrd.progress import Progress

POINTS = (1.0, 0.5)
"""Where a curve is measured: at these multiples of the largest and the least of the budgets' shares of its cost."""
WORK = 1e12
"""FLOPs that all trials may take: few inputs of a large model are run. By a clock, no run would be reproducible."""
ENOUGH = 8
"""Inputs from which on a second point of each curve says more than further inputs."""
WITHIN = 100.0
"""Factor by which a scale may differ from the median of all."""
_NOTHING = 1e-12
"""The scale of a layer that the output does not depend on."""


def goals_of(shares: Sequence[float]) -> tuple[float, ...]:
    """Return the shares of a layer's cost to measure its curve at, for budgets that leave these shares of the layers.

    >>> goals_of([0.5]), goals_of([0.75, 0.5, 0.25])
    ((0.5, 0.25), (0.75, 0.125))
    """
    high, low = POINTS
    return (high * max(shares), low * min(shares))


def trial_of_layer(layer: Layer, forms: Sequence[Choice], goals: Sequence[float], factored: Factored) -> Trial:
    """Return the layer's forms to try, of which the last of ``forms``, the original, is none."""
    *cheaper, original = forms
    picks = [cheaper[i] for i in _nearest([form.cost / original.cost for form in cheaper], goals)]
    changes = tuple(partial(_formed, layer, form.ranks, factored) for form in picks if form.ranks is not None)
    return Trial(layer.name, (layer.name,), tuple(form.error for form in picks), changes)


def _formed(layer: Layer, ranks: Ranks, factored: Factored) -> Modules:
    return {layer.name: factored.at(layer, ranks).eval()}


def trial_of_group(gm: fx.GraphModule, name: str, merging: Merging, goals: Sequence[float]) -> Trial:
    """Return the cuts of a group to try: only its consumers change, which read no dropped channel any more."""
    counts = sorted(merging.options)
    picks = [counts[i] for i in _nearest([count / merging.group.channels for count in counts], goals)]
    layers = tuple(str(consumer.node.target) for consumer in merging.group.consumers)
    changes = tuple(partial(_reading, gm, merging, count) for count in picks)
    return Trial(name, layers, tuple(merging.options[count].error for count in picks), changes)


def _reading(gm: fx.GraphModule, merging: Merging, count: int) -> Modules:
    """Return a group's consumers such that they read its retained channels only, in the place where these are."""
    read, retained = readers(gm, merging.group), merging.retained(count)
    assert not isinstance(read, Reason)
    modules = {}
    for reader in read:
        matrix, shift = reconstruction(reader.second, retained, reader.ridge, reader.mean)
        wide = matrix.new_zeros(len(matrix), len(matrix))
        wide[:, retained] = matrix
        folded = fold_inputs(reader.module, wide, reader.consumer.block, shift)
        modules[str(reader.consumer.node.target)] = folded.eval()
    return modules


def _nearest(costs: Sequence[float], goals: Sequence[float]) -> list[int]:
    """Return the indices of the costs nearest to each of the ``goals``."""
    return list(dict.fromkeys(min(range(len(costs)), key=lambda i: abs(costs[i] - goal)) for goal in goals))


def measured(
    gm: fx.GraphModule,
    items: Mapping[str, list[Choice]],
    groups: Mapping[str, Merging],
    trials: Sequence[Trial],
    held_out: Holdout,
    most: int,
    progress: Progress[Trial],
) -> tuple[dict[str, list[Choice]], dict[str, Merging]]:
    """Return the layers' forms and the groups with their errors scaled to what trials of them measure.

    ``trials`` are those of the layers, then those of the groups, in the order of ``groups``. They run on at most
    ``most`` held-out inputs, and take no more than `WORK`.
    """
    chosen, inputs = affordable(trials, _work_of_a_change(gm))
    errors = measure(gm, first_held_out(gm, held_out, min(most, inputs)), [*chosen.values()], progress)
    measured_scales = {i: Scale.of(t.predicted, each) for (i, t), each in zip(chosen.items(), errors, strict=True)}
    scales = _filled_in(trials, within_reason(measured_scales))
    of_layers = len(trials) - len(groups)
    by_layer = {trial.name: scale for trial, scale in zip(trials[:of_layers], scales, strict=False)}
    return (
        {name: _scaled_forms(forms, by_layer[name]) if name in by_layer else forms for name, forms in items.items()},
        {name: _scaled_group(groups[name], scale) for name, scale in zip(groups, scales[of_layers:], strict=True)},
    )


def _work_of_a_change(gm: fx.GraphModule) -> float:
    """Return the FLOPs of running what follows a change, for one input, on average."""
    capture = captured_or_bare(gm)
    return max(1.0, (cost.flops(gm) + capture.outside.flops) / examples(capture.inputs) / 2)


def affordable(trials: Sequence[Trial], work: float) -> tuple[dict[int, Trial], int]:
    """Return the trials that `WORK` allows, by index, and the number of inputs.

    ``work`` is that of one change, for one input. Where `ENOUGH` inputs are not within it, one change of each is tried;
    where one input is not, some of the layers that are alike, spread evenly over the model, the first and the last of
    them always.
    """
    changes = sum(len(trial.changes) for trial in trials)
    if changes * work * ENOUGH <= WORK:
        return dict(enumerate(trials)), int(WORK / max(changes * work, 1.0))
    single = [replace(trial, predicted=trial.predicted[:1], changes=trial.changes[:1]) for trial in trials]
    stride = max(1, math.ceil(len(trials) * work / WORK))
    indices = [i for alike in _kinds(trials).values() for i in dict.fromkeys([*alike[::stride], alike[-1]])]
    return {i: single[i] for i in sorted(indices)}, max(1, int(WORK / (len(indices) * work)))


def _kinds(trials: Sequence[Trial]) -> dict[tuple[str, bool], list[int]]:
    """Return the trials of layers that are alike, as those of a model's blocks are: by their names without numbers."""
    kinds: dict[tuple[str, bool], list[int]] = {}
    for i, trial in enumerate(trials):
        kinds.setdefault((re.sub(r"\d+", "", trial.name), trial.layers == (trial.name,)), []).append(i)
    return kinds


def _filled_in(trials: Sequence[Trial], measured_scales: Mapping[int, Scale]) -> list[Scale]:
    """Return the scales of all trials: between two that are known of layers alike, log f is linear in their number."""
    scales = dict(measured_scales)
    for alike in _kinds(trials).values():
        at = [k for k, i in enumerate(alike) if i in measured_scales]
        for a, b in itertools.pairwise(at):
            low, high = measured_scales[alike[a]].points[0][1], measured_scales[alike[b]].points[0][1]
            for k in range(a + 1, b):
                scales[alike[k]] = Scale(((0.0, low + (high - low) * (k - a) / (b - a)),))
    return [scales[i] for i in range(len(trials))]


@dataclass(frozen=True)
class Scale:
    """A factor for predicted errors, by their logarithm: points of (log e, log f), ascending; none where not known."""

    points: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, predicted: Sequence[float], errors: Sequence[float]) -> Scale:
        """Return the scale that measured errors give: none where they are not finite, `_NOTHING` where all are 0."""
        if errors and not any(errors):
            return cls(((0.0, math.log(_NOTHING)),))
        pairs = [(p, m) for p, m in zip(predicted, errors, strict=True) if p > 0 and 0 < m < math.inf]
        points = sorted((math.log(p), math.log(m / p)) for p, m in pairs)
        if len(points) == 2 and sum(points[0]) >= sum(points[1]):
            points = [(points[0][0], (points[0][1] + points[1][1]) / 2)]
        return cls(tuple(points))

    def __call__(self, error: float) -> float:
        """Return a predicted error, scaled."""
        if not self.points or error <= 0:
            return error
        (low, at_low), (high, at_high) = self.points[0], self.points[-1]
        share = 0.0 if high == low else min(1.0, max(0.0, (math.log(error) - low) / (high - low)))
        return error * math.exp(at_low + share * (at_high - at_low))


def within_reason(scales: Mapping[int, Scale]) -> dict[int, Scale]:
    """Return the scales within a factor of `WITHIN` of the median of all; that is the scale where nothing is known."""
    nothing = math.log(_NOTHING)
    factors = [factor for scale in scales.values() for _, factor in scale.points if factor > nothing]
    middle, reach = median(factors) if factors else 0.0, math.log(WITHIN)

    def within(factor: float) -> float:
        return factor if factor <= nothing else min(middle + reach, max(middle - reach, factor))

    return {i: Scale(tuple((e, within(f)) for e, f in s.points) or ((0.0, middle),)) for i, s in scales.items()}


def _scaled_forms(forms: Sequence[Choice], scale: Scale) -> list[Choice]:
    """Return the forms with their errors scaled."""
    return [replace(form, error=scale(form.error)) for form in forms]


def _scaled_group(merging: Merging, scale: Scale) -> Merging:
    """Return the group with the errors of its options scaled."""
    options = {count: option._replace(error=scale(option.error)) for count, option in merging.options.items()}
    return replace(merging, options=options)
