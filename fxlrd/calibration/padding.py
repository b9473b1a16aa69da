"""Positions of sequences that only fill a batch up to one length: nothing is fitted to them, no error counts there.

Which they are is said by an argument named ``attention_mask`` (inputs × positions, 0 where there is no token), as
tokenizers give it. A sentence of 20 tokens in a batch of 64 would otherwise be fitted to 44 copies of the padding.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from fxlrd.graph.captured import captured_or_bare
from fxlrd.graph.inputs import Inputs

_MASK = "attention_mask"


def tokens_of(gm: fx.GraphModule, inputs: Inputs) -> Tensor | None:
    """Return which positions hold tokens (inputs × positions, bool); None where all do, or nothing tells.

    A decoder has positions of its own, which the mask of the encoder says nothing about.
    """
    given = dict(zip(captured_or_bare(gm).parameters(gm), inputs.args, strict=False)) | inputs.kwargs
    mask = given.get(_MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_meta:
        return None
    if any(name.startswith("decoder") and isinstance(value, Tensor) for name, value in given.items()):
        return None
    if not bool(((mask == 0) | (mask == 1)).all()) or bool(mask.all()) or not bool(mask.any()):
        return None
    return mask.bool()


def at_tokens(value: Tensor, tokens: Tensor | None) -> Tensor:
    """Return the rows (tokens × channels) of a tensor (inputs × positions × channels); another one as it is."""
    return value[tokens.to(value.device)] if tokens is not None and _has_positions(value, tokens) else value


def all_at_tokens(values: Sequence[Tensor], tokens: Tensor | None) -> list[Tensor]:
    """Return the rows of each tensor that has positions, and the others as they are."""
    return [at_tokens(value, tokens) for value in values]


def spread_out(rows: Tensor, like: Tensor, tokens: Tensor | None) -> Tensor:
    """Return a tensor of the shape of ``like`` with rows where tokens are, and zeros elsewhere: undoes `at_tokens`."""
    if tokens is None or not _has_positions(like, tokens):
        return rows
    return rows.new_zeros(like.shape).masked_scatter_(tokens.to(like.device)[..., None], rows)


def _has_positions(value: Tensor, tokens: Tensor) -> bool:
    return value.dim() == 3 and value.shape[:2] == tokens.shape
