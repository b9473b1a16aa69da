"""One compression by the processes of a job, as torchrun starts them.

Every process calls compress() with the same model and options. Each takes its share of the work, and whatever was made
goes to all of them: each ends with the result that one process alone would have. Nothing is shared out where
torch.distributed has no initialised process group.

The processes talk through a group of their own over gloo, also beside nccl, and a process that has ended or does not
come ends the others with one line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from fxlrd.errors import FxlrdError, one_line

T = TypeVar("T")

JOINING = timedelta(minutes=5)
"""How long the processes wait for each other to call compress()."""
WORKING = timedelta(minutes=30)
"""How long they wait for what another one makes."""


@dataclass(frozen=True)
class Job:
    """The processes that share a compression.

    Attributes:
        rank: the number of this process.
        size: the number of processes.
        device: where this process has its model.
        group: what they talk through.
    """

    rank: int
    size: int
    device: torch.device
    group: Any = field(repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Job:
        return self

    def owns(self, index: int) -> bool:
        """Whether the share of this process has the piece of work with this number."""
        return index % self.size == self.rank

    def owners(self, value: T, index: int) -> T:
        """Return to all the value that the owner of the piece with this number has."""
        return self._sent(value, index % self.size)

    def firsts(self, value: T) -> T:
        """Return to all the value that the first process has."""
        return self._sent(value, 0)

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        return [self._sent(value, rank) for rank in range(self.size)]

    def check_agreed(self, subjects: Mapping[str, Any]) -> None:
        """Raise FxlrdError unless the processes have the same of every subject, which are named in the plural."""
        for rank, others in enumerate(self.gathered(subjects)):
            if (subject := next((name for name in subjects if subjects[name] != others[name]), None)) is not None:
                raise FxlrdError(
                    f"sharing: processes {self.rank} and {rank} have different {subject}; give all the same, or call "
                    "compress() before torch.distributed.init_process_group()"
                )

    def in_turns(self, works: Sequence[Callable[[], T]]) -> Iterator[Callable[[], T]]:
        """Yield for each piece of work, in order, a call that returns its result or raises what it raised.

        Each round every process does one piece; then the results go round.
        """
        for start in range(0, len(works), self.size):
            round_of = works[start : start + self.size]
            own = _outcome(round_of[self.rank]) if self.rank < len(round_of) else None
            for rank in range(len(round_of)):
                outcome = self._sent(own, rank)
                assert outcome is not None
                yield outcome

    def _sent(self, value: T, source: int) -> T:
        box: list[Any] = [_packed(value) if self.rank == source else None]
        with _answering(self.rank):
            distributed.broadcast_object_list(box, distributed.get_global_rank(self.group, source), self.group)
        return value if self.rank == source else self._unpacked(box[0])

    def _unpacked(self, data: bytes) -> Any:
        def place(storage: Any, location: str) -> Any:
            return storage if location == "cpu" else storage.to(device=self.device)

        return torch.load(io.BytesIO(data), map_location=place, weights_only=False)


@dataclass(frozen=True)
class FirstsTimer:
    """A timer by which all processes have the timings of the first, so that they decide alike."""

    job: Job
    timer: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Time what is given in the first process, while the others wait."""
        return self.job.firsts(self.timer(*args, **kwargs) if self.job.rank == 0 else None)


@contextmanager
def sharing(model: nn.Module) -> Iterator[Job | None]:
    """Return a context with the job that this process, which has ``model``, is part of, or None if it is alone.

    Raises FxlrdError if the other processes do not come.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        yield None
        return
    rank, size = distributed.get_rank(), distributed.get_world_size()
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with ExitStack() as stack:  # a group that is destroyed while another process connects to it leaves that one hanging
        with _answering(rank, "call compress() in every process, or before torch.distributed.init_process_group()"):
            for timeout in (JOINING, WORKING):
                group = distributed.new_group(backend="gloo", timeout=timeout)
                stack.callback(_destroy, group)
        yield Job(rank, size, device, group)


def _destroy(group: Any) -> None:
    with suppress(Exception):
        distributed.destroy_process_group(group)


@dataclass(frozen=True)
class _Returned:
    value: Any

    def __call__(self) -> Any:
        return self.value


@dataclass(frozen=True)
class _Raised:
    error: Exception

    def __call__(self) -> Any:
        raise self.error


def _outcome(work: Callable[[], Any]) -> Callable[[], Any]:
    try:
        return _Returned(work())
    except Exception as error:
        return _Raised(error.with_traceback(None))


def _packed(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


@contextmanager
def _answering(rank: int, remedy: str = "its own message says why") -> Iterator[None]:
    """Return a context that turns errors of communication into one line."""
    try:
        yield
    except RuntimeError as error:
        raise FxlrdError(
            f"sharing: process {rank} waits in vain for another one, which has ended or does not answer; {remedy} "
            f"({one_line(error)[:200]})"
        ) from error
