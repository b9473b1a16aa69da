"""torch.compile(backend="fxlrd") against plain Inductor: cold compile of ResNet-50, and what a call costs.

Targets: preset ranks compiles ResNet-50 in at most 1.25 times Inductor's own time, both with empty caches but for
fxlrd's timings, which a first run leaves; and looking at ResNet-152's weights takes under 50 µs a call. Each compile
is a process of its own, in turns, so that a drift of the machine hits both.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import fx

from bench.models import resnet50
from fxlrd.backend.compressed import Compressed
from fxlrd.backend.factor_sets import fingerprint
from fxlrd.backend.fixed_weights import FixedWeights
from fxlrd.backend.options import Options
from fxlrd.capturing.dynamo import weights_of

ROUNDS = 3
BACKENDS = {
    "Inductor": {"backend": "inductor"},
    "fxlrd, lrd": {"backend": "fxlrd", "options": {"preset": "lrd"}},
    "fxlrd, ranks": {"backend": "fxlrd", "options": {"preset": "ranks"}},
}
SCRIPT = """
import sys, time, torch
from bench.models import resnet50
model, x = resnet50()
start = time.perf_counter()
with torch.no_grad():
    torch.compile(model, **eval(sys.argv[1]))(x)
print(time.perf_counter() - start)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as timings:
        compile_time(BACKENDS["fxlrd, ranks"], timings)  # fills the cache of timings
        times: dict[str, list[float]] = {name: [] for name in BACKENDS}
        for _ in range(ROUNDS):
            for name, options in BACKENDS.items():
                times[name].append(compile_time(options, timings))
    reference = times["Inductor"]
    rows = [
        [
            name,
            f"{statistics.median(seconds):.1f} s",
            f"{statistics.median(a / b for a, b in zip(seconds, reference, strict=True)):.2f}×",
        ]
        for name, seconds in times.items()
    ]
    print(tabulate(rows, headers=["ResNet-50, batch 8", "cold compile", "of Inductor's (limit 1.25)"]))
    print(tabulate(call_costs(), headers=["ResNet-152, per call (limit 50 µs)", "tensors", "median", "least"]))


def compile_time(options: dict[str, object], timings: str) -> float:
    """Return the seconds that the first call takes in a process with empty caches of Inductor's."""
    with tempfile.TemporaryDirectory() as cache:
        extra = {"FXLRD_CACHE_DIR": timings, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, "-c", SCRIPT, repr(options)]
        return float(subprocess.check_output(command, env={**os.environ, **extra}, text=True).splitlines()[-1])


def call_costs() -> list[list[object]]:
    """Return what a call spends on looking at weights: the factors' sources, and all of them as when they freeze."""
    model, x = resnet50(1, "resnet152")
    made: list[tuple[Compressed, tuple[Any, ...]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        # With an inner compiler that computes nothing, a call is the look at the weights and the passing on.
        options = Options.read({"ratio": 2.0, "verify": False, "inner": "eager"})
        compressed = Compressed(gm, options.pipeline(), options)
        compressed.start(inputs, weights_of(gm, inputs))
        compressed.sets.latest.run = lambda *args: None
        made.append((compressed, tuple(inputs)))
        return gm

    with torch.no_grad():
        torch.compile(model, backend=backend)(x[:, :, :32, :32])
    ((compressed, args),) = made
    latest, watched = compressed.sets.latest, compressed.watched(args)
    every = [a for a in args if a is not args[0] and isinstance(a, torch.Tensor)]
    calls: list[tuple[str, int, Callable[[], object]]] = [
        ("a call that computes nothing", len(args), lambda: compressed(*args)),
        ("the same without a look at the weights", len(args), lambda: latest.run(*args, *latest.factors)),
        ("the look at the weights alone", len(watched), lambda: fingerprint(watched)),
        ("at all weights, as where they freeze", len(every), FixedWeights(every).fingerprint),
    ]
    rows: list[list[object]] = []
    for name, number, call in calls:
        samples = [s * 1e3 for s in timeit.repeat(call, number=1000, repeat=15)]
        rows.append([name, number, f"{statistics.median(samples):.1f} µs", f"{min(samples):.1f} µs"])
    return rows


if __name__ == "__main__":
    main()
