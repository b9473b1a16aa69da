"""The one way to the times of layers: cached or measured, all in seconds of the same minutes.

A time in seconds is only comparable to one taken in the same minute: other load, the clock rate and the temperature
change it. So each variant is timed beside the first of its signature, and that beside a reference kernel. With t the
times of those rounds and T those in the minute of this run, the seconds of a variant are

    T(variant) = t(variant)/t(first) · t(first)/t(kernel) · T(kernel)

in whatever minute, or on whatever day, the ratios were measured. T(kernel) is measured once in a run. A model whose
time is set against that of its layers is timed beside the kernel too.

Beside other load a long computation is interrupted, and a short one seldom is. So the kernel is repeated until it lasts
as long as what it is timed beside: then both are slowed down alike, and their ratio holds. Variants of one
signature differ in length. Where a ratio is uncertain for that reason, it is good for this run only, and not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fxlrd.graph.inputs import Inputs
from fxlrd.sharing import FirstsTimer
from fxlrd.timing.cache import Cache, Entry, Ratio, Setting
from fxlrd.timing.clock import Timer, Timing, compare, once
from fxlrd.timing.inductor import Compile, check
from fxlrd.timing.models import device_of
from fxlrd.timing.multiply import reference_kernel
from fxlrd.timing.workload import Workload, prepare, time_workloads

REFERENCE, REFERENCE_ALONE = "reference", "reference, alone"
"""The names that the reference kernel is timed by: repeated as often as fits, and once."""
_UNCERTAIN = 0.2
"""The spread of a ratio, relative to it, beyond which it is not stored."""
_KERNEL_REPEATS, _KERNEL_SECONDS, _MOST_REPEATS = 32, 0.3, 1000
_SIDE_BY_SIDE = 10
"""Variants that are timed together, beside the first; each such group is stored as soon as it is timed."""


@dataclass
class Stopwatch:
    """Times for one run of a pass or report; what memory or the cache on disk holds is not timed again.

    Attributes:
        under_inductor: times under Inductor with frozen weights, or in int8.
        seconds: bounds the timing of the variants of one signature.
        cached: whether timings on disk are read and written; those of processes that share a timer are not, since what
            one of them finds there, and does not time, others may not.
        timer: what measures.
        rough: what says roughly how long something takes.
        drift: the largest factor, at least 1, by which the reference kernel was faster or slower beside a timing that
            was asked for than it is in this run.
        load: how many times as long the reference kernel took when it was repeated for as long as a model that was
            timed: above 1 there is other load on the machine.
    """

    under_inductor: Compile = False
    seconds: float = 1.5
    cached: bool = True
    timer: Timer = compare
    rough: Timer = once
    drift: float = field(default=1.0, init=False)
    load: float = field(default=1.0, init=False)
    _entries: dict[tuple[torch.device, str], Entry] = field(default_factory=dict, init=False, repr=False)
    _kernel_seconds: dict[torch.device, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check(self.under_inductor)
        self.cached = self.cached and not isinstance(self.timer, FirstsTimer)

    def times(
        self, signature: str, device: torch.device, variants: Mapping[str, Callable[[], Workload]]
    ) -> dict[str, Timing]:
        """Return a timing for each of ``variants``; ratios are to the first, which is timed beside each of the others.

        ``variants`` maps names to functions that make the workload; they are called for those that must be timed. The
        times depend on the ``signature``, the name and the setting alone.
        """
        first = next(iter(variants))
        entry = self._entry(signature, device)
        if entry is not None and first not in entry.timings:  # the others' ratios are to another variant
            entry = None
        for group in _groups(list(variants), entry):
            entry = self._measured(entry, device, {name: variants[name]() for name in group})
            self._entries[device, signature] = entry
            if self.cached and _is_certain(entry.reference):
                certain = {name: ratio for name, ratio in entry.timings.items() if _is_certain(ratio)}
                setting = Setting.current(device, self.under_inductor)
                Cache().store(setting, signature, replace(entry, timings=certain))
        assert entry is not None
        kernel = self._seconds_of_kernel(device)
        change = entry.reference_seconds / kernel
        self.drift = max(self.drift, change, 1 / change)
        seconds = kernel / entry.reference.ratio
        ratios = {name: entry.timings[name] for name in variants}
        return {name: Timing(seconds * each.ratio, each.ratio, each.spread) for name, each in ratios.items()}

    def time_model(self, model: nn.Module, inputs: Inputs, seconds: float = 2.0) -> Timing:
        """Time a model in the seconds of this run, to set against those of its layers.

        The spread is that of its time, relative.
        """
        device, inputs = device_of(model, inputs), inputs.fresh()
        workload = Workload([(model, inputs)], self.under_inductor)
        repeats, kernel = self._kernel_as_long_as(workload, device)
        workloads = {REFERENCE: kernel, "model": workload, REFERENCE_ALONE: reference_kernel(device)}
        timings = time_workloads(workloads, device, seconds, self.timer)
        measured, timing = timings[REFERENCE].seconds / repeats, timings["model"]
        self.load = max(self.load, measured / timings[REFERENCE_ALONE].seconds)
        own = self._kernel_seconds.setdefault(device, measured)
        return Timing(timing.seconds * own / measured, spread=timing.spread / timing.ratio)

    def _entry(self, signature: str, device: torch.device) -> Entry | None:
        """Return what memory, or else the cache on disk, holds of a signature."""
        if (device, signature) not in self._entries and self.cached:
            entry = Cache().load(Setting.current(device, self.under_inductor), signature)
            if entry is not None:
                self._entries[device, signature] = entry
        return self._entries.get((device, signature))

    def _measured(self, entry: Entry | None, device: torch.device, workloads: dict[str, Workload]) -> Entry:
        """Return the entry with the workloads' timings, which are measured; what it has already stays."""
        if entry is not None:
            timings = time_workloads(workloads, device, self.seconds, self.timer)
            return replace(entry, timings={**_ratios(timings), **entry.timings})
        prepare(workloads.values())  # also those that are not called at once
        repeats, kernel = self._kernel_as_long_as(next(iter(workloads.values())), device)
        timings = time_workloads({**workloads, REFERENCE: kernel}, device, self.seconds, self.timer)
        reference = timings.pop(REFERENCE)
        ratio = Ratio(reference.ratio / repeats, reference.spread / repeats)
        return Entry(_ratios(timings), ratio, reference.seconds / repeats)

    def _kernel_as_long_as(self, workload: Workload, device: torch.device) -> tuple[int, Workload]:
        """Return the reference kernel, repeated until it lasts about as long as the workload, and how often that is."""
        kernel = reference_kernel(device)
        rough = time_workloads({"workload": workload, REFERENCE: kernel}, device, 0.0, self.rough)
        repeats = min(max(1, round(rough["workload"].seconds / rough[REFERENCE].seconds)), _MOST_REPEATS)
        return repeats, reference_kernel(device, repeats)

    def _seconds_of_kernel(self, device: torch.device) -> float:
        """Return how long the reference kernel takes in this run; it is timed at most once."""
        if device not in self._kernel_seconds:
            workloads = {REFERENCE: reference_kernel(device, _KERNEL_REPEATS)}
            timings = time_workloads(workloads, device, _KERNEL_SECONDS, self.timer)
            self._kernel_seconds[device] = timings[REFERENCE].seconds / _KERNEL_REPEATS
        return self._kernel_seconds[device]


def _is_certain(ratio: Ratio) -> bool:
    return ratio.spread <= _UNCERTAIN * ratio.ratio


def _ratios(timings: Mapping[str, Timing]) -> dict[str, Ratio]:
    return {name: Ratio(timing.ratio, timing.spread) for name, timing in timings.items()}


def _groups(names: list[str], entry: Entry | None) -> list[list[str]]:
    """Return the variants to time, in groups to time side by side; the first of ``names`` is in each group."""
    missing = [name for name in names[1:] if entry is None or name not in entry.timings]
    if not missing:
        return [] if entry is not None else [names[:1]]
    return [[names[0], *missing[start : start + _SIDE_BY_SIDE]] for start in range(0, len(missing), _SIDE_BY_SIDE)]
