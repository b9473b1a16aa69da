"""Multi-head attention with projections that are layers of their own.

nn.MultiheadAttention hands its weights to one function, packed. Its four projections are linear layers all the same:

    Q, K, V = q_proj(query), k_proj(key), v_proj(value)
    output  = out_proj(softmax(Q·Kᵀ/√d + mask)·V)          for each head of d channels

A `ProjectedAttention` calls them as such, so that factors can take their place, and is called as the original is. Its
forward names no sizes: a trace of it holds stock layers and functions of torch, for any batch and any length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxlrd.layers.stand_ins import linear_around

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The names of the linear layers in a `ProjectedAttention`."""
_OWN = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class MaskForm:
    """What the masks of a call are, but for their values.

    Attributes:
        batched: whether the inputs have a batch.
        mask_dims: the number of dimensions of the attention mask; None without one.
        bool_mask: whether the attention mask is of bools; None without one.
        bool_padding: whether the mask of padded keys is; None without one.
    """

    batched: bool
    mask_dims: int | None
    bool_mask: bool | None
    bool_padding: bool | None

    @classmethod
    def of(cls, query: Tensor, mask: Tensor | None, padding: Tensor | None) -> MaskForm:
        """Return the form of the masks of a call."""
        bools = [None if m is None else not m.is_floating_point() for m in (mask, padding)]
        return cls(query.dim() == 3, None if mask is None else mask.dim(), *bools)


class ProjectedAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention that calls its projections: ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    It has the attributes of the original, but ``in_proj_weight`` and the like are None.

    Attributes:
        biased: whether the original has biases.
        traced_masks: the form of the masks in a trace, where that cannot be asked of them.

    >>> attention, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    >>> same = ProjectedAttention.around(attention)
    >>> torch.allclose(same(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
    True
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module  # type: ignore[assignment]
    biased: bool
    traced_masks: MaskForm | None = None

    @classmethod
    def around(cls, attention: nn.MultiheadAttention) -> ProjectedAttention:
        """Return one that holds the very parameters of a stock attention, those that are packed as views."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        vars(new).update({name: value for name, value in vars(attention).items() if name not in _OWN})
        vars(new)["_parameters"] = dict.fromkeys(attention._parameters)
        for name, (weight, bias) in zip(PROJECTIONS, _projections(attention), strict=True):
            setattr(new, name, linear_around(weight, bias, training=attention.training))
        new.biased = attention.in_proj_bias is not None
        return new

    def closed(self) -> nn.MultiheadAttention:
        """Return a stock attention of the same options without values, on the meta device."""
        options = {"bias": self.biased, "kdim": self.kdim, "vdim": self.vdim, "batch_first": self.batch_first}
        return nn.MultiheadAttention(self.embed_dim, self.num_heads, self.dropout, **options, device="meta")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what nn.MultiheadAttention does: the output and, with ``need_weights``, the attention weights."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        q, k, v = (self._heads(x) for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(query, attn_mask, key_padding_mask)
        weights = None
        if need_weights:
            weights = self._weights(q, k, mask)
            output = weights @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            p = self.dropout * self.training if self.dropout else 0.0
            output = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
        output = output.transpose(-3, -2).flatten(-2)
        return self.out_proj(self._swapped(output)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """Return a projection as (batch, head, position, channel); an input without a batch has none."""
        return self._swapped(x).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def _swapped(self, x: Tensor) -> Tensor:
        """Return x with batch and positions swapped, where positions are first. Without a batch it stays as it is."""
        return x if self.batch_first else x.transpose(0, -2)

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        return F.dropout(weights, self.dropout, self.training) if self.dropout else weights

    def _mask(self, query: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Return the masks as one to add to the scores."""
        if mask is None and padding is None:
            return None
        form = MaskForm.of(query, mask, padding) if isinstance(query, Tensor) else self._traced_form(mask, padding)
        parts = []
        if mask is not None:
            mask = _added(mask, bool(form.bool_mask), query)
            by_head = form.batched and form.mask_dims == 3
            parts.append(mask.unflatten(0, (-1, self.num_heads)) if by_head else mask)
        if padding is not None:
            parts.append(_added(padding, bool(form.bool_padding), query)[..., None, None, :])
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _traced_form(self, mask: Any, padding: Any) -> MaskForm:
        """Return the form of the masks of a call that is traced, with checks in the trace that they have this form."""
        form = self.traced_masks
        if form is None or (mask is None, padding is None) != (form.bool_mask is None, form.bool_padding is None):
            raise RuntimeError("the masks of an attention differ in form between calls")
        if mask is not None:
            torch._assert(mask.dim() == form.mask_dims, "a mask of other dimensions than in the example")
        for each, is_bool in ((mask, form.bool_mask), (padding, form.bool_padding)):
            if each is not None:
                torch._assert(each.is_floating_point() != is_bool, "a mask of another dtype than in the example")
        return form


def _projections(attention: nn.MultiheadAttention) -> Iterator[tuple[nn.Parameter, nn.Parameter | None]]:
    """Yield weight and bias of each of `PROJECTIONS`."""
    weights: list[nn.Parameter] = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    if attention.in_proj_weight is not None:
        weights = _parts(attention.in_proj_weight)
    biases: list[Any] = [None] * 3 if attention.in_proj_bias is None else _parts(attention.in_proj_bias)
    yield from zip(weights, biases, strict=True)
    out: nn.Linear = attention.out_proj
    assert isinstance(out.weight, nn.Parameter)
    yield out.weight, out.bias


def _parts(packed: nn.Parameter) -> list[nn.Parameter]:
    return [nn.Parameter(part, packed.requires_grad) for part in packed.detach().chunk(3)]


def _added(mask: Tensor, is_bool: bool, query: Tensor) -> Tensor:
    """Return a mask as numbers to add to scores: -inf where one of bools is true."""
    return torch.where(mask, float("-inf"), 0.0).type_as(query) if is_bool else mask
