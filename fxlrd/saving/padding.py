"""Paddings before layers, as a plan has them and as a graph does."""

from __future__ import annotations

from fxlrd.layers.padding import FixedPadding, Padding, SamePadding
from fxlrd.saving.schema import FixedPads, SamePads


def pads_of(padding: Padding) -> FixedPads | SamePads:
    """Return what a plan says of a padding."""
    return FixedPads(**vars(padding)) if isinstance(padding, FixedPadding) else SamePads(**vars(padding))


def padding_of(pads: FixedPads | SamePads) -> Padding:
    """Return the padding that a plan describes."""
    return FixedPadding(**vars(pads)) if isinstance(pads, FixedPads) else SamePadding(**vars(pads))
