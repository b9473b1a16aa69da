"""A pass of your own in a pipeline: Dropout layers are removed, since they do nothing in eval mode.

python examples/custom_pass.py [--quick]
"""

import sys
from dataclasses import dataclass

import torch
from torch import fx, nn

import fxlrd
from fxlrd.graph.layer import origin
from fxlrd.passes import Decompose, PassResult, Site
from fxlrd.passes.driver import start
from fxlrd.progress import Progress, quiet


@dataclass(frozen=True)
class FoldDropout:
    """Remove Dropout layers. Exact in eval mode, where Dropout is the identity; do not train the result."""

    def __call__(self, gm: fx.GraphModule, progress: Progress = quiet) -> PassResult:
        """Return a copy of ``gm`` without them."""
        run = start(self, gm, progress)
        run.each(run.gm.graph.find_nodes(op="call_module"), lambda node: self._fold(run.gm, node))
        return run.result()

    def _fold(self, gm: fx.GraphModule, node: fx.Node) -> Site | None:
        if type(gm.get_submodule(str(node.target))) is not nn.Dropout:
            return None
        name = origin(node)
        node.replace_all_uses_with(node.all_input_nodes[0])
        gm.graph.erase_node(node)
        return Site(name, exact=True, note="removed: it is the identity in eval mode")


model = nn.Sequential(nn.Linear(256, 256), nn.Dropout(), nn.ReLU(), nn.Linear(256, 256)).eval()
x = torch.randn(8, 256)
passes = [FoldDropout(), Decompose(ratio=2)]
result = fxlrd.compress(model, x, pipeline=passes, measure="--quick" not in sys.argv)
print(result.report.to_table())
print(fxlrd.diff(model, result))
