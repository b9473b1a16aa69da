"""The paper's Fig. 5: throughput against the number of branches, for ResNet-50, batch 8, fp32, channels_last.

Eager and under Inductor with frozen weights. Random weights: the figures are about speed, not fidelity.
"""

from __future__ import annotations

from tabulate import tabulate

from bench.models import resnet50
from fxlrd import Pipeline, capture
from fxlrd.graph import cost
from fxlrd.graph.inputs import Inputs
from fxlrd.passes import Branch, Decompose
from fxlrd.timing.models import time_models

GROUPS = (1, 2, 4, 8, 16)


def main() -> None:
    model, x = resnet50()
    gm = capture(model, x)
    decomposed = Pipeline([Decompose(ratio=2.0)])(gm).graph_module
    models = {"original": gm, "N = 1": decomposed}
    for n in GROUPS[1:]:
        models[f"N = {n}"] = Pipeline([Branch(groups=n, rotate=False)])(decomposed, verify=False).graph_module
    rows = {name: [name, f"{cost.params(m) / 1e6:.2f} M", f"{cost.flops(m) / 1e9:.1f} G"] for name, m in models.items()}
    for under_inductor in (False, True):
        timings = time_models(models, Inputs.of(x), under_inductor=under_inductor, seconds=60.0)
        for name, t in timings.items():
            rows[name] += [f"{x.shape[0] / t.seconds:.1f}", f"{1 / t.ratio:.2f}× ± {t.spread / t.ratio**2:.2f}"]
    headers = ["branches", "parameters", "FLOPs", "images/s", "eager", "images/s", "Inductor"]
    print(tabulate(list(rows.values()), headers=headers))


if __name__ == "__main__":
    main()
