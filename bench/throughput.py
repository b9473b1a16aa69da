"""Whole-model speed of the presets: ResNet-50, batch 8, fp32, channels_last, ratio 2 (merge: α = 2.75).

Interleaved, medians, with the half-width of the 95 % interval. Targets: ranks at least 1.5 times the original; merge
1.8 times in eager, and 2.0 times under Inductor with frozen weights, both sides compiled. merge is calibrated on
random images here, which its speed does not depend on. Folding BN is exact in eval mode and wins in eager; Inductor
folds it for every row.
"""

from __future__ import annotations

from tabulate import tabulate

from bench.models import resnet50
from fxlrd import Pipeline, capture
from fxlrd.graph import cost
from fxlrd.graph.inputs import Inputs
from fxlrd.pipeline import PRESETS
from fxlrd.progress import bar
from fxlrd.timing.models import time_models

RUNS = {
    "lrd": PRESETS["lrd"],
    "ranks": PRESETS["ranks"],
    "merge": PRESETS["merge"],
    "merge, BN folded": f"{PRESETS['merge']},merge{{mode=exact,norms=true}}",
}


def main() -> None:
    model, x = resnet50()
    gm = capture(model, x)
    rows = []
    for under_inductor in (False, True):
        models = {"original": model if not under_inductor else gm}
        for preset, text in RUNS.items():
            pipeline = Pipeline.parse(text)
            if "calibrate" in text:
                pipeline = pipeline.with_options(calibration=x)
            if under_inductor and preset != "lrd":
                pipeline = pipeline.with_options(compile=True)
            models[preset] = pipeline(gm, progress=bar).graph_module
        timings = time_models(models, Inputs.of(x), under_inductor=under_inductor, seconds=40.0)
        for name, t in timings.items():
            rows.append(
                [
                    "Inductor, freezing" if under_inductor else "eager",
                    name,
                    f"{cost.params(models[name]) / 1e6:.2f} M",
                    f"{t.seconds * 1e3:.0f} ms",
                    f"{x.shape[0] / t.seconds:.1f}",
                    f"{1 / t.ratio:.2f}×",
                    f"± {t.spread / t.ratio**2:.2f}",
                ]
            )
    print(tabulate(rows, headers=["mode", "preset", "parameters", "latency", "images/s", "speed", ""]))


if __name__ == "__main__":
    main()
