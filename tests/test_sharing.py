"""Two processes that share a compression end with what one alone has; one that dies ends the other with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxlrd import sharing
from tests.support import job

pytestmark = pytest.mark.slow


def start(case: str, folder: Path, size: int = 2) -> list[subprocess.Popen[str]]:
    """Start the processes of a case of tests/support/job.py, as torchrun would."""
    here = {**os.environ, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.job", case, str(folder)],
            env={**here, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Return the status and the last line of standard error of each process; all lines of one that crashed."""
    texts = [p.communicate(timeout=300)[1].strip() for p in processes]
    pairs = [(p.returncode, text) for p, text in zip(processes, texts, strict=True)]
    return [(status, text if status not in (0, 2) else text.rpartition("\n")[2]) for status, text in pairs]


@pytest.mark.parametrize("case", ["ratio", "auto", "inplace", "own_batches"])
def test_two_processes_equal_one(case, tmp_path):
    ends = finish(start(case, tmp_path))
    assert [status for status, _ in ends] == [0, 0], ends
    alone = job.outcome(case)
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert shared["plan"] == alone["plan"]
        assert shared["worked"] < alone["worked"] or case == "auto"  # which merges
        assert shared["weights"].keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(shared["weights"][name], weight, rtol=1e-6, atol=1e-6)


def test_processes_decide_by_the_timings_of_the_first(tmp_path):
    assert [status for status, _ in finish(start("timed", tmp_path))] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first["plan"] == second["plan"]
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())


@pytest.mark.parametrize(
    ("case", "words"), [("dies", "has ended or does not answer"), ("absent", "call compress() in every process")]
)
def test_a_process_that_ends_or_does_not_come_ends_the_others(case, words, tmp_path):
    (survivor, text), _ = finish(start(case, tmp_path))
    assert survivor == 2
    assert words in text


def test_no_group_is_let_go_of_while_another_process_may_be_connecting_to_it(monkeypatch):
    """A group destroyed as soon as it is made leaves the other process hanging now and then, so no run shows it."""
    done = []
    fakes = {
        "is_initialized": lambda: True,
        "get_world_size": lambda: 2,
        "get_rank": lambda: 0,
        "new_group": lambda **_: done.append("new"),
        "destroy_process_group": lambda _: done.append("destroyed"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.distributed, name, fake)
    with sharing.sharing(torch.nn.Linear(1, 1)):
        assert done == ["new", "new"]
    assert done == ["new", "new", "destroyed", "destroyed"]


def test_a_model_sharded_by_fsdp2_is_refused(tmp_path):
    for status, text in finish(start("sharded", tmp_path)):
        assert status == 2
        assert "is sharded over processes; compress the whole model before" in text


@pytest.mark.parametrize(("case", "subject"), [("other_weights", "weights"), ("other_options", "passes")])
def test_processes_that_ask_for_different_things_are_refused(case, subject, tmp_path):
    for status, text in finish(start(case, tmp_path)):
        assert status == 2
        assert f"have different {subject}" in text
