"""python -m bench.cuda: the presets on a GPU, side by side, and what compressing takes there.

    [--device cuda] [--seconds 300] [--json bench-cuda.json] [--quick] [--only vision]

What is measured, each job a row of the JSON file, in this order of importance:

    compress    seconds, and the peak of memory on the device, of each preset
    vision      ResNet-50, ViT-B/16 and ResNet-152 at batch 8 and 64 in float32 with TF32, float16 and bfloat16,
                channels_last: original, lrd, ranks, merge and auto by latency; eager, under Inductor with frozen
                weights, and under CUDA graphs (mode="reduce-overhead"). Forms are chosen by eager times
    language    weights of SmolLM2-135M's shape, random: prefill of a prompt, and tokens decoded one by one
    staircase   the time of a 512×512×3×3 conv in Tucker form against its rank (the paper's Fig. 2), from which the
                hardware multiples of `snap` come

A job that is in the file is not measured again. When the time allowed is up no further job starts, and the next call
goes on: the first jobs say most. One that fails is a row with the error, and is tried again. ``--quick`` takes tiny
models, to test the script on any machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench.cuda_jobs import FULL, QUICK, Job, jobs
from fxlrd.errors import one_line
from fxlrd.files import write_out
from fxlrd.timing.cache import Setting


@dataclass
class Rows:
    """The rows of the JSON file, by job; each is on disk as soon as it is known."""

    path: Path
    setting: dict[str, Any]
    rows: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, path: Path, setting: dict[str, Any]) -> Rows:
        """Read the file, if there is one. Exits with one line if it is of another machine or setting."""
        if not path.exists():
            return cls(path, setting, {})
        content = json.loads(path.read_text())
        if content["setting"] != setting:
            sys.exit(f"bench.cuda: {path} is of another setting ({content['setting']}); name another with --json")
        return cls(path, setting, content["rows"])

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        write_out(self.path, json.dumps({"setting": self.setting, "rows": self.rows}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    arguments = _arguments(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.cuda: skipped: torch sees no CUDA device here; --device cpu --quick tests the script")
        return
    scale = QUICK if arguments.quick else FULL
    machine = Setting.current(device, compiled=False)
    setting = {"device": machine.device, "torch": machine.torch_version, "quick": arguments.quick}
    rows = Rows.of(arguments.json, setting)
    wanted = [job for job in jobs(scale, device) if job.part == arguments.only or arguments.only is None]
    left = _run(wanted, rows, arguments.seconds)
    print(f"{machine.device}, torch {machine.torch_version}\n")
    for part in dict.fromkeys(job.part for job in wanted):
        lines = [line for job in wanted if job.part == part and job.name in rows.rows for line in _lines(job, rows)]
        if lines:
            print(tabulate(lines, headers="keys"), end="\n\n")
    print(f"{len(wanted) - left} of {len(wanted)} jobs are in {arguments.json}" + (left > 0) * "; call again for more")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.cuda", description="The presets on a GPU, side by side.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which no further job starts (default: 300)")
    parser.add_argument("--json", type=Path, default=Path("bench-cuda.json"), metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="tiny models, to test the script")
    parser.add_argument("--only", choices=["compress", "vision", "language", "staircase"])
    return parser.parse_args(argv)


def _run(wanted: list[Job], rows: Rows, seconds: float) -> int:
    """Run the jobs that are not in the file, and return how many are left when the time is up."""
    start = time.monotonic()
    missing = [job for job in wanted if "failed" in rows.rows.get(job.name, {"failed": ""})]
    for done, job in enumerate(missing):
        if done and time.monotonic() - start > seconds:  # one job is always done, or calls would not add up
            return len(missing) - done
        print(f"{time.monotonic() - start:6.0f} s  {job.name}", file=sys.stderr, flush=True)
        rows.add(job.name, _row(job.run))
    return 0


def _row(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        with tf32():
            return run()
    except Exception as error:  # the other jobs are worth having
        traceback.print_exc()
        return {"failed": one_line(error)}
    finally:
        _free()


@contextmanager
def tf32() -> Iterator[None]:
    """Let matmuls and convs of float32 use TF32, as who wants speed does; afterwards all is as it was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _free() -> None:
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _lines(job: Job, rows: Rows) -> Iterator[dict[str, Any]]:
    """Return the table lines of a job: one for each of its variants."""
    row = rows.rows[job.name]
    named = partial(dict, zip(job.columns, job.values, strict=True))
    if "failed" in row:
        yield {**named(), "": f"failed: {row['failed']}"}
        return
    for name, figures in row.items():
        yield {**named(), "": name, **{key: f"{value:.4g}" for key, value in figures.items()}}


if __name__ == "__main__":
    main()
