"""The energy that `branch` keeps in the Tucker cores of the embedded trained network (fxlrd/app/fashion.py).

``python -m bench.trained``: with and without rotation, and seconds a layer. What accuracy single passes leave, without
training and after some, is in bench/tables456.py.
"""

from __future__ import annotations

import re
import time

from tabulate import tabulate

from fxlrd import capture
from fxlrd.app import fashion
from fxlrd.passes import Branch, Decompose


def main() -> None:
    model = fashion.trained()
    x = fashion.test()[0][:8]
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


if __name__ == "__main__":
    main()
