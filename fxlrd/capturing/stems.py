"""Which convs of few channels are not a model's first, although the regions that they are in begin with them."""

from __future__ import annotations

from torch import fx

from fxlrd.capturing.flow import flow
from fxlrd.capturing.proof import Original
from fxlrd.graph.guards import is_stem, reads_a_layer
from fxlrd.graph.surgery import layers


def not_stems(original: Original, gm: fx.GraphModule) -> frozenset[str]:
    """Return the layers of the regions ``gm`` that look like the model's first convs and read what layers make.

    A region has an argument where the whole graph of the model, such as Dynamo's, has what computes it.
    """
    candidates = [name for name, module in layers(gm).items() if is_stem(gm, name, module)]
    if not candidates:
        return frozenset()
    try:
        run = flow(original.model, original.inputs)
    except Exception:  # code that fails under the recording of its functions
        return frozenset()
    return frozenset(name for name in candidates if reads_a_layer(run, name))
