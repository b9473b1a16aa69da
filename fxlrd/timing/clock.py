"""Timing on the device.

Variants are timed interleaved, one call of each per round, so that a drift of the machine affects all of them alike.
A variant's figure is the ratio of its time to the first variant's *in the same round*. Rounds go on until the 95 %
interval of every such ratio's median is narrow, or the time allowed is up. The interval is reported with the figure: a
difference that it covers is not called a gain.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

SPREAD = 0.02
"""Half-width of the 95 % interval of a ratio, relative, at which timing stops."""
_ROUNDS = (7, 60)
_SHORTEST = 5e-4


@dataclass(frozen=True)
class Timing:
    """A measured variant: median seconds, median ratio to the reference variant, and the half-width of that
    ratio's 95 % interval.
    """

    seconds: float
    ratio: float = 1.0
    spread: float = 0.0

    def faster(self, other: Timing | None = None) -> bool:
        """Whether this is faster than ``other`` (default: the reference) by more than the noise of both."""
        if other is None:
            return self.ratio + self.spread < 1.0
        noise = (self.spread**2 + other.spread**2) ** 0.5
        return self.ratio + noise < other.ratio


class Timer(Protocol):
    """What times callables: `compare`, or a stand-in whose times are a formula."""

    def __call__(
        self, variants: Mapping[str, Callable[[], object]], device: torch.device, seconds: float = ...
    ) -> dict[str, Timing]:
        """Return a timing for each variant, by its name; ratios are to the first."""
        ...


def compare(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float = 1.5,
    spread: float = SPREAD,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time callables side by side; the first is the reference of the ratios.

    Short calls are repeated inside a sample until it lasts half a millisecond. Stops when the interval of every ratio
    is within ``spread``, relative, or after ``seconds`` (but not before seven rounds).
    """
    wait = _synchronizer(device)
    repeats = {}
    for name, call in variants.items():
        for _ in range(2):  # the first calls allocate, compile and pick kernels
            call()
        wait()
        repeats[name] = max(1, round(_SHORTEST / _sample(call, 1, wait, clock)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    reference = next(iter(variants))
    start = clock()
    for done in range(1, _ROUNDS[1] + 1):
        # Alternate the direction, so that no variant always runs in the wake of the same one.
        for name in list(variants)[:: 1 if done % 2 else -1]:
            variants[name]()  # brings its weights into the caches again, as in deployment
            wait()
            samples[name].append(_sample(variants[name], repeats[name], wait, clock))
        if done >= _ROUNDS[0]:
            timings = {name: _timing(s, samples[reference]) for name, s in samples.items()}
            late = clock() - start > seconds
            if late or all(t.spread <= spread * max(t.ratio, 1e-9) for t in timings.values()):
                break
    return timings


def once(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each callable in a single call, after one to warm it up: about how long it takes. A `Timer`."""
    wait = _synchronizer(device)
    timings = {}
    for name, call in variants.items():
        call()
        wait()
        timings[name] = Timing(_sample(call, 1, wait, clock))
    return timings


def _sample(call: Callable[[], object], repeats: int, wait: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    wait()
    return max(clock() - start, 1e-9) / repeats  # a clock may stand still, or jump back


def _timing(samples: list[float], reference: list[float]) -> Timing:
    ratios = [a / b for a, b in zip(samples, reference, strict=True)]
    middle = statistics.median(ratios)
    # For normal noise: σ ≈ 1.4826·MAD, standard error of a median ≈ 1.2533·σ/√n, 95 % ≈ 1.96 of those.
    deviation = statistics.median(abs(r - middle) for r in ratios)
    return Timing(statistics.median(samples), middle, 1.96 * 1.2533 * 1.4826 * deviation / len(ratios) ** 0.5)


def _synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
