"""The timing cache on disk, what an entry depends on, and the one way to a layer's times: cached or measured."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxlrd.files import write_atomically
from fxlrd.timing.clock import Timer, Timing, compare
from fxlrd.timing.workload import Workload, time_workloads


class Setting(NamedTuple):
    """What a timing depends on besides the layer; a cache entry is good for one of these only."""

    device: str
    torch_version: str
    threads: int
    compiled: bool

    @classmethod
    def current(cls, device: torch.device, compiled: bool) -> Setting:
        """Return the setting of this process on ``device``."""
        return cls(_device_name(device.type, device.index), torch.__version__, torch.get_num_threads(), compiled)


@lru_cache
def _device_name(kind: str, index: int | None) -> str:
    if kind == "cuda":
        return torch.cuda.get_device_name(index)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{kind}: {model} ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})"


def cache_folder() -> Path:
    """Return the folder of the timing cache: $FXLRD_CACHE_DIR, or fxlrd/ in the user's cache folder."""
    if folder := os.environ.get("FXLRD_CACHE_DIR"):
        return Path(folder)
    if user_caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(user_caches) / "fxlrd"
    return Path(os.path.expanduser("~")) / ".cache" / "fxlrd"  # unlike Path.home, it never raises


_FORMAT = 1


class Cache:
    """Timings on disk: one small JSON file for each setting and layer signature.

    A file is replaced atomically: processes that write at once leave a complete file, and an interrupted search finds
    what it had finished. A file that cannot be read, or that is about something else, is ignored with a warning and
    measured anew. Without a writable folder nothing is stored.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else cache_folder() / "latency"

    def load(self, setting: Setting, signature: str) -> dict[str, Timing]:
        """Return the stored timings by variant name; none where there is no valid file."""
        path = self._path(setting, signature)
        try:
            content = json.loads(path.read_text())
            if content["format"] != _FORMAT or content["key"] != _key(setting, signature):
                raise ValueError("it is about another setting or layer")
            timings = {str(name): Timing(**fields) for name, fields in content["timings"].items()}
            figures = [value for timing in timings.values() for value in asdict(timing).values()]
            if not all(isinstance(value, float) and 0 <= value < math.inf for value in figures):
                raise ValueError("a timing is not a number")
            return timings
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            warnings.warn(f"timing cache: {path} is ignored ({type(error).__name__}: {error})", stacklevel=2)
            return {}

    def store(self, setting: Setting, signature: str, timings: Mapping[str, Timing]) -> None:
        """Write the timings, replacing the file at once."""
        path = self._path(setting, signature)
        entries = {name: asdict(t) for name, t in timings.items()}
        content = {"format": _FORMAT, "key": _key(setting, signature), "timings": entries}
        try:
            write_atomically(path, json.dumps(content, indent=1))
        except OSError as error:
            warnings.warn(f"timing cache: {path} cannot be written ({error}); going on without", stacklevel=2)

    def _path(self, setting: Setting, signature: str) -> Path:
        digest = hashlib.sha256(json.dumps(_key(setting, signature)).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"


def _key(setting: Setting, signature: str) -> dict[str, Any]:
    return {**setting._asdict(), "signature": signature}


def signature(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> str:
    """Return what a layer's time depends on: its configuration and its input, as text."""
    return f"{module!r} on {str(dtype)[6:]}{list(shape)} {layout}"


def example(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    """Return a tensor to time with; the global random state is left alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).to(device=device, dtype=dtype)
    return x.contiguous(memory_format=_LAYOUTS.get(layout, torch.contiguous_format))


_LAYOUTS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}


def layout(meta: TensorMetadata) -> str:
    """Return a tensor's memory format as text."""
    return next((name for name, memory_format in _LAYOUTS.items() if meta.memory_format == memory_format), "contiguous")


_SIDE_BY_SIDE = 10
"""Variants that are timed together, beside the first; each such group is stored as soon as it is timed."""


@dataclass
class Stopwatch:
    """The way to the times of layers in one run of a pass: what memory or the cache on disk holds is not timed again.

    ``under_inductor`` times under Inductor with frozen weights. ``seconds`` bounds the timing of one signature's
    variants. Unless ``cached``, timings on disk are neither read nor written. ``timer`` measures.
    """

    under_inductor: bool = False
    seconds: float = 1.5
    cached: bool = True
    timer: Timer = compare
    _timings: dict[tuple[torch.device, str], dict[str, Timing]] = field(default_factory=dict, repr=False)

    def times(
        self, signature: str, device: torch.device, variants: Mapping[str, Callable[[], Workload]]
    ) -> dict[str, Timing]:
        """Return a timing for each of ``variants``; ratios are to the first, which is timed beside each of the others.

        ``variants`` maps names to functions that make the workload: those that need no timing are not made. Their
        times depend on the ``signature``, the name and the setting alone.
        """
        first, *others = variants
        setting = Setting.current(device, self.under_inductor)
        cache = Cache() if self.cached else None
        timings = self._timings.setdefault((device, signature), {})
        if cache is not None and not timings:
            timings.update(cache.load(setting, signature))
        if first not in timings:  # the one that the others' ratios are to
            timings.clear()
        for group in self._groups(first, others, timings):
            workloads = {name: variants[name]() for name in (first, *group)}
            measured = time_workloads(workloads, device, self.seconds, self.timer)
            timings.update({name: timing for name, timing in measured.items() if name not in timings})
            if cache is not None:
                cache.store(setting, signature, timings)
        return {name: timings[name] for name in variants}

    @staticmethod
    def _groups(first: str, others: Iterable[str], timings: Mapping[str, Timing]) -> list[list[str]]:
        """Return the variants to time, in groups of those to time side by side beside the first."""
        missing = [name for name in others if name not in timings]
        if not missing:
            return [] if first in timings else [[]]
        return [missing[start : start + _SIDE_BY_SIDE] for start in range(0, len(missing), _SIDE_BY_SIDE)]
