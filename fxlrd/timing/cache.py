"""The timing cache on disk, and what an entry depends on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxlrd.files import write_atomically
from fxlrd.timing.clock import Timing


class Setting(NamedTuple):
    """What a timing depends on besides the layer; a cache entry is good for one of these only."""

    device: str
    torch_version: str
    threads: int
    compiled: bool

    @classmethod
    def here(cls, device: torch.device, compiled: bool) -> Setting:
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
    if given := os.environ.get("FXLRD_CACHE_DIR"):
        return Path(given)
    if around := os.environ.get("XDG_CACHE_HOME"):
        return Path(around) / "fxlrd"
    return Path(os.path.expanduser("~")) / ".cache" / "fxlrd"  # unlike Path.home, it never raises


_FORMAT = 1


class Cache:
    """Timings on disk: one small JSON file for each setting and layer signature.

    A file is replaced as a whole, so that processes that write at once leave a whole file, and an interrupted
    search finds what it had finished. A file that cannot be read, or that is about something else, is
    ignored with a warning and measured anew. Without a writable folder nothing is kept.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else cache_folder() / "latency"

    def load(self, setting: Setting, signature: str) -> dict[str, Timing]:
        """Return the known timings by variant name; none where there is no good file."""
        path = self._path(setting, signature)
        try:
            content = json.loads(path.read_text())
            if content["format"] != _FORMAT or content["key"] != _key(setting, signature):
                raise ValueError("it is about another setting or layer")
            found = {str(name): Timing(**fields) for name, fields in content["timings"].items()}
            if not all(isinstance(v, float) and 0 <= v < math.inf for t in found.values() for v in asdict(t).values()):
                raise ValueError("a timing is no number")
            return found
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
    return next((name for name, known in _LAYOUTS.items() if meta.memory_format == known), "contiguous")
