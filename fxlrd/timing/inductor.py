"""A module as Inductor serves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn


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
