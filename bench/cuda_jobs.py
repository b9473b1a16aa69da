"""The jobs of bench.cuda: each measures some models side by side and gives the figures of each by its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import fxlrd
from bench.generation import time_decode, time_prefill
from fxlrd.graph.inputs import Inputs
from fxlrd.layers.build import skeleton
from fxlrd.timing.clock import Timing, compare
from fxlrd.timing.models import time_models

PRESETS: dict[str, dict[str, Any]] = {
    "lrd": {"preset": "lrd"},
    "ranks": {"preset": "ranks"},
    "merge": {"preset": "merge"},
    "auto": {"preset": "auto"},
}
"""Options of compress by the name of the row; the last two get calibration inputs, the last one a budget."""
Row = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Scale:
    """How large what is measured is."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    image: int
    calibration: int
    language: Mapping[str, int]
    prompt: int
    channels: int
    positions: int
    step: int
    seconds: float
    budget: fxlrd.Budget


FULL = Scale(
    models=("resnet50", "vit_b_16", "resnet152"),
    batches=(8, 64),
    dtypes=("float32", "float16", "bfloat16"),
    image=224,
    calibration=64,
    language={
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    prompt=256,
    channels=512,
    positions=14,
    step=16,
    seconds=4.0,
    budget=fxlrd.Budget(latency=0.6),
)
QUICK = Scale(
    models=("tiny",),
    batches=(2,),
    dtypes=("float32",),
    image=32,
    calibration=10,
    language={
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    prompt=16,
    channels=32,
    positions=4,
    step=8,
    seconds=0.01,
    budget=fxlrd.Budget(params=0.6),  # a model as small as that may not get faster
)


@dataclass(frozen=True)
class Job:
    """One row of the file.

    Attributes:
        part: what it belongs to: compress, vision, language or staircase.
        columns: the headings of ``values``, which say what is measured.
        run: measures; returns the figures of each variant by its name.
    """

    part: str
    columns: tuple[str, ...]
    values: tuple[Any, ...]
    run: Callable[[], Row]

    @property
    def name(self) -> str:
        """What it is called in the file."""
        return " ".join([self.part, *map(str, self.values)])


def jobs(scale: Scale, device: torch.device) -> Iterator[Job]:
    """Return all jobs, the most telling first."""
    variants = lru_cache(maxsize=1)(partial(_variants, scale, device))  # for all modes of one
    for name in scale.models[:1]:
        run = partial(_compressing, scale, device, name)
        yield Job("compress", ("model",), (name,), run)
    for batch in scale.batches:
        for dtype in scale.dtypes:
            for name in scale.models:
                for mode, timed in MODES.items():
                    run = partial(_vision, scale, variants, timed, name, dtype, batch)
                    yield Job("vision", ("model", "dtype", "batch", "mode"), (name, dtype, batch, mode), run)
    for dtype in reversed(scale.dtypes):
        for what in ("prefill", "decode"):
            for compiled in (False, True):
                values = (what, dtype, "Inductor" if compiled else "eager")
                run = partial(_language, scale, device, what, dtype, compiled)
                yield Job("language", ("what", "dtype", "mode"), values, run)
    for dtype in scale.dtypes:
        yield Job("staircase", ("dtype",), (dtype,), partial(_staircase, scale, device, dtype))


def _compressing(scale: Scale, device: torch.device, name: str) -> Row:
    """Measure what each preset takes: seconds, and the most memory on the device beyond the model's own."""
    model, x, calibration = _model(scale, device, name, "float32", scale.batches[0])
    rows: Row = {}
    for preset in PRESETS:
        before = _reset_peak(device)
        start = time.perf_counter()
        _compressed(scale, model, x, calibration, preset)
        seconds = time.perf_counter() - start
        rows[preset] = {"seconds": seconds, "peak MiB": (_peak(device) - before) / 2**20}
    return rows


def _vision(
    scale: Scale, variants: Callable[..., Any], timed: Callable[..., Any], name: str, dtype: str, batch: int
) -> Row:
    models, x = variants(name, dtype, batch)
    return _figures(timed(models, Inputs.of(x), scale.seconds * len(models)))


def _variants(
    scale: Scale, device: torch.device, name: str, dtype: str, batch: int
) -> tuple[dict[str, nn.Module], Tensor]:
    """Return the original and what each preset makes of it, and the inputs to time them with."""
    model, x, calibration = _model(scale, device, name, dtype, batch)
    return {"original": model} | {p: _compressed(scale, model, x, calibration, p) for p in PRESETS}, x


def _compressed(scale: Scale, model: nn.Module, x: Tensor, calibration: list[Tensor], preset: str) -> nn.Module:
    data = calibration if preset in ("merge", "auto") else None
    budget = scale.budget if preset == "auto" else None
    return fxlrd.compress(model, x, calibration=data, budget=budget, measure=False, **PRESETS[preset]).model


def _model(
    scale: Scale, device: torch.device, name: str, dtype: str, batch: int
) -> tuple[nn.Module, Tensor, list[Tensor]]:
    from torchvision import models

    torch.manual_seed(0)
    model = (_tiny() if name == "tiny" else getattr(models, name)()).eval()
    form: dict[str, Any] = {
        "device": device,
        "dtype": getattr(torch, dtype),
        "memory_format": torch.channels_last,
    }
    images = torch.randn(max(batch, scale.calibration), 3, scale.image, scale.image).to(**form)
    return model.to(**form), images[:batch], list(images[: scale.calibration].split(scale.calibration // 5))


def _tiny() -> nn.Module:
    convs = [nn.Sequential(nn.Conv2d(c, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) for c in (3, 32, 32)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def _eagerly(models: Mapping[str, nn.Module], inputs: Inputs, seconds: float) -> dict[str, Timing]:
    return time_models(models, inputs, seconds=seconds)


def _under_inductor(models: Mapping[str, nn.Module], inputs: Inputs, seconds: float) -> dict[str, Timing]:
    return time_models(models, inputs, under_inductor=True, seconds=seconds)


def _under_cuda_graphs(models: Mapping[str, nn.Module], inputs: Inputs, seconds: float) -> dict[str, Timing]:
    """Time models as Inductor replays them: on a CPU, which has no graphs to replay, as Inductor alone."""
    compiled = {name: torch.compile(model, mode="reduce-overhead") for name, model in models.items()}
    calls = {name: partial(model, *inputs.args, **inputs.kwargs) for name, model in compiled.items()}
    with torch.no_grad():
        return compare(calls, inputs.args[0].device, seconds)


MODES = {"eager": _eagerly, "Inductor": _under_inductor, "CUDA graphs": _under_cuda_graphs}


def _language(scale: Scale, device: torch.device, what: str, dtype: str, compiled: bool) -> Row:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=True, **scale.language)
    model = LlamaForCausalLM(config).eval().to(device=device, dtype=getattr(torch, dtype))
    ids = torch.randint(config.vocab_size, (scale.calibration, scale.prompt)).to(device)
    example, batches = {"input_ids": ids[:1]}, [{"input_ids": part} for part in ids.split(2)]
    models = {"original": model}
    auto = {"budget": fxlrd.Budget(layers=0.5), "calibration": batches}
    for name, options in {"lrd": {"ratio": 2.0}, "auto": auto}.items():
        models[name] = fxlrd.compress(model, example, measure=False, **options).model
    timed = time_prefill if what == "prefill" else time_decode
    return _figures(timed(models, 1, compiled, scale.seconds * len(models)))


def _staircase(scale: Scale, device: torch.device, dtype: str) -> Row:
    """Time a conv in Tucker form at each rank, against the original."""
    conv = nn.Conv2d(scale.channels, scale.channels, 3, padding=1, bias=False)
    form: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype), "memory_format": torch.channels_last}
    conv = conv.eval().to(**form)
    x = torch.randn(scale.batches[0], scale.channels, scale.positions, scale.positions).to(**form)
    ranks = range(scale.step // 2, scale.channels, scale.step // 2)
    models = {"original": conv} | {str(r): skeleton(conv, (r, r)) for r in ranks}
    return _figures(time_models(models, Inputs.of(x), seconds=scale.seconds * 4))


def _figures(timings: Mapping[str, Timing]) -> Row:
    return {
        name: {"ms": t.seconds * 1e3, "speed": 1 / t.ratio, "spread": t.spread / t.ratio**2}
        for name, t in timings.items()
    }


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    """Return the most bytes allocated on a GPU since the last reset; of other devices 0."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
