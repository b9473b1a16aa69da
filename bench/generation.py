"""How fast language models generate, side by side: prefill of a prompt, and tokens decoded one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.timing.clock import Timing, compare
from fxlrd.timing.inductor import compiled

PROMPT, DECODED = 256, 64


def time_prefill(models: Mapping[str, nn.Module], batch: int, compile: bool, seconds: float) -> dict[str, Timing]:
    """Time a forward of `PROMPT` tokens up to the logits of the last one; ratios are to the first model."""
    return _compare(models, lambda model: _prefill(model, _tokens(model, batch, PROMPT), compile), seconds)


def time_decode(models: Mapping[str, nn.Module], batch: int, compile: bool, seconds: float) -> dict[str, Timing]:
    """Time the decoding of `DECODED` tokens after a short prompt; ratios are to the first model."""
    return _compare(models, lambda model: _decode(model, _tokens(model, batch, 1), compile), seconds)


def _compare(
    models: Mapping[str, nn.Module], workload: Callable[[Any], Callable[[], object]], seconds: float
) -> dict[str, Timing]:
    device = next(next(iter(models.values())).parameters()).device
    with torch.inference_mode(False), torch.no_grad():
        return compare({name: workload(model) for name, model in models.items()}, device, seconds)


def _tokens(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def _prefill(model: Any, ids: Tensor, compile: bool) -> Callable[[], object]:
    call = compiled(model) if compile else model
    return lambda: call(input_ids=ids, use_cache=False, logits_to_keep=1)


def _decode(model: Any, first: Tensor, compile: bool) -> Callable[[], object]:
    """Return the decoding, with a cache of fixed size, made by an eager step: one graph serves every step after."""
    from transformers import StaticCache

    call = compiled(model) if compile else model
    cache = StaticCache(config=model.config, max_cache_len=DECODED + 1)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        model(input_ids=first, use_cache=True, **{name: cache})

    def run() -> Tensor:
        cache.reset()
        token = first
        for _ in range(DECODED):
            logits = call(input_ids=token, use_cache=True, **{name: cache}).logits
            token = logits[:, -1:].argmax(-1)
        return token

    return run
