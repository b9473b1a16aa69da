"""Fidelity of single passes on the embedded trained network (fxlrd/app/fashion.py), without any fine-tuning.

``python -m bench.trained``: the energy that `branch` keeps in the cores of its Tucker forms, with and
without rotation, and seconds a layer; and the accuracy on the 10,000 test images after each pass, with BatchNorm
statistics as trained.
"""

from __future__ import annotations

import re
import time

import torch
from tabulate import tabulate

from bench.fashion import accuracy, load
from fxlrd import capture, compress
from fxlrd.app import fashion
from fxlrd.passes import Branch, Decompose


def main() -> None:
    model = fashion.trained()
    images, _ = load(train=True)
    test = load(train=False)
    x = test[0][:8]
    decomposed = Decompose(ratio=2.0)(capture(model, x)).graph_module
    rows = []
    for groups in (2, 4, 8):
        start = time.perf_counter()
        sites = Branch(groups=groups)(decomposed).sites
        seconds = (time.perf_counter() - start) / len(sites)
        retained = [[float(f) for f in re.findall(r"([\d.]+) %", site.note)] for site in sites]
        rotated, plain = (sum(column) / len(retained) for column in zip(*retained, strict=True))
        worst = min(a - b for a, b in retained)
        rows.append([groups, len(sites), f"{plain:.1f} %", f"{rotated:.1f} %", f"{worst:+.1f}", f"{seconds:.1f} s"])
    headers = ["N", "cores", "kept by the plain cut", "kept after rotation", "least gain (points)", "a layer"]
    print(tabulate(rows, headers=headers), flush=True)
    start_accuracy = accuracy(model, *test)
    rows = [["original", sum(p.numel() for p in model.parameters()), f"{100 * start_accuracy:.2f}", ""]]
    calibration = list(
        images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1024]].split(128)
    )
    for name, text, data in [
        ("lrd", "decompose", None),
        ("branch, N = 4", "decompose,branch", None),
        ("branch, N = 4, cut as the paper does", "decompose,branch{rotate=false}", None),
        ("merge, α = 2.75", "calibrate{outputs=false},merge", calibration),
        ("merge as the paper does (relocate)", "merge{mode=relocate}", None),
    ]:
        result = compress(model, x, pipeline=text, calibration=data, measure=False)
        right = accuracy(result.model, *test)
        rows.append(
            [name, result.report.after["params"], f"{100 * right:.2f}", f"{100 * (right - start_accuracy):+.2f}"]
        )
    print(tabulate(rows, headers=["", "parameters", "accuracy %", "points"]))


if __name__ == "__main__":
    main()
