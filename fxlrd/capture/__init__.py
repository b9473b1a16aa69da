"""Model → GraphModule."""

from fxlrd.capture.regions import capture_regions, counted
from fxlrd.capture.whole import capture

__all__ = ["capture", "capture_regions", "counted"]
