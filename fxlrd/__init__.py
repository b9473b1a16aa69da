"""fxlrd: trained PyTorch models, faster by low-rank decomposition, verified at every step."""

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
