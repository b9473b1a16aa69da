"""Where a model's time goes, and which of its layers are worth decomposing: profile(model, example_inputs).

Each conv and linear layer is timed in place, as `snap` does: on an input of the shape, dtype and memory format that it
gets in the model, with the timing cache. Its low-rank form at one ratio is timed beside it, with arbitrary weights: at
the ranks of the ratio and at the hardware multiples below them; the fastest counts. What a layer could save is

    saves = its time · (1 − time of the form / time of the layer)

or nothing where the form is not faster by more than the noise. A layer is *worth* decomposing where that is at least a
tenth of its own time and a thousandth of the model's: small layers count, since a deep model has many. The measured
rate of each layer is set against that of a large matrix multiply in the same dtype on as many threads, the fastest of a
few sizes: a layer far below is bound by memory, by overhead or by its shape, and fewer FLOPs may not make it faster.

The rest of the model's time goes to norms, activations, pooling, and overhead. Layers are timed alone, so that the sum
may be off by some percent: in the model inputs may be in the processor's cache, and Inductor fuses over layers. All
seconds are of the minutes of the profile (fxlrd/timing/stopwatch.py). Figures that cannot be true, as may come of other
load on the machine, are named in ``warnings``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from fxlrd.capturing.model import capture_any
from fxlrd.errors import Reason
from fxlrd.graph import cost, facts
from fxlrd.graph.captured import Unreached, captured_or_bare, runnable
from fxlrd.graph.copies import structural_copy
from fxlrd.graph.facts import times
from fxlrd.graph.guards import check_names
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.layer import Layer, layers_of
from fxlrd.layers.forms import Ranks, ranks_by_ratio, ranks_text
from fxlrd.layers.kinds import as_layer, channels_per_group, op
from fxlrd.progress import Progress, quiet
from fxlrd.ranks import check_ratio
from fxlrd.report.profile_table import profile_text
from fxlrd.timing.cache import Setting
from fxlrd.timing.clock import Timer, Timing, compare
from fxlrd.timing.inductor import Compile
from fxlrd.timing.layers import ORIGINAL, placed, time_ranks
from fxlrd.timing.models import device_of
from fxlrd.timing.peak import peak_rate
from fxlrd.timing.search import grid
from fxlrd.timing.stopwatch import Stopwatch

WORTH, FELT = 0.1, 0.001
"""A layer is worth decomposing where that saves these shares of its own and of the model's time."""
TOLERANCE = 0.1
"""Share by which a sum or a rate may exceed its bound, as timings are uncertain, before it is called untrue."""
LOAD = 1.25
"""Factor by which long computations may be slower than short ones before other load is mentioned."""
DRIFT = 1.5
"""Factor by which the speed of the machine may change between timings before that is mentioned."""
_FLOOR = 0.75


@dataclass(frozen=True)
class LayerTime:
    """How long one conv or linear layer takes, and what its low-rank form would save. None: not known.

    Attributes:
        name: the layer's name in the model.
        op: its type, such as Conv2d.
        shape: of its weight.
        input: the shape of its input, at the first call.
        layout: the memory format of its input, at the first call.
        calls: in one run of the model.
        params: its parameters.
        flops: of all calls (2 × multiply-adds).
        latency_ms: of all calls.
        share: of the model's time.
        rate: FLOP/s.
        of_peak: the rate as a share of the peak.
        ranks: of its low-rank form.
        ratio: the form's time relative to the layer's.
        saves_ms: what the form saves of the layer's time.
        worth: whether the layer is worth decomposing.
        reason: why it is not.
    """

    name: str
    op: str
    shape: list[int]
    input: list[int] | None = None
    layout: str | None = None
    calls: int = 0
    params: int = 0
    flops: int | None = None
    latency_ms: float | None = None
    share: float | None = None
    rate: float | None = None
    of_peak: float | None = None
    ranks: list[int | None] | None = None
    ratio: float | None = None
    saves_ms: float = 0.0
    worth: bool = False
    reason: str | None = None

    @classmethod
    def unreached(cls, name: str, layer: Unreached) -> LayerTime:
        """Return the row of a layer that no node of the graph stands for."""
        return cls(name, layer.op, list(layer.shape), params=layer.params, reason=str(layer.reason))


@dataclass(frozen=True)
class Profile:
    """Where a model's time goes.

    Attributes:
        model: the name of the model's class.
        device: the processor that it ran on.
        settings: ``inputs`` (in words), ``ratio``, ``compile``, ``threads``, ``torch``.
        total: ``params``, ``flops``, ``latency_ms`` (of the model), ``layers_ms`` (of its layers together),
            ``saves_ms``.
        peak: the rate of a matrix multiply in FLOP/s; 0 for a model without layers.
        layers: a dict for each conv and linear layer, sorted by time, see `LayerTime`.
        warnings: which of these figures are in doubt, and why.
    """

    model: str
    device: str
    settings: dict[str, Any]
    total: dict[str, Any]
    peak: float
    layers: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as plain data, fit for JSON."""
        names = ("model", "device", "settings", "total", "peak", "layers", "warnings")
        return {name: getattr(self, name) for name in names}

    def to_table(self) -> str:
        """Return the profile as text."""
        return profile_text(self.to_dict(), WORTH, 1 + TOLERANCE)


def profile(
    model: nn.Module,
    example_inputs: Any,
    *,
    ratio: float = 2.0,
    skip: Sequence[str] = (),
    compile: Compile = False,
    seconds: float = 1.0,
    cache: bool = True,
    progress: Progress = quiet,
    timer: Timer = compare,
) -> Profile:
    """Time a model's layers in place, and their low-rank forms at ``ratio``.

    The arguments are as in `compress`; ``seconds`` bounds the timing of one layer signature, and without ``cache`` the
    timings on disk are neither read nor written. The model is not changed. Raises FxlrdError as `compress` does.
    """
    check_ratio(ratio)
    inputs = Inputs.of(example_inputs)
    gm = capture_any(model, inputs)
    check_names(gm, skip)
    device = device_of(model, inputs)
    setting = Setting.current(device, compile)
    stopwatch = Stopwatch(compile, seconds, cache, timer)
    capture = captured_or_bare(gm)
    own = structural_copy(capture.model or model)  # a run may leave something on the model
    model_time = stopwatch.time_model(runnable(gm) if compile else own, inputs)
    layers = layers_of(gm)
    dtypes = dict.fromkeys(as_layer(layer.module).weight.dtype for layer in layers)
    peak = max((peak_rate(dtype, device, stopwatch) for dtype in dtypes), default=0.0)
    rows = [
        _layer_time(layer, _candidates(layer, ratio, skip), stopwatch, model_time.seconds, peak)
        for layer in progress(layers, "profile")
    ]
    rows.sort(key=lambda row: -(row.latency_ms or 0.0))
    rows += [LayerTime.unreached(name, layer) for name, layer in capture.unreached.items()]
    total = {
        "params": cost.params(model),
        "flops": cost.flops(gm) + capture.outside.flops,
        "latency_ms": model_time.seconds * 1e3,
        "layers_ms": sum(row.latency_ms or 0.0 for row in rows),
        "saves_ms": sum(row.saves_ms for row in rows if row.worth),
    }
    settings = {"inputs": inputs.describe(), "ratio": ratio, "compile": compile}
    settings |= {"threads": setting.threads, "torch": setting.torch_version}
    doubts = _doubts(rows, total, model_time.spread, stopwatch)
    return Profile(type(model).__name__, setting.device, settings, total, peak, [asdict(row) for row in rows], doubts)


def _candidates(layer: Layer, ratio: float, skip: Sequence[str]) -> list[Ranks] | Reason:
    """Return the ranks to time a layer's form at, or why it has none."""
    reason = layer.why_left_alone(skip)
    ranks = ranks_by_ratio(layer.module, ratio) if reason is None else reason
    if isinstance(ranks, Reason):
        return ranks
    lowest: Ranks = tuple(None if r is None else math.ceil(_FLOOR * r) for r in ranks)
    return grid(ranks, lowest, channels_per_group(layer.module)[2])


def _layer_time(
    layer: Layer, candidates: list[Ranks] | Reason, stopwatch: Stopwatch, model_seconds: float, peak: float
) -> LayerTime:
    """Time a layer in all its calls, and its forms."""
    places = placed(layer.calls, layer.module)
    reason = next((each for each in (places, candidates) if isinstance(each, Reason)), None)
    ranks = [] if isinstance(candidates, Reason) else candidates
    flops = sum(facts.flops(node) for node in layer.calls)
    measured: dict[str, Any] = {"reason": None if reason is None else str(reason)}
    if not isinstance(places, Reason):
        timings = time_ranks(places, ranks, stopwatch)
        seconds = timings[ORIGINAL].seconds
        rate = flops / seconds
        measured |= {"input": list(places[0].shape), "layout": places[0].layout, "latency_ms": seconds * 1e3}
        measured |= {"share": seconds / model_seconds, "rate": rate, "of_peak": rate / peak if peak else None}
        if ranks:
            measured |= _savings(timings, ranks, model_seconds)
    return LayerTime(
        name=layer.name,
        op=op(layer.module),
        shape=list(as_layer(layer.module).weight.shape),
        calls=sum(times(node) for node in layer.calls),
        params=cost.params(layer.module),
        flops=flops,
        **measured,
    )


def _savings(timings: Mapping[str, Timing], candidates: Sequence[Ranks], model_seconds: float) -> dict[str, Any]:
    """Return ranks, ratio and savings of the fastest form, and whether it is worth it or else why not."""
    best = min(candidates, key=lambda ranks: timings[ranks_text(ranks)].ratio)
    timing, seconds = timings[ranks_text(best)], timings[ORIGINAL].seconds
    ratio, saves, reason = timing.ratio, 0.0, None
    if timing.faster():
        saves = seconds - timing.seconds
    if not saves:
        reason = "its form is not faster" + ("" if ratio >= 1 else " by more than the noise")
    elif saves < WORTH * seconds:
        reason = f"saves less than {WORTH:.0%} of its time"
    elif saves < FELT * model_seconds:
        reason = f"saves less than {FELT:.1%} of the model's time"
    return {"ranks": list(best), "ratio": ratio, "saves_ms": saves * 1e3, "worth": reason is None, "reason": reason}


def _doubts(rows: Sequence[LayerTime], total: dict[str, Any], spread: float, stopwatch: Stopwatch) -> list[str]:
    """Return which figures cannot be true or are uncertain, and why."""
    doubts = []
    if spread > TOLERANCE:
        doubts.append(f"the model's time is uncertain by ± {spread:.0%}; profile it again without other load")
    if stopwatch.load > LOAD:
        doubts.append(
            f"there is other load on this machine: what lasts as long as the model takes {stopwatch.load:.1f}× its time"
        )
    if stopwatch.drift > DRIFT * stopwatch.load:
        doubts.append(
            f"the machine was up to {stopwatch.drift:.1f}× as fast or as slow when some of the layers were timed; "
            "their times are scaled to its speed now"
        )
    share = total["layers_ms"] / total["latency_ms"]
    if share > 1 + TOLERANCE:
        doubts.append(
            f"the layers, timed alone, add up to {share:.0%} of the model's time, so shares and savings are too large: "
            "there was other load, or Inductor fuses over layers"
        )
    above = [row.of_peak for row in rows if row.of_peak is not None and row.of_peak > 1 + TOLERANCE]
    if above:
        doubts.append(
            f"rates above the peak ({len(above)} layers, up to {max(above):.0%} of it): there was other load, or a "
            "kernel faster than a matrix multiply (Winograd, TF32)"
        )
    return doubts
