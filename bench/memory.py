"""Peak memory of compress() without timing: python -m bench.memory [--json PATH] [MODEL …].

Each figure is taken in a process of its own, and the peak counts from before the model is built: the model itself, the
result and everything between. Target: at most 1.3 times (model in + model out), plus the workspace of one layer: what
decomposing the largest layer alone takes beside that layer and its factors. In place weights go as their layers are
decomposed, but none before its factors are there: the limit is 1.3 times the model in, plus the same and the factors of
the largest layer, which in VGG-16 are a third of the model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LIMIT = 1.3
WAYS = ("layer", "compress", "inplace")
HEADERS = ("model", "in", "out", "largest layer", "peak", "ratio", "peak in place", "ratio in place")


def vgg16() -> Any:
    from torchvision import models

    return models.vgg16()


def vit_l() -> Any:
    from torchvision import models

    return models.vit_l_16()


def linears(width: int = 2048, count: int = 48) -> Any:
    from torch import nn

    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "vgg16": (vgg16, (1, 3, 224, 224)),
    "vit_l_16": (vit_l, (1, 3, 224, 224)),
    "linears_200m": (linears, (1, 2048)),
    "linears_small": (lambda: linears(512, 16), (1, 512)),
}
"""By name, what makes the model and the shape of its input."""


def resident(peak: bool) -> int:
    """Return the bytes of this process in memory, or the most that there were since `reset_peak`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no Linux: the peak of the whole process is all there is
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    field = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Let the peak count from now on, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def warmed_up() -> None:
    """Import what is imported lazily, by compressing a small model."""
    import torch
    from torch import nn

    import fxlrd

    fxlrd.compress(nn.Sequential(nn.Linear(64, 64)), torch.zeros(1, 64), measure=False)


def measure(name: str, way: str) -> dict[str, int]:
    """Return the bytes of the model before and after, and the peak of compressing it, in this process.

    ``way`` is compress, inplace, or layer: only the largest layer is decomposed, by itself.
    """
    import torch

    import fxlrd

    torch.manual_seed(0)
    warmed_up()
    make, shape = MODELS[name]
    if way == "layer":
        return _measure_layer(make)
    start = resident(peak=False)
    model = make()
    before = size_of(model)
    reset_peak()
    result = fxlrd.compress(model, torch.randn(shape), ratio=2.0, measure=False, inplace=way == "inplace").model
    return {"in": before, "out": size_of(result), "peak": resident(peak=True) - start}


def _measure_layer(make: Callable[[], Any]) -> dict[str, int]:
    import torch
    from torch import nn

    from fxlrd.layers.build import decomposed
    from fxlrd.layers.forms import ranks_by_ratio
    from fxlrd.layers.kinds import LAYERS

    with torch.device("meta"):
        layers = [m for m in make().modules() if isinstance(m, (*LAYERS, nn.MultiheadAttention))]
    layers = [m.out_proj if isinstance(m, nn.MultiheadAttention) else m for m in layers]
    start = resident(peak=False)
    layer = max(layers, key=lambda m: m.weight.numel()).to_empty(device="cpu")
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    reset_peak()
    factors, _ = decomposed(layer, ranks_by_ratio(layer, 2.0))
    return {"in": size_of(layer), "out": size_of(factors), "peak": resident(peak=True) - start}


def size_of(model: Any) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def measured(name: str) -> dict[str, Any]:
    """Return a row of the table: each way in a process of its own."""
    ways = {}
    for way in WAYS:
        command = [sys.executable, "-m", "bench.memory", "--child", name, way]
        ways[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    layer, result, inplace = (ways[way] for way in WAYS)
    workspace = layer["peak"] - layer["in"] - layer["out"]
    return {
        "model": name,
        "in": result["in"],
        "out": result["out"],
        "workspace": workspace,
        "peak": result["peak"],
        "ratio": (result["peak"] - workspace) / (result["in"] + result["out"]),
        "peak_inplace": inplace["peak"],
        "ratio_inplace": (inplace["peak"] - workspace - layer["out"]) / inplace["in"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.memory")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--json", type=Path, help="also write the rows, in bytes, to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure(*options.child)))
        return 0
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"no model {unknown[0]!r}: {', '.join(MODELS)}")
    return report([measured(name) for name in options.models or list(MODELS)[:3]], options.json)


def report(rows: list[dict[str, Any]], path: Path | None) -> int:
    """Print the table, write the JSON, and return 1 if a row is above the limit."""
    from tabulate import tabulate

    table = [
        [v if isinstance(v, str) else f"{v:.2f}" if isinstance(v, float) else f"{v / 1e6:.0f} MB" for v in row.values()]
        for row in rows
    ]
    print(tabulate(table, headers=HEADERS))
    above = [row["model"] for row in rows if max(row["ratio"], row["ratio_inplace"]) > LIMIT]
    print(f"limit {LIMIT}: {'held' if not above else 'exceeded by ' + ', '.join(above)}")
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
