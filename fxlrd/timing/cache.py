"""The timing cache on disk, and what an entry depends on.

An entry holds no seconds of a layer: a time is only comparable to a time taken in the same minute. It holds ratios to
the first variant of its signature, the reference kernel's among them, which was timed beside the others, and how long
that took then. The seconds of a layer now follow from those of the kernel now (fxlrd/timing/stopwatch.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fxlrd.errors import one_line
from fxlrd.escaping import visible
from fxlrd.files import read_regular, write_atomically
from fxlrd.graph.precision import uses_tf32
from fxlrd.timing.inductor import Compile


class Setting(NamedTuple):
    """What a timing depends on besides the layer; a cache entry is good for one of these only."""

    device: str
    torch_version: str
    threads: int
    compiled: Compile

    @classmethod
    def current(cls, device: torch.device, compiled: Compile) -> Setting:
        """Return the setting of this process on ``device``; whether a GPU uses TF32 is part of its name."""
        name = _device_name(device.type, device.index)
        if used := uses_tf32(device):
            name = f"{name}, TF32 for {' and '.join(used)}"
        return cls(name, torch.__version__, torch.get_num_threads(), compiled)


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


_LARGEST = 2**22
"""Bytes; an entry has some hundred for each variant."""
_FORMAT = 3
_OLDER = (1, 2)
"""Formats whose files are replaced without a word. Those of format 1 hold seconds, and nothing to compare them with;
those of format 2 times of convs in int8 that read and write fp32."""


@dataclass(frozen=True)
class Ratio:
    """A time relative to that of the first variant in the same rounds, and the half-width of its 95 % interval."""

    ratio: float
    spread: float = 0.0


@dataclass(frozen=True)
class Entry:
    """What was measured of one signature.

    Attributes:
        timings: the ratios of the variants, by name.
        reference: the ratio of the reference kernel, timed beside the first variant.
        reference_seconds: how long the reference kernel took then.
    """

    timings: Mapping[str, Ratio]
    reference: Ratio
    reference_seconds: float

    @classmethod
    def read(cls, content: Any) -> Entry:
        """Read the plain data of an entry. Raises ValueError, TypeError or KeyError for what is not one."""
        timings = {str(name): Ratio(**fields) for name, fields in content["timings"].items()}
        entry = cls(timings, Ratio(**content["reference"]), content["reference_seconds"])
        figures = [x for ratio in (*timings.values(), entry.reference) for x in (ratio.ratio, ratio.spread)]
        if not all(isinstance(x, float) and 0 <= x < math.inf for x in (*figures, entry.reference_seconds)):
            raise ValueError("a timing is not a number")
        ratios = (each.ratio for each in (*timings.values(), entry.reference))
        if not all(x > 0 for x in (*ratios, entry.reference.ratio * entry.reference_seconds)):
            raise ValueError("something took no time")
        return entry


class Cache:
    """Entries on disk: one small JSON file for each setting and signature.

    A file is replaced atomically: processes that write at once leave a complete file, and an interrupted search finds
    what it had finished. A file that cannot be read, or that is about something else, is ignored with a warning and
    measured anew; one of an older format is ignored without. If the folder is not writable, nothing is stored.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else cache_folder() / "latency"

    def load(self, setting: Setting, signature: str) -> Entry | None:
        """Return the entry, or None where there is no valid file."""
        path = self._path(setting, signature)
        try:
            content = json.loads(read_regular(path, _LARGEST))
            if content["format"] in _OLDER:
                return None
            if content["format"] != _FORMAT or content["key"] != _key(setting, signature):
                raise ValueError("it is about another setting or layer")
            return Entry.read(content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            warnings.warn(visible(f"timing cache: {path} is ignored ({one_line(error)})"), stacklevel=2)
            return None

    def store(self, setting: Setting, signature: str, entry: Entry) -> None:
        """Write the entry, replacing the file at once."""
        path = self._path(setting, signature)
        content = {"format": _FORMAT, "key": _key(setting, signature), **asdict(entry)}
        try:
            write_atomically(path, json.dumps(content, indent=1))
        except OSError as error:
            # The same words for every entry, so that Python shows them once.
            why = f"{type(error).__name__}: {error.strerror}"
            text = f"timing cache: {self.folder} cannot be written to ({why}); going on without"
            warnings.warn(visible(text), stacklevel=2)

    def _path(self, setting: Setting, signature: str) -> Path:
        digest = hashlib.sha256(json.dumps(_key(setting, signature)).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"


def _key(setting: Setting, signature: str) -> dict[str, Any]:
    return {**setting._asdict(), "signature": signature}


def signature(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> str:
    """Return what a layer's time depends on: its configuration and its input, as text."""
    return f"{module!r} on {str(dtype)[6:]}{list(shape)} {layout}"
