"""Fuzzers: the same cases in the same order every time, until their time is up."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.checkpoints import bytes_case, checkpoints, header_case, plan_case
from tests.fuzz.timings import cache_case

Case = Callable[[random.Random], bool]
NAMES = ("plan", "header", "bytes", "cache")


@dataclass(frozen=True)
class Outcome:
    """How many cases ran, and how many of these were read in spite of the damage, which then was none."""

    cases: int
    read: int


class CaseError(AssertionError):
    """A case failed: silently wrong, or with another exception than an error of one line."""

    def __init__(self, name: str, number: int, cause: Exception) -> None:
        again = f"python -m tests.fuzz {name} --start {number} --seconds 0"
        super().__init__(f"{name}, case {number}: {type(cause).__name__}: {cause} ({again})")
        self.number = number


@contextmanager
def fuzzers() -> Iterator[dict[str, Case]]:
    """Yield the fuzzers by name; their files are in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        good = checkpoints(path / "good")
        yield {
            "plan": lambda rng: plan_case(rng.choice(good), path / "plan", rng),
            "header": lambda rng: header_case(rng.choice(good), path / "header", rng),
            "bytes": lambda rng: bytes_case(rng.choice(good), path / "bytes", rng),
            "cache": lambda rng: cache_case(path / "cache", rng),
        }


def run(name: str, case: Case, seconds: float, start: int = 0) -> Outcome:
    """Run the cases of a fuzzer from number ``start`` on. Raises CaseError for the first that fails."""
    end, number, read = time.monotonic() + seconds, start, 0
    while number == start or time.monotonic() < end:
        try:
            read += case(random.Random(f"{name} {number}"))
        except Exception as error:
            raise CaseError(name, number, error) from error
        number += 1
    return Outcome(number - start, read)
