"""Opening a model's attentions for capture: those of torch's own whose projections can be layers.

A copy of the model with open attentions (`fxlrd.layers.attention`) must do what the model does. Attentions for which it
does not, or that have what an open one would lose, stay as they are, each with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fxlrd.capturing.proof import Original
from fxlrd.errors import Reason
from fxlrd.graph.attentions import is_closed, open_for
from fxlrd.graph.copies import structural_copy
from fxlrd.graph.fast_paths import turn_off_around
from fxlrd.graph.guards import added, owners, shared_parameter
from fxlrd.layers.attention import MaskForm, ProjectedAttention

_OUT = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
ASKED = Reason(
    "asked-for", "the model does something else once its projections are layers: is its type or its weight asked for?"
)


def open_attentions(original: Original) -> None:
    """Open the attentions of ``original.model`` where that changes nothing; leave in ``closed`` why others are not."""
    names_of = owners(original.model)
    attentions = {name: m for name, m in original.model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    if not attentions:
        return
    closed = {name: m for name, m in attentions.items() if not isinstance(m, ProjectedAttention)}
    reasons = {name: reason for name, m in closed.items() if (reason := _why_not(name, m, names_of)) is not None}
    names = [name for name in closed if name not in reasons]
    masks: dict[str, set[MaskForm]] = {}
    asked = _asked_for(original, names, masks)
    original.closed = {**reasons, **dict.fromkeys(asked, ASKED)}
    original.model = _opened(original.model, [name for name in names if name not in asked])
    for name, forms in masks.items():
        attention = original.model.get_submodule(name)
        if isinstance(attention, ProjectedAttention):
            attention.traced_masks = next(iter(forms)) if len(forms) == 1 else None


def _why_not(name: str, attention: nn.MultiheadAttention, names_of: Mapping[int, Sequence[str]]) -> Reason | None:
    """Return why an attention must stay as it is, or None."""
    if not name:
        return Reason("bare-attention", "it is the model itself: put it into a module")
    if attention.bias_k is not None or attention.add_zero_attn:
        return Reason("added-keys", "it adds keys of its own (add_bias_kv, add_zero_attn)")
    if (reason := added(attention) or added(attention.out_proj)) is not None:
        return reason
    if not is_closed(attention):
        return Reason(
            "subclass", f"{type(attention).__name__} is a subclass of MultiheadAttention with its own behaviour"
        )
    if type(attention.out_proj) not in _OUT:
        return Reason("own-projection", f"its out_proj was replaced by a {type(attention.out_proj).__name__}")
    for key, parameter in attention.named_parameters():
        others = [other for other in names_of[id(parameter)] if not other.startswith(f"{name}.")]
        if others:
            return shared_parameter(key, others[0])
    return None


def _opened(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return a copy of the model with these attentions open."""
    copy = structural_copy(model)
    turn_off_around(copy, open_for(copy, [f"{name}.q_proj" for name in names]))
    return copy


def _asked_for(original: Original, names: Sequence[str], masks: dict[str, set[MaskForm]]) -> set[str]:
    """Return the attentions that cannot be open without the model doing something else.

    The forms of the masks that open ones get are added to ``masks``.
    """
    model = _opened(original.model, names)
    for name, module in model.named_modules():
        if isinstance(module, ProjectedAttention):
            module.register_forward_pre_hook(_noting(masks.setdefault(name, set())), with_kwargs=True)
    if original.difference(model) is None or not names:
        return set()
    half = len(names) // 2
    return _asked_for(original, names[:half], masks) | _asked_for(original, names[half:], masks) if half else set(names)


def _noting(forms: set[MaskForm]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        values = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        forms.add(MaskForm.of(values["query"], values.get("attn_mask"), values.get("key_padding_mask")))

    return hook
