"""Rank search on ResNet-50, batch 8, channels_last: grid against the paper's Algorithm 1.

Targets: grid takes at most a twentieth of algorithm1's timings, under 60 s with an empty cache and under 2 s
with a warm one, for models of the same quality.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping

import torch
from tabulate import tabulate

from bench.models import resnet50
from fxlrd import capture
from fxlrd.graph import cost
from fxlrd.graph.inputs import Inputs
from fxlrd.passes import Decompose, Snap
from fxlrd.progress import bar
from fxlrd.timing.clock import Timing, compare
from fxlrd.timing.layers import ORIGINAL
from fxlrd.timing.models import time_models
from fxlrd.timing.stopwatch import REFERENCE


class Counting:
    """The timer, counting the forms that it times."""

    def __init__(self) -> None:
        self.forms = 0

    def __call__(
        self, variants: Mapping[str, Callable[[], object]], device: torch.device, seconds: float = 1.5
    ) -> dict[str, Timing]:
        self.forms += len(variants.keys() - {ORIGINAL, REFERENCE})
        return compare(variants, device, seconds)


def main() -> None:
    model, x = resnet50()
    gm = Decompose(ratio=2.0)(capture(model, x)).graph_module
    rows, models = [], {"original": model, "lrd": gm}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FXLRD_CACHE_DIR"] = folder
        timers = [Counting() for _ in range(3)]
        runs = {
            "grid, cold": Snap(timer=timers[0]),
            "grid, warm": Snap(timer=timers[1]),
            "algorithm1": Snap(search="algorithm1", seconds=0.3, cache=False, timer=timers[2]),
        }
        for (name, snap), timer in zip(runs.items(), timers, strict=True):
            start = time.perf_counter()
            models[name] = snap(gm, bar).graph_module
            took = time.perf_counter() - start
            rows.append([name, timer.forms, f"{took:.1f} s", f"{cost.params(models[name]) / 1e6:.2f} M"])
    del models["grid, warm"]
    speed = time_models(models, Inputs.of(x), seconds=40.0)
    print(tabulate(rows, headers=["search", "ranks timed", "took", "parameters"]))
    print(f"grid times 1/{rows[2][1] / rows[0][1]:.1f} of algorithm1's ranks (target: 1/20)\n")
    table = [
        [k, f"{t.seconds * 1e3:.0f} ms", f"{1 / t.ratio:.2f}×", f"± {t.spread / t.ratio**2:.2f}"]
        for k, t in speed.items()
    ]
    print(tabulate(table, headers=["ResNet-50", "latency", "speed", ""]))


if __name__ == "__main__":
    main()
