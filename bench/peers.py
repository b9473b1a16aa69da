"""fxlrd beside other libraries in one run, in an environment of its own: ResNet-50 at 2×, and the trained network.

``python -m bench.peers [--env DIR] [--all] [--no-speed] [--quick]`` makes the environment DIR, a venv beside this one
whose packages (torch among them) it sees, installs each peer there with pip, and runs itself in it. A peer that cannot
be installed, or fails, has a row with the reason. Stored in a JSON file (``--json``, default build/bench/peers.json); a
cell that is there is not measured again. All methods are timed side by side with the original. FLOPs are counted as
they run, for all alike. Errors are relative: of ResNet-50's outputs, whose weights are random, on random images, and of
the trained network's on its 2,000 test images, of which the accuracy is too. No method trains; merge and auto are
calibrated on random images, and on the trained network's 1,024 training images. Fixed ranks keep half the parameters of
every layer but the stem.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import venv
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import settings, speed
from bench.cells import Cells, Rows
from bench.fashion import accuracy
from bench.models import calibration, image_model
from bench.peer_methods import METHODS, TIMED
from bench.settings import DTYPES, LAYOUTS, Setting, measured, parser, read
from bench.systems import ORIGINAL
from fxlrd.app import fashion
from fxlrd.errors import one_line
from fxlrd.graph.inputs import Inputs
from fxlrd.timing.models import time_models

PACKAGES = ("tensorly", "tensorly-torch", "torch-pruning", "aimet-torch")
MODULES = ("tensorly.decomposition", "tltorch", "torch_pruning", "aimet_torch.compress")
FAILURES = "failures.json"
"""The file in the environment that says why a package could not be installed."""


def main(argv: Sequence[str] | None = None) -> None:
    options = _options()
    arguments = options.parse_args(argv)
    if arguments.here:
        with tempfile.TemporaryDirectory() as timings:  # or seconds would depend on what was timed before
            os.environ["FXLRD_CACHE_DIR"] = timings
            side_by_side(read(options, argv))
        return
    python = environment(arguments.env)
    command = [python, "-m", "bench.peers", "--here", *(sys.argv[1:] if argv is None else argv)]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    sys.exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode)


def _options() -> ArgumentParser:
    options = parser("peers")
    options.set_defaults(layouts="NCHW,channels_last")
    options.add_argument("--env", type=Path, default=Path("build/bench/peers"), metavar="DIR", help="the environment")
    options.add_argument("--here", action="store_true", help="measure in this environment, with the peers that it has")
    options.add_argument("--methods", help="only these, separated by semicolons")
    return options


def environment(folder: Path) -> str:
    """Make the environment, where there is none, with the packages that it lacks, and return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    (own / "fxlrd_peers.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    failures = {}
    # What pip installs for a peer must fit the torch that fxlrd runs on, or the comparison is of two torches.
    pinned = folder / "constraints.txt"
    pinned.write_text("".join(f"{name}=={version(name)}\n" for name in ("torch", "torchvision", "numpy")))
    for package in PACKAGES:
        print(f"installing {package}", file=sys.stderr, flush=True)
        command = [python, "-m", "pip", "install", "-q", "-c", pinned, package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            failures[package] = next(line for line in [*done.stderr.splitlines(), "pip failed"] if "WARN" not in line)
    (folder / FAILURES).write_text(json.dumps(failures))
    return str(python.absolute())


class Bench:
    """The two networks and what the methods make of them."""

    def __init__(self, arguments: Namespace) -> None:
        self.arguments = arguments
        name = "tiny" if arguments.quick else "resnet50"
        at = Setting("eager", "NCHW", "fp32", max(map(int, arguments.batches.split(","))))
        self.model, self.x = image_model(name, at, arguments.image, arguments.device)
        self.trained, self.test = fashion.trained(), fashion.test()
        images = fashion.calibration()
        if arguments.quick:
            images, self.test = images[:128], tuple(t[:100] for t in self.test)
        self.calibration = list(images.split(len(images) // 8))
        self.compressed = cache(self._compressed)
        for package in MODULES:  # so that no method's seconds include an import
            with suppress(ImportError):
                importlib.import_module(package)

    def _compressed(self, method: str) -> tuple[nn.Module, float]:
        """Return what a method makes of ResNet-50, and the seconds that it takes."""
        if method == ORIGINAL:
            return self.model, 0.0
        start = time.perf_counter()
        model = METHODS[method](self.model, self.x, calibration(self.x))
        return model, time.perf_counter() - start

    def _of_trained(self, method: str) -> nn.Module:
        """Return what a method makes of the trained network."""
        if method == ORIGINAL:
            return self.trained
        return METHODS[method](self.trained, self.calibration[0][:8], self.calibration)

    def figures(self, method: str) -> dict[str, Any]:
        """Return parameters, FLOPs and the output error of ResNet-50; error and accuracy of the trained network."""
        try:
            model, _ = self.compressed(method)
            own = self._of_trained(method)
        except Exception as error:
            traceback.print_exc()
            return {"failed": one_line(error)}
        row = {"params": sum(p.numel() for p in model.parameters()), "flops": _flops(model, self.x[:1])}
        row |= {"error": _error(model, self.model, self.x), "trained error": _error(own, self.trained, self.test[0])}
        row |= {"trained params": sum(p.numel() for p in own.parameters())}
        return row | {"top1": 100 * accuracy(own, *self.test)}

    def seconds(self, method: str) -> dict[str, Any]:
        return {"seconds": self.compressed(method)[1]}

    def timed(self, methods: Sequence[str], setting: Setting) -> dict[str, Any]:
        """Time the models side by side in a setting; what does not run in it is left out, with the reason."""
        form: dict[str, Any] = {"dtype": DTYPES[setting.dtype], "memory_format": LAYOUTS[setting.layout]}
        x = self.x[: setting.batch].to(**form)
        models, failed = {}, {}
        torch.compiler.reset()
        for method in methods:
            try:
                model = copy.deepcopy(self.compressed(method)[0]).to(**form)
                time_models({method: model}, Inputs.of(x), under_inductor=setting.compiled, timer=_once)
                models[method] = model
            except Exception as error:
                traceback.print_exc()
                failed[method] = {"failed": one_line(error)}
        return {**speed.infer(models, x, setting, self.arguments.seconds), **failed}


def _once(variants: Any, device: torch.device, seconds: float = 0.0) -> dict[str, Any]:
    for call in variants.values():
        call()
    return {}


@torch.no_grad()
def _error(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    """Return how far outputs are from the original's, relative to these, in float64."""
    pairs = [(model(part).double(), original(part).double()) for part in x.split(100)]
    squares = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    return float(squares**0.5)


def _flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def side_by_side(arguments: Namespace) -> None:
    file = arguments.env / FAILURES
    failures = json.loads(file.read_text()) if file.exists() else {}
    title = "fxlrd beside other libraries, ResNet-50 at 2×"
    results = settings.results(arguments, title, rows, **{package: _version(package) for package in PACKAGES})
    bench = Bench(arguments)
    methods = arguments.methods.split(";") if arguments.methods else [ORIGINAL, *METHODS]
    if arguments.no_speed:
        methods = [method for method in methods if method not in TIMED]
    for method in methods:
        package = method.partition(",")[0]
        reason = {"failed": f"not installed: {failures[package]}"} if package in failures else None
        results.cell(f"{method}, figures", lambda m=method, r=reason: r or bench.figures(m))
    methods = [method for method in methods if "failed" not in results.cells[f"{method}, figures"]]
    if not arguments.no_speed:
        for method in methods:
            results.cell(f"{method}, seconds", lambda m=method: bench.seconds(m))
    for setting in arguments.settings:
        results.cell(f"speed, {setting}", lambda s=setting: bench.timed(methods, s))
    results.write()
    print(results.text())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def rows(cells: Cells) -> Rows:
    table: Rows = []
    original = cells.get(f"{ORIGINAL}, figures", {})
    for method in (ORIGINAL, *METHODS):
        own = cells.get(f"{method}, figures")
        if own is None:
            continue
        if "failed" in own:
            table.append({"method": method, "seconds": own["failed"]})
            continue
        seconds = cells.get(f"{method}, seconds", {}).get("seconds", 0.0)
        row = {"method": method, "seconds": f"{seconds:.1f}" if seconds else ""}
        shares = {key: f"{own[key] / original[key]:.3f}" for key in ("params", "flops", "trained params")}
        row |= {"params": shares["params"], "FLOPs": shares["flops"], "error": f"{own['error']:.3f}"}
        row |= {"trained: params": shares["trained params"], "trained: error": f"{own['trained error']:.3f}"}
        row |= {"trained: Top-1 %": f"{own['top1']:.2f}"}
        for setting in measured(cells, "speed"):
            timed = cells[f"speed, {setting}"]
            reason = timed.get(method, {}).get("failed")
            row[f"speed %, {setting}"] = reason or speed.cells_of(timed, method, setting.batch)[1]
        table.append(row)
    return table


if __name__ == "__main__":
    main()
