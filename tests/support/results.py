"""What a pass reports, in the form in which tests compare it."""

from __future__ import annotations

from torch import fx

from fxlrd.graph.facts import provenance
from fxlrd.passes.contract import PassResult


def reasons(result: PassResult) -> dict[str, str]:
    """Return the code of the reason why each skipped layer was left alone."""
    return {skip.name: skip.reason.code for skip in result.skipped}


def site_names(result: PassResult) -> list[str]:
    """Return the names of the layers that the pass changed."""
    return [site.name for site in result.sites]


def roles(gm: fx.GraphModule) -> dict[str, list[str]]:
    """Return by original layer the roles of the nodes in its place, in the order of the graph."""
    by_layer: dict[str, list[str]] = {}
    for node in gm.graph.nodes:
        if (p := provenance(node)) is not None:
            by_layer.setdefault(p.name, []).append(p.role)
    return by_layer
