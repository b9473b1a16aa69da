"""The passes, one a file. ``PASSES`` maps the name of the text form to the class."""

from fxlrd.passes.calibrate import Calibrate
from fxlrd.passes.decompose import Decompose
from fxlrd.passes.merge import Merge
from fxlrd.passes.result import PassResult, Site, Skip
from fxlrd.passes.snap import Snap

PASSES = {"calibrate": Calibrate, "decompose": Decompose, "snap": Snap, "merge": Merge}

__all__ = ["PASSES", "Calibrate", "Decompose", "Merge", "PassResult", "Site", "Skip", "Snap"]
