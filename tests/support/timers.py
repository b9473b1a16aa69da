"""Stand-ins for clocks: no test compares seconds that a machine took."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fxlrd.layers.kinds import LAYERS
from fxlrd.timing.clock import Timing
from fxlrd.timing.stopwatch import REFERENCE, REFERENCE_ALONE

KERNELS = (REFERENCE, REFERENCE_ALONE)
_LEAST = 1e-30
"""Seconds of what takes none by a formula."""


class FakeClock:
    """A clock that moves only while a callable of `call` runs. ``ran`` has the names of the calls, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def perf_counter(self) -> float:
        """Return the seconds so far, as `time.perf_counter` would."""
        return self.now

    def call(self, name: str, cost: float | Callable[[int], float]) -> Callable[[], None]:
        """Return a callable that takes ``cost`` seconds: a number, or a function of how many calls ran before."""

        def run() -> None:
            self.now += cost(len(self.ran)) if callable(cost) else cost
            self.ran.append(name)

        return run


class FakeTimer:
    """Stands in for `fxlrd.timing.clock.compare`: times are ``seconds_of(name, round)``, ratios are to the first.

    ``rounds`` has the names of what was timed together, a list for each time that the timer was asked. Each callable
    runs once, so that one that fails does so in the test. The reference kernel (fxlrd/timing/stopwatch.py) takes
    ``kernel`` seconds each time that it is repeated, and does not count.
    """

    def __init__(self, seconds_of: Callable[[str, int], float], spread: float = 0.0, kernel: float = 1.0) -> None:
        self.seconds_of = seconds_of
        self.spread = spread
        self.kernel = kernel
        self.rounds: list[list[str]] = []

    def __call__(
        self, variants: Mapping[str, Callable[[], object]], device: torch.device, seconds: float = 0.0
    ) -> dict[str, Timing]:
        """Return made-up timings of ``variants``, whose callables run once each."""
        asked = len(self.rounds)
        times = {
            name: self.kernel * len(call.modules) if name in KERNELS else self.seconds_of(name, asked) or _LEAST
            for name, call in variants.items()
        }
        if names := [name for name in variants if name not in KERNELS]:
            self.rounds.append(names)
        for call in variants.values():
            call()
        first = next(iter(times.values()))
        return {name: Timing(s, s / first, 0.0 if i == 0 else self.spread) for i, (name, s) in enumerate(times.items())}


class WeightTimer(FakeTimer):
    """A timer whose times are ``seconds_of_weights(name, weights)``: weights are those of the layers that a call runs.

    It times workloads only (fxlrd/timing/workload.py).
    """

    def __init__(
        self, seconds_of_weights: Callable[[str, int], float], spread: float = 0.0, kernel: float = 1.0
    ) -> None:
        super().__init__(lambda name, _: seconds_of_weights(name, self.weights[name]), spread, kernel)
        self.weights: dict[str, int] = {}

    def __call__(
        self, variants: Mapping[str, Callable[[], object]], device: torch.device, seconds: float = 0.0
    ) -> dict[str, Timing]:
        """Return made-up timings of ``variants``, whose callables run once each."""
        self.weights = {
            name: sum(m.weight.numel() for root in call.modules for m in root.modules() if isinstance(m, LAYERS))
            for name, call in variants.items()
        }
        return super().__call__(variants, device, seconds)


class SizeTimer(FakeTimer):
    """A timer whose times are ``seconds_of_size(name, size)``: the size is that of the input's last dimension.

    It times workloads of one module (fxlrd/timing/workload.py).
    """

    def __init__(self, seconds_of_size: Callable[[str, int], float], spread: float = 0.0) -> None:
        super().__init__(lambda name, _: seconds_of_size(name, self.sizes[name]), spread)
        self.sizes: dict[str, int] = {}

    def __call__(
        self, variants: Mapping[str, Callable[[], object]], device: torch.device, seconds: float = 0.0
    ) -> dict[str, Timing]:
        """Return made-up timings of ``variants``, whose callables run once each."""
        read = {name: call.parts[0][1].args for name, call in variants.items()}
        self.sizes = {name: args[0].shape[-1] for name, args in read.items() if args}
        return super().__call__(variants, device, seconds)
