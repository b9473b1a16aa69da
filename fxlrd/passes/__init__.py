"""The passes, one a file. ``PASSES`` maps the name of the text form to the class."""

from fxlrd.passes.branch import Branch
from fxlrd.passes.calibrate import Calibrate
from fxlrd.passes.decompose import Decompose
from fxlrd.passes.freeze import Freeze
from fxlrd.passes.merge import Merge
from fxlrd.passes.result import PassResult, Site, Skip
from fxlrd.passes.snap import Snap

PASSES = {
    "calibrate": Calibrate,
    "decompose": Decompose,
    "snap": Snap,
    "merge": Merge,
    "branch": Branch,
    "freeze": Freeze,
}

__all__ = ["PASSES", "Branch", "Calibrate", "Decompose", "Freeze", "Merge", "PassResult", "Site", "Skip", "Snap"]
