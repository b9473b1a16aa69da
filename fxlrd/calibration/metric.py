"""How far apart two outputs of a model are, in the unit in which all errors of its layers are predicted and measured.

For an output tensor z and a changed one z + δ the error is relative, with a metric M that may depend on z:

    error² = Σ δᵀ·M·δ / Σ zᵀ·M·z   over the positions of a batch

Of most outputs, M = I. Of logits, of which softmax makes probabilities p, it is the metric of those (Fisher's):

    M = diag(p) − p·pᵀ,   δᵀ·M·δ = Var_p(δ) ≈ 2·KL(p ‖ p')

A change of the logits that changes no probability is no error by it, and what is unlikely counts little. In
SmolLM2-135M ‖z‖² is 700,000 times Var_p(z): nearly all of z is an offset, the same for all words. Fitted to 32,768
tokens, its perplexity rises, at 0.9, 0.8 and 0.6 of the parameters of its blocks' linear layers, by

    M = I             4.7 %   17.8 %   55.5 %
    M of the softmax  3.1 %   11.0 %   44.1 %

The network on Fashion-MNIST that ships with fxlrd, at a third of its parameters, loses 0.15 and 0.01 points.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxlrd.factor.basis import working
from fxlrd.graph.facts import Fact
from fxlrd.graph.inputs import tensors

logits_among: Fact[tuple[bool, ...]] = Fact("logits_among", tuple)
"""Which of the model's output tensors are logits: on a graph that was calibrated."""

_ENTRIES = 2**19
"""About so many numbers are worked on at a time: what is made of them then stays in a cache, and on the heap."""


def logits_of(value: Any, softmax: bool | None = None, rows: Tensor | None = None) -> tuple[bool, ...]:
    """Return which tensors of a model's output are logits, in the order of `tensors`.

    All are or none is as ``softmax`` says; where that is None, those are that the output names so, or a single matrix
    that tells the inputs apart as a classifier does (`tells_apart`): by ``rows``, where there are more than its own.

    >>> logits_of({"logits": torch.zeros(2, 3), "states": torch.zeros(2, 8)})
    (True, False)
    """
    found = tensors(value)
    if softmax is None:
        named = set(_named_logits(value, False))
        are = [id(t) in named or (len(found) == 1 and tells_apart(t if rows is None else rows)) for t in found]
    else:
        are = [softmax] * len(found)
    return tuple(each and t.is_floating_point() and _classes(t) > 1 for each, t in zip(are, found, strict=True))


def tells_apart(output: Tensor) -> bool:
    """Whether the rows of a matrix (inputs × classes) are those of a trained classifier.

    Softmax of them says much about which row it is: the mutual information H(mean p) − mean H(p) is at least half of
    what so many rows and classes can have. Embeddings have hardly any: with them, p is flat, or has its peak at the
    same entries for all inputs.

    >>> tells_apart(4 * torch.eye(8)), tells_apart(torch.eye(8)), tells_apart(torch.tensor([[9.0, 0.0]] * 8))
    (True, False, False)
    """
    if output.dim() != 2 or not output.is_floating_point() or min(output.shape) < 2:
        return False
    p = working(output).softmax(1)
    information = torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()
    return float(information) >= 0.5 * math.log(min(p.shape))


def _named_logits(value: Any, named: bool) -> Iterator[int]:
    """Yield the identities of the tensors under a name that ends in ``logits``."""
    if isinstance(value, Tensor):
        yield from [id(value)] if named else []
    elif isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        parts = value if isinstance(value, Mapping) else vars(value)
        for name, part in parts.items():
            yield from _named_logits(part, named or str(name).endswith("logits"))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _named_logits(part, named)


def _axis(logits: Tensor) -> int:
    """Return the axis of the classes: the second of maps (N, classes, height, width), else the last."""
    return 1 if logits.dim() == 4 else -1


def _classes(logits: Tensor) -> int:
    return logits.shape[_axis(logits)] if logits.dim() else 1


def drawn(output: Tensor, logits: bool, generator: torch.Generator) -> Tensor:
    """Return v, of the shape of ``output``, with E[v·vᵀ] = M / Σ zᵀ·M·z: to start a backward pass with.

    From random signs s it is s itself, or √p∘s − p·(√pᵀ·s). In float64 or float32: float16 does not hold it.
    """
    z = output.detach()
    if logits and (size := _spread(z)) > 0:
        parts = [_turned(rows, generator) / math.sqrt(size) for rows in _rows(z)]
        return torch.cat(parts).view(z.movedim(_axis(z), -1).shape).movedim(-1, _axis(z))
    return _signs(working(z), generator) / max(float(z.double().norm()), 1e-30)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8).to(like) * 2 - 1


def _turned(z: Tensor, generator: torch.Generator) -> Tensor:
    p = z.softmax(-1)
    turned = p.sqrt() * _signs(z, generator)
    return turned - p * turned.sum(-1, keepdim=True)


def _rows(z: Tensor) -> Iterator[Tensor]:
    """Yield the rows of logits, classes last, some at a time: those of a language model are large."""
    rows = z.movedim(_axis(z), -1).reshape(-1, _classes(z))
    for part in rows.split(max(1, _ENTRIES // rows.shape[-1])):
        yield working(part)


def _spread(z: Tensor) -> float:
    """Return Σ Var_p(z)."""
    return sum(float(_variance(rows).sum()) for rows in _rows(z))


def _variance(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    z = torch.where(p > 0, z, 0)  # what is ruled out is -inf
    return (p * (z - (p * z).sum(-1, keepdim=True)).square()).sum(-1)


def squared_error(changed: Sequence[Tensor], original: Sequence[Tensor], logits: Sequence[bool] = ()) -> float:
    """Return error² summed over the output tensors of floating-point numbers; infinite values do not count.

    Of ``logits`` it is 2·KL(p ‖ p') / Σ Var_p(z). It is infinite where there are other tensors, as where a detector
    finds other boxes.
    """
    if [t.shape for t in changed] != [t.shape for t in original]:
        return math.inf
    named = [*logits] if len(logits) == len(original) else [False] * len(original)
    triples = zip(changed, original, named, strict=True)
    return sum(
        _divergence(a.detach(), b.detach()) if each else _relative(a.detach(), b.detach())
        for a, b, each in triples
        if b.is_floating_point()
    )


def _divergence(a: Tensor, b: Tensor) -> float:
    """Return 2·KL(p ‖ p') / Σ Var_p(z) of logits ``b`` and changed ones ``a``."""
    size = _spread(b)
    if not size > 0:
        return _relative(a, b)
    apart = 0.0
    for changed, original in zip(_rows(a), _rows(b), strict=True):
        p, q = original.log_softmax(-1), changed.log_softmax(-1)
        apart += float(torch.where(p.isfinite(), p.exp() * (p - q), 0).sum())
    return max(0.0, 2 * apart / size) if math.isfinite(apart) else math.inf


def _relative(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖² / ‖b‖²: in the precision of the tensors, unless their squares are beyond it."""
    norm = torch.linalg.vector_norm
    size, gap = norm(working(b)).item() ** 2, norm(working(a) - working(b)).item() ** 2
    if not math.isfinite(size + gap):
        a, b = a.double(), b.double()
        size = norm(torch.where(b.isfinite(), b, 0.0)).item() ** 2
        gap = norm(torch.where(b.isfinite(), a - b, 0.0)).item() ** 2
    if math.isnan(gap):
        return math.inf
    return gap / size if size else 0.0
