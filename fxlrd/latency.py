"""On-device timing, and its cache on disk.

Variants are timed interleaved, one call of each per round, so that a drift of the machine hits all of them
alike; what counts is each variant's time relative to the first variant's *of the same round*. Rounds go on
until the 95 % interval of every such ratio's median is narrow, or the time allowed is up, and the interval is
reported with the figure: a difference that it covers is not called a gain.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxlrd.files import write_whole

SPREAD = 0.02
"""Half-width of the 95 % interval of a ratio, relative, at which timing stops."""

_ROUNDS = (7, 60)
_SHORTEST = 5e-4


@dataclass(frozen=True)
class Timing:
    """A measured variant: median seconds, median ratio to the reference variant, and the half-width of that
    ratio's 95 % interval.
    """

    seconds: float
    ratio: float = 1.0
    spread: float = 0.0

    def faster(self, other: Timing | None = None) -> bool:
        """Whether this is faster than ``other`` (default: the reference) by more than the noise of both."""
        if other is None:
            return self.ratio + self.spread < 1.0
        noise = (self.spread**2 + other.spread**2) ** 0.5
        return self.ratio + noise < other.ratio


def compare(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float = 1.5,
    spread: float = SPREAD,
) -> dict[str, Timing]:
    """Time callables side by side; the first is the reference of the ratios.

    Short calls are repeated inside a sample until it lasts half a millisecond. Stops when every ratio is
    known within ``spread``, or after ``seconds`` (but not before seven rounds).
    """
    wait = _synchronizer(device)
    repeats = {}
    for name, call in variants.items():
        for _ in range(2):  # the first calls allocate, compile and pick kernels
            call()
        wait()
        repeats[name] = max(1, round(_SHORTEST / max(_sample(call, 1, wait), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    reference = next(iter(variants))
    start = time.perf_counter()
    for done in range(1, _ROUNDS[1] + 1):
        # Alternate the direction, so that no variant always runs in the wake of the same one.
        for name in list(variants)[:: 1 if done % 2 else -1]:
            variants[name]()  # its weights are in the caches again, as they are while it is being served
            samples[name].append(_sample(variants[name], repeats[name], wait))
        if done >= _ROUNDS[0]:
            timings = {name: _timing(s, samples[reference]) for name, s in samples.items()}
            late = time.perf_counter() - start > seconds
            if late or all(t.spread <= spread * max(t.ratio, 1e-9) for t in timings.values()):
                break
    return timings


def _sample(call: Callable[[], object], repeats: int, wait: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def _timing(samples: list[float], reference: list[float]) -> Timing:
    ratios = [a / b for a, b in zip(samples, reference, strict=True)]
    middle = statistics.median(ratios)
    # For normal noise: σ ≈ 1.4826·MAD, standard error of a median ≈ 1.2533·σ/√n, 95 % ≈ 1.96 of those.
    deviation = statistics.median(abs(r - middle) for r in ratios)
    return Timing(statistics.median(samples), middle, 1.96 * 1.2533 * 1.4826 * deviation / len(ratios) ** 0.5)


def _synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


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


def compiled(module: nn.Module) -> Callable[..., Any]:
    """Return the module under Inductor with frozen weights, as it is served; compiled at its first call.

    Each call traces a graph module of its own: one code object each, so that torch's limit of recompilations
    per code object is never met. Dynamo's caches are left as they are. The first call has to be made with
    gradients off: weights freeze into constants then or not at all.
    """
    try:
        gm = module if isinstance(module, fx.GraphModule) else fx.symbolic_trace(module)
        optimized = torch.compile(fx.GraphModule(gm, gm.graph))
    except Exception:  # whatever stops a trace: as its user would compile it
        optimized = torch.compile(module)
    frozen = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal frozen
        if frozen:
            return optimized(*args, **kwargs)
        from torch._dynamo import config as dynamo
        from torch._inductor import config

        # As an option of torch.compile it would reach Inductor alone, and Dynamo hands weights over as inputs.
        # Copies of one untraceable model have one code object: past the limit Dynamo would run it eagerly.
        with config.patch(freezing=True), dynamo.patch(recompile_limit=256, accumulated_recompile_limit=4096):
            result = optimized(*args, **kwargs)
        frozen = True
        return result

    return call


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
            write_whole(path, json.dumps(content, indent=1))
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
