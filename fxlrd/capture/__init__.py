"""Model → GraphModule."""

from fxlrd.capture.whole import capture

__all__ = ["capture"]
