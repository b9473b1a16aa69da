"""The passes, one a file. ``PASSES`` maps the name of the text form to the class."""

from fxlrd.passes.allocate import Allocate
from fxlrd.passes.branch import Branch
from fxlrd.passes.calibrate import Calibrate
from fxlrd.passes.contract import PassResult, Site, Skip
from fxlrd.passes.decompose import Decompose
from fxlrd.passes.freeze import Freeze
from fxlrd.passes.merge import Merge
from fxlrd.passes.recalibrate import Recalibrate
from fxlrd.passes.refit import Refit
from fxlrd.passes.snap import Snap

PASSES = {
    "calibrate": Calibrate,
    "allocate": Allocate,
    "decompose": Decompose,
    "snap": Snap,
    "merge": Merge,
    "branch": Branch,
    "refit": Refit,
    "recalibrate": Recalibrate,
    "freeze": Freeze,
}

__all__ = [
    "PASSES",
    "Allocate",
    "Branch",
    "Calibrate",
    "Decompose",
    "Freeze",
    "Merge",
    "PassResult",
    "Recalibrate",
    "Refit",
    "Site",
    "Skip",
    "Snap",
]
