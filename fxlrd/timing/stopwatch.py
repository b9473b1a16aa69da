"""The one way to the times of layers: cached or measured, all in seconds of the same minutes.

A time in seconds is only comparable to one taken in the same minute: other load, the clock rate and the temperature
change it. So each variant is timed beside the first of its signature and a reference kernel (`reference_kernel`). With
t the times of those rounds and T those in the minute of this run, its seconds are

    T(variant) = t(variant)/t(first) · t(first)/t(kernel) · T(kernel)

whatever minute, or day, they were measured in; T(kernel) is measured once in a run. A model whose time is set against
that of its layers is timed beside the kernel too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from fxlrd.graph.inputs import Inputs
from fxlrd.timing.cache import Cache, Entry, Ratio, Setting
from fxlrd.timing.clock import Timer, Timing, compare
from fxlrd.timing.models import device_of
from fxlrd.timing.multiply import reference_kernel
from fxlrd.timing.workload import Workload, time_workloads

REFERENCE = "reference"
"""The name that the reference kernel is timed by."""
_KERNEL_SECONDS = 0.3
_SIDE_BY_SIDE = 10
"""Variants that are timed together, beside the first; each such group is stored as soon as it is timed."""


@dataclass
class Stopwatch:
    """Times for one run of a pass or report; what memory or the cache on disk holds is not timed again.

    Attributes:
        under_inductor: times under Inductor with frozen weights.
        seconds: bounds the timing of the variants of one signature.
        cached: whether timings on disk are read and written.
        timer: what measures.
        drift: the largest factor, at least 1, by which the reference kernel was faster or slower beside a timing that
            was asked for than it is in this run.
    """

    under_inductor: bool = False
    seconds: float = 1.5
    cached: bool = True
    timer: Timer = compare
    drift: float = field(default=1.0, init=False)
    _entries: dict[tuple[torch.device, str], Entry] = field(default_factory=dict, init=False, repr=False)
    _kernels: dict[torch.device, Workload] = field(default_factory=dict, init=False, repr=False)
    _kernel_seconds: dict[torch.device, float] = field(default_factory=dict, init=False, repr=False)

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
            if self.cached:
                Cache().store(Setting.current(device, self.under_inductor), signature, entry)
        assert entry is not None
        seconds = self._seconds_of_kernel(device) / entry.reference.ratio
        change = entry.reference_seconds / self._seconds_of_kernel(device)
        self.drift = max(self.drift, change, 1 / change)
        ratios = {name: entry.timings[name] for name in variants}
        return {name: Timing(seconds * each.ratio, each.ratio, each.spread) for name, each in ratios.items()}

    def time_model(self, model: nn.Module, inputs: Inputs, seconds: float = 2.0) -> Timing:
        """Time a model in the seconds of this run, to set against those of its layers.

        The spread is that of its time, relative.
        """
        device, inputs = device_of(model, inputs), inputs.fresh()
        workloads = {REFERENCE: self._kernel(device), "model": Workload([(model, inputs)], self.under_inductor)}
        timings = time_workloads(workloads, device, seconds, self.timer)
        kernel, timing = timings[REFERENCE].seconds, timings["model"]
        own = self._kernel_seconds.setdefault(device, kernel)
        return Timing(timing.seconds * own / kernel, spread=timing.spread / timing.ratio)

    def _entry(self, signature: str, device: torch.device) -> Entry | None:
        """Return what memory, or else the cache on disk, holds of a signature."""
        if (device, signature) not in self._entries and self.cached:
            entry = Cache().load(Setting.current(device, self.under_inductor), signature)
            if entry is not None:
                self._entries[device, signature] = entry
        return self._entries.get((device, signature))

    def _measured(self, entry: Entry | None, device: torch.device, workloads: dict[str, Workload]) -> Entry:
        """Return the entry with the workloads' timings, which are measured; what it has already stays."""
        timings = time_workloads({**workloads, REFERENCE: self._kernel(device)}, device, self.seconds, self.timer)
        kernel = timings.pop(REFERENCE)
        self._kernel_seconds.setdefault(device, kernel.seconds)
        ratios = {name: Ratio(timing.ratio, timing.spread) for name, timing in timings.items()}
        if entry is None:
            return Entry(ratios, Ratio(kernel.ratio, kernel.spread), kernel.seconds)
        return Entry({**ratios, **entry.timings}, entry.reference, entry.reference_seconds)

    def _kernel(self, device: torch.device) -> Workload:
        if device not in self._kernels:
            self._kernels[device] = reference_kernel(device)
        return self._kernels[device]

    def _seconds_of_kernel(self, device: torch.device) -> float:
        """Return how long the reference kernel takes in this run; it is timed at most once."""
        if device not in self._kernel_seconds:
            timings = time_workloads({REFERENCE: self._kernel(device)}, device, _KERNEL_SECONDS, self.timer)
            self._kernel_seconds[device] = timings[REFERENCE].seconds
        return self._kernel_seconds[device]


def _groups(names: list[str], entry: Entry | None) -> list[list[str]]:
    """Return the variants to time, in groups to time side by side; the first of ``names`` is in each group."""
    missing = [name for name in names[1:] if entry is None or name not in entry.timings]
    if not missing:
        return [] if entry is not None else [names[:1]]
    return [[names[0], *missing[start : start + _SIDE_BY_SIDE]] for start in range(0, len(missing), _SIDE_BY_SIDE)]
