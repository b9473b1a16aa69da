"""A sample of what weights hold: it tells of writes that raise no version counter.

torch counts the writes of in-place operations. It does not count those of a fused optimizer, those through ``p.data``
(``p.data.copy_``, or ``p.data += d``, as LoRA merges do), ``untyped_storage().copy_``, NumPy or another process. So a
few entries of each weight are compared with what they were when factors were computed, bit by bit.

Entries are taken at regular distances along the rows (output channels). Their columns follow the golden ratio: n
entries of a row-by-column matrix then meet every row from n ≥ rows on, and every column from n ≥ 2·columns on. All
weights of a graph share ``ENTRIES`` in a call, with at least ``FEWEST`` for each, and weights of no more entries than
their share are compared completely. On the CPU, ``TURNS`` calls in a row compare other entries of the rest: what a call
costs is that none of them is in a cache.

What is not caught: a write that torch does not count and that changes none of a weight's entries in the sample, so a
part of a large weight. It is caught in a later call if it changes one that has its turn then.

On the CPU, one gather reads the entries of all weights by their addresses. An address is read only after the
fingerprint of the weights has proven that their memory is still where it was (fxlrd/backend/factor_sets.py). On other
devices one strided view of each weight is taken, and the comparison waits for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

ENTRIES = 768
"""About so many entries are compared in a call. For ResNet-152's 156 layers that takes 75 to 100 µs after a forward,
on a busy machine, since nothing is in a cache, and 3 µs when it is, beside a fingerprint of 25 µs."""
FEWEST = 4
"""Smallest number of entries of one weight."""
TURNS = 4
"""Samples that take turns."""

_GOLDEN = (math.sqrt(5) - 1) / 2
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Contents:
    """Sampled entries of ``weights``, as they are now."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        count = max(FEWEST, ENTRIES // max(len(weights), 1))
        on_cpu = [w for w in weights if _on_cpu(w) and _has_memory(w)]
        self.memories = itertools.cycle([_Memory.of(on_cpu, count, turn) for turn in range(TURNS)])
        self.elsewhere = [i for i, w in enumerate(weights) if not _on_cpu(w) and _has_memory(w)]
        self.count = count
        self.before = _strided([weights[i] for i in self.elsewhere], count)

    def same(self, weights: Sequence[Tensor]) -> bool:
        """Whether the entries are what they were. ``weights`` must have the fingerprint of those at the beginning."""
        if (memory := next(self.memories)) is not None and not memory.same():
            return False
        if not self.elsewhere or _capturing():
            return True
        now = _strided([weights[i] for i in self.elsewhere], self.count)
        return all(map(torch.equal, now, self.before))


class _Memory(NamedTuple):
    """Words at addresses of this process, and their bytes as they were."""

    words: NDArray[Any]
    positions: NDArray[numpy.int64]
    before: bytes

    @classmethod
    def of(cls, weights: Sequence[Tensor], count: int, turn: int) -> _Memory | None:
        """Return the sample of ``weights`` for a turn, in the largest words that fit all; None for no weights."""
        weights = [w for w in weights if w.numel()]
        if not weights:
            return None
        size = math.gcd(8, *(w.element_size() for w in weights), *(w.data_ptr() for w in weights))
        addresses = numpy.concatenate([_addresses(w, count, turn, size) for w in weights])
        base = int(addresses.min())
        words = numpy.asarray(_Span(base, int(addresses.max() - base) // size + 1, size))
        positions = (addresses - base) // size
        return cls(words, positions, words.take(positions).tobytes())

    def same(self) -> bool:
        """Whether the words are what they were."""
        return self.words.take(self.positions).tobytes() == self.before


class _Span:
    """Memory from an address on, for NumPy: ``length`` words of ``size`` bytes, not all of which may be read."""

    def __init__(self, address: int, length: int, size: int) -> None:
        self.__array_interface__ = {
            "data": (address, True),
            "shape": (length,),
            "typestr": numpy.dtype(f"u{size}").str,
            "version": 3,
        }


def _addresses(weight: Tensor, count: int, turn: int, size: int) -> NDArray[numpy.int64]:
    """Return the addresses of the words of ``count`` entries, or of all."""
    indices = numpy.unravel_index(_sample(tuple(weight.shape), count, turn), tuple(weight.shape) or (1,))
    strides = weight.stride() or (1,)
    offsets = sum(index * stride for index, stride in zip(indices, strides, strict=True))
    bytes_ = numpy.asarray(offsets, dtype=numpy.int64) * weight.element_size()
    words = numpy.arange(0, weight.element_size(), size)
    return (weight.data_ptr() + bytes_[:, None] + words).ravel()


def _sample(shape: tuple[int, ...], count: int, turn: int) -> NDArray[numpy.int64]:
    """Return the flat indices of ``count`` entries of a tensor, or of all if it has no more (module docstring).

    Those of all turns together are as evenly spread as those of one.
    """
    total = math.prod(shape)
    if total <= count:
        return numpy.arange(total)
    rows = shape[0] if len(shape) > 1 else 1
    columns = total // rows
    steps = numpy.arange(count * TURNS)
    chosen = steps * rows // len(steps) * columns + (steps * _GOLDEN % 1 * columns).astype(numpy.int64)
    chosen[-1] = total - 1  # the first is 0
    return chosen[turn::TURNS]


def _strided(weights: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return entries of ``weights`` at equal distances, for each device and dtype in one tensor of integers."""
    groups: dict[Any, list[Tensor]] = {}
    with torch.no_grad():
        for w in weights:
            extent = 1 + sum((n - 1) * s for n, s in zip(w.shape, w.stride(), strict=True)) if w.numel() else 0
            step = max(1, extent // count) | 1  # an odd step meets every column of a width of a power of two
            view = w.detach().as_strided((-(-extent // step),), (step,))
            groups.setdefault((w.device, w.dtype), []).append(view)
        return [torch.cat(views).view(_INTEGERS[views[0].element_size()]) for views in groups.values()]


def _on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu"


def _has_memory(weight: Tensor) -> bool:
    """Whether entries can be read at their places: not those of sparse, quantized or wrapped tensors."""
    plain = weight.layout == torch.strided and not weight.is_quantized and not weight.is_meta
    return plain and type(weight) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, during which nothing may wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
