"""One process of a job that shares a compression: python -m tests.support.job CASE FOLDER, with RANK and WORLD_SIZE."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxlrd
from fxlrd import sharing
from fxlrd.layers.build import decomposed

FITTED = (
    "calibrate{outputs=false,patches=1152,effects=256,holdout=true},allocate{params=0.5,measured=32,merge=false},"
    "decompose,refit"
)


def model(seed: int = 0) -> nn.Module:
    """Return a small network with convs of two forms and linears."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 48, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(192, 64),
        nn.ReLU(),
        nn.Linear(64, 40),
    ).eval()


def batches() -> list[torch.Tensor]:
    """Return calibration inputs."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(10)]


def outcome(case: str, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Return the plan and the weights of a compression, and the number of layers that this process has decomposed."""
    options: dict[str, Any] = {"ratio": 2.0}
    if case == "auto":
        options = {"budget": fxlrd.Budget(params=0.6), "calibration": batches()}
    if case == "own_batches":
        options = {"pipeline": FITTED, "calibration": batches()[rank::size]}
    if case == "timed":
        options = {"preset": "ranks"}
    if case == "inplace":
        options["inplace"] = True
    if case == "other_options" and rank:
        options["ratio"] = 3.0
    original = model(rank if case == "other_weights" else 0)
    if case == "sharded":
        fully_shard(original, mesh=init_device_mesh("cpu", (size,)))
    dies = case == "dies" and rank
    worked = 0

    def counting(*arguments: Any) -> Any:
        nonlocal worked
        worked += 1
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return decomposed(*arguments)

    with mock.patch("fxlrd.passes.decompose.decomposed", counting):
        result = fxlrd.compress(original, batches()[0], measure=False, **options)
    plan = [(row["name"], row["decision"], row["ranks"]) for row in result.report.layers]
    return {"plan": plan, "weights": result.model.state_dict(), "worked": worked}


def main(case: str, folder: Path) -> int:
    """Run one process of a case; return 2 for an FxlrdError, which it prints."""
    faulthandler.dump_traceback_later(240, exit=True)  # a process that hangs says where
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    if case == "absent":
        sharing.JOINING = timedelta(seconds=3)
        if rank:
            time.sleep(10)
            return 0
    try:
        torch.save(outcome(case, rank, size), folder / f"{rank}.pt")
    except fxlrd.FxlrdError as error:
        print(error, file=sys.stderr)
        return 2
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
