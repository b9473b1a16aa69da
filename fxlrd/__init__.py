"""fxlrd: trained PyTorch models, faster by low-rank decomposition, verified at every step.

What stands here is loaded when it is first used: ``import fxlrd`` costs a millisecond.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxlrd import ranks
    from fxlrd.budget import Budget
    from fxlrd.capturing.whole import capture
    from fxlrd.compression import Result, compress
    from fxlrd.differences.compare import diff
    from fxlrd.errors import CaptureError, FxlrdError, VerificationError
    from fxlrd.finetuning import finetune
    from fxlrd.pipeline import Pipeline
    from fxlrd.saving.load import load
    from fxlrd.saving.save import save
    from fxlrd.tradeoffs import Frontier, frontier

__all__ = [
    "Budget",
    "CaptureError",
    "Frontier",
    "FxlrdError",
    "Pipeline",
    "Result",
    "VerificationError",
    "capture",
    "compress",
    "diff",
    "finetune",
    "frontier",
    "load",
    "ranks",
    "save",
]
__version__ = "0.1.0"

_HOMES = {
    "Budget": "budget",
    "CaptureError": "errors",
    "Frontier": "tradeoffs",
    "FxlrdError": "errors",
    "Pipeline": "pipeline",
    "Result": "compression",
    "VerificationError": "errors",
    "capture": "capturing.whole",
    "compress": "compression",
    "diff": "differences.compare",
    "finetune": "finetuning",
    "frontier": "tradeoffs",
    "load": "saving.load",
    "save": "saving.save",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
