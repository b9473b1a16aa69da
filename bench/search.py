"""Rank search on ResNet-50, batch 8, channels_last: grid against the paper's Algorithm 1.

Targets: grid takes at most a twentieth of algorithm1's timings, under 60 s with an empty cache and under 2 s
with a warm one, for models of the same quality.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate

import fxlrd.passes.snap as snap_module
from bench.models import resnet50
from fxlrd import capture
from fxlrd.graph import cost
from fxlrd.passes import Decompose, Snap
from fxlrd.progress import bar
from fxlrd.timing.clock import compare

measure = snap_module._time


def main() -> None:
    model, x = resnet50()
    gm = Decompose(ratio=2.0)(capture(model, x)).graph_module
    timed = 0

    def counting(place: Any, group: Sequence[Any], *options: Any) -> Any:
        nonlocal timed
        timed += len(group)
        return measure(place, group, *options)

    snap_module._time = counting
    rows, found = [], {"original": model, "lrd": gm}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FXLRD_CACHE_DIR"] = folder
        runs = {
            "grid, cold": Snap(),
            "grid, warm": Snap(),
            "algorithm1": Snap(search="algorithm1", seconds=0.3, cache=False),
        }
        for name, snap in runs.items():
            timed, start = 0, time.perf_counter()
            found[name] = snap(gm, bar).graph_module
            rows.append(
                [name, timed, f"{time.perf_counter() - start:.1f} s", f"{cost.params(found[name]) / 1e6:.2f} M"]
            )
    del found["grid, warm"]
    with torch.no_grad():
        speed = compare({k: (lambda m=m: m(x)) for k, m in found.items()}, x.device, seconds=40.0)
    print(tabulate(rows, headers=["search", "ranks timed", "took", "parameters"]))
    print(f"grid times 1/{rows[2][1] / rows[0][1]:.1f} of algorithm1's ranks (target: 1/20)\n")
    table = [
        [k, f"{t.seconds * 1e3:.0f} ms", f"{1 / t.ratio:.2f}×", f"± {t.spread / t.ratio**2:.2f}"]
        for k, t in speed.items()
    ]
    print(tabulate(table, headers=["ResNet-50", "latency", "speed", ""]))


if __name__ == "__main__":
    main()
