"""Error curves that are measured: predicted ones, scaled by what changes of the layer or group alone do to the model.

A predicted error takes the errors at different positions of a tensor as independent. Before a mean over positions they
add up, and by how much differs from layer to layer. So each layer is replaced alone by its form at a rank or two, each
group cut alone to a number of channels or two, where the budget may land, and the error of the model's output is
measured (fxlrd/allocation/trials.py). With the predicted errors eᵢ of these changes and the measured ones mᵢ,

    e → e·f(e),   log f linear in log e between log(mᵢ / eᵢ), constant beyond

The scaled curve rises with the predicted one; where it would not, f is the geometric mean of the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from torch import fx

from fxlrd.allocation.choices import Choice, Curve
from fxlrd.allocation.merges import Merging, interpolations, readers
from fxlrd.allocation.trials import Trial, measure
from fxlrd.calibration.batches import examples
from fxlrd.calibration.holdout import Holdout, first_held_out
from fxlrd.errors import Reason
from fxlrd.graph import cost
from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.layer import Layer
from fxlrd.graph.surgery import calls
from fxlrd.layers.compose import fold_inputs
from fxlrd.progress import Progress

POINTS = (1.0, 0.5)
"""Where a curve is measured: at these multiples of the budget's share of the layer's cost."""
WORK = 1e12
"""FLOPs that all trials may take: few inputs of a large model are run. By a clock, no run would be reproducible."""
WITHIN = 100.0
"""Factor by which a scale may differ from the median of all."""
_NOTHING = 1e-12
"""The scale of a layer that the output does not depend on."""


def trial_of_layer(layer: Layer, forms: Sequence[Choice], curve: Curve, share: float) -> Trial:
    """Return the layer's forms to try, of which the last of ``forms``, the original, is none."""
    *cheaper, original = forms
    picks = [cheaper[i] for i in _nearest([form.cost / original.cost for form in cheaper], share)]
    changes = tuple({layer.name: curve.layer(form.ranks).eval()} for form in picks if form.ranks is not None)
    return Trial(layer.name, layer.calls[0], tuple(form.error for form in picks), changes)


def trial_of_group(gm: fx.GraphModule, name: str, merging: Merging, share: float) -> Trial:
    """Return the cuts of a group to try: only its consumers change, which read no dropped channel any more."""
    counts = sorted(merging.options)
    picks = [counts[i] for i in _nearest([count / merging.group.channels for count in counts], share)]
    read = readers(gm, merging.group)
    assert not isinstance(read, Reason)
    changes = []
    for count in picks:
        retained = merging.retained(count)
        modules = {}
        for reader, made in zip(read, interpolations(read, retained), strict=True):
            wide = made.matrix.new_zeros(len(made.matrix), len(made.matrix))
            wide[:, retained] = made.matrix
            folded = fold_inputs(reader.module, wide, reader.consumer.block, made.shift)
            modules[str(reader.consumer.node.target)] = folded.eval()
        changes.append(modules)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    first = min((calls(gm, target)[0] for target in changes[0]), key=order.__getitem__)
    return Trial(name, first, tuple(merging.options[count].error for count in picks), tuple(changes))


def _nearest(costs: Sequence[float], share: float) -> list[int]:
    """Return the indices of the costs nearest to the multiples `POINTS` of a share."""
    goals = (share * point for point in POINTS)
    return list(dict.fromkeys(min(range(len(costs)), key=lambda i: abs(costs[i] - goal)) for goal in goals))


def measured(
    gm: fx.GraphModule,
    items: Mapping[str, list[Choice]],
    groups: Mapping[str, Merging],
    trials: Sequence[Trial],
    batches: Sequence[Inputs],
    progress: Progress[Trial],
) -> tuple[dict[str, list[Choice]], dict[str, Merging]]:
    """Return the layers' forms and the groups with their errors scaled to what trials of them measure.

    ``trials`` are those of the layers, then those of the groups, in the order of ``groups``.
    """
    errors = measure(gm, batches, trials, progress)
    scales = within_reason([Scale.of(trial.predicted, each) for trial, each in zip(trials, errors, strict=True)])
    of_layers = len(trials) - len(groups)
    by_layer = {trial.name: scale for trial, scale in zip(trials[:of_layers], scales, strict=False)}
    return (
        {name: _scaled_forms(forms, by_layer[name]) if name in by_layer else forms for name, forms in items.items()},
        {name: _scaled_group(groups[name], scale) for name, scale in zip(groups, scales[of_layers:], strict=True)},
    )


def inputs_for(gm: fx.GraphModule, trials: Sequence[Trial], held_out: Holdout, most: int) -> list[Inputs]:
    """Return ``most`` held-out inputs, or fewer where the trials would take more than `WORK`, but at least one."""
    return first_held_out(gm, held_out, min(most, affordable(gm, sum(len(trial.changes) for trial in trials))))


def affordable(gm: fx.GraphModule, changes: int) -> int:
    """Return the number of inputs, one at least, on which so many changes take `WORK` FLOPs."""
    capture = captured_or_bare(gm)
    each = (cost.flops(gm) + capture.outside.flops) / examples(capture.inputs)
    run = 0.5 if capture.runnable(gm) is gm else 1.0  # of a graph, only what follows the change
    return max(1, int(WORK / max(changes * run * each, 1.0)))


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


def within_reason(scales: Sequence[Scale]) -> list[Scale]:
    """Return the scales within a factor of `WITHIN` of the median of all; that is the scale where nothing is known."""
    factors = [factor for scale in scales for _, factor in scale.points if factor > math.log(_NOTHING)]
    if not factors:
        return list(scales)
    middle, reach = median(factors), math.log(WITHIN)

    def within(factor: float) -> float:
        return factor if factor <= math.log(_NOTHING) else min(middle + reach, max(middle - reach, factor))

    return [Scale(tuple((e, within(f)) for e, f in scale.points) or ((0.0, middle),)) for scale in scales]


def _scaled_forms(forms: Sequence[Choice], scale: Scale) -> list[Choice]:
    """Return the forms with their errors scaled."""
    return [replace(form, error=scale(form.error)) for form in forms]


def _scaled_group(merging: Merging, scale: Scale) -> Merging:
    """Return the group with the errors of its options scaled."""
    options = {count: option._replace(error=scale(option.error)) for count, option in merging.options.items()}
    return replace(merging, options=options)
