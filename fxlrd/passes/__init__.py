"""The passes, one a file. ``PASSES`` maps the name of the text form to the class."""

from fxlrd.passes.decompose import Decompose
from fxlrd.passes.result import PassResult, Site, Skip
from fxlrd.passes.snap import Snap

PASSES = {"decompose": Decompose, "snap": Snap}

__all__ = ["PASSES", "Decompose", "PassResult", "Site", "Skip", "Snap"]
