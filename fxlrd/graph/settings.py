"""Torch's global settings and Python's random state, which a model's forward may change."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import thread as futures_thread
from contextlib import contextmanager
from typing import Any

import torch


def _algorithms() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _use_algorithms(state: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (_algorithms, _use_algorithms),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    *(_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
)
"""Readers and writers of settings."""


@contextmanager
def settings_restored() -> Iterator[None]:
    """On leaving, torch's global settings are as before, and the random states of torch, Python and NumPy.

    A random state that moved is left where it is while other threads run: they may have drawn, and would draw the same
    again. Torch's is restored even then if it was seeded anew.
    """
    settings = [read() for read, _ in _SETTINGS]
    seed = torch.initial_seed()
    alone = _alone()
    states = [(read(), read, write) for read, write in _random_states()]
    try:
        yield
    finally:
        for (read, write), value in zip(_SETTINGS, settings, strict=True):
            if read() != value:
                write(value)
        alone = alone and _alone()
        for value, read, write in states:
            seeded = read is torch.get_rng_state and torch.initial_seed() != seed
            if (alone or seeded) and not _equal(read(), value):
                write(value)


def _alone() -> bool:
    """Whether no other thread runs but that which refreshes progress bars, and those that wait for work."""
    others = [t for t in threading.enumerate() if t is not threading.current_thread()]
    return all(type(t).__module__.startswith("tqdm.") or _waits_for_work(t) for t in others)


def _waits_for_work(thread: threading.Thread) -> bool:
    """Whether this is an idle worker of an executor: Inductor keeps some for as long as the process lives."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code is futures_thread._worker.__code__


def _random_states() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    states: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (torch.get_rng_state, torch.set_rng_state),
        (random.getstate, random.setstate),
    ]
    if (numpy := sys.modules.get("numpy")) is not None:
        states.append((numpy.random.get_state, numpy.random.set_state))
    return states


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)
