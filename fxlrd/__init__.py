"""fxlrd: trained PyTorch models, faster by low-rank decomposition, verified at every step."""

from fxlrd import ranks
from fxlrd.budget import Budget
from fxlrd.capture import capture
from fxlrd.checkpoint import load, save
from fxlrd.compress import Result, compress
from fxlrd.diff import diff
from fxlrd.errors import CaptureError, FxlrdError, VerificationError
from fxlrd.finetune import finetune
from fxlrd.pipeline import Pipeline

__all__ = [
    "Budget",
    "CaptureError",
    "FxlrdError",
    "Pipeline",
    "Result",
    "VerificationError",
    "capture",
    "compress",
    "diff",
    "finetune",
    "load",
    "ranks",
    "save",
]
__version__ = "0.1.0"
