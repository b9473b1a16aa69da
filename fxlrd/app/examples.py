"""Examples of the user's: inputs, and their classes where these are known, read in batches when they are needed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxlrd.errors import FxlrdError

_HELD_OUT = 5
"""One example of so many is held out, to measure the result on."""
_FEWEST = 10
"""Of fewer examples none is held out."""

Class = str | int
"""The name of a class, or its number among the model's outputs."""


@dataclass(frozen=True)
class Examples:
    """Examples in a folder or a file.

    Attributes:
        where: the folder or the file, as the user wrote it.
        noun: what they are: images, texts or sequences.
        read: returns the model's inputs for some of the examples, by number, and the numbers of those in them:
            without those that cannot be read.
        numbers: those of the examples, in order.
        classes: the class of each, by number; empty where they are not known.
        labels: the same as numbers of the model's outputs.
    """

    where: str
    noun: str
    read: Callable[[Sequence[int]], tuple[Any, Sequence[int]]]
    numbers: tuple[int, ...]
    classes: Sequence[Class] = ()
    labels: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def shuffled(self) -> Examples:
        """Return them in another order, always the same."""
        numbers = list(self.numbers)
        random.Random(0).shuffle(numbers)
        return replace(self, numbers=tuple(numbers))

    def first(self, count: int) -> Examples:
        """Return the first ones, at most ``count``."""
        return replace(self, numbers=self.numbers[:count])

    def spread(self, count: int) -> Examples:
        """Return at most ``count`` of them, at equal distances."""
        step = max(1.0, len(self) / count)
        return replace(self, numbers=tuple(self.numbers[int(i * step)] for i in range(min(count, len(self)))))

    def split(self) -> tuple[Examples, Examples]:
        """Return the first four fifths and the rest, which is empty if there are only a few."""
        count = len(self) // _HELD_OUT if len(self) >= _FEWEST else 0
        end = len(self) - count
        return self.first(end), replace(self, numbers=self.numbers[end:])

    def batches(self, size: int) -> Batches:
        """Return the inputs and labels of ``size`` examples at a time."""
        return Batches(self, size)

    def batch(self, numbers: Sequence[int]) -> tuple[Any, Tensor]:
        """Return the inputs of these examples, or None if none can be read, and their labels where there are any."""
        inputs, numbers = self.read(numbers)
        labels = [self.labels[number] for number in numbers] if self.labels else []
        return (inputs if len(numbers) else None), torch.tensor(labels, dtype=torch.long)


class Batches:
    """Batches of examples in their order; reading them raises FxlrdError if no example can be read."""

    def __init__(self, examples: Examples, size: int) -> None:
        self.examples = examples
        self.size = size

    def __len__(self) -> int:
        return -(-len(self.examples) // self.size)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        readable = False
        for start in range(0, len(self.examples), self.size):
            batch, labels = self.examples.batch(self.examples.numbers[start : start + self.size])
            if batch is not None:
                readable = True
                yield batch, labels
        if not readable:
            raise FxlrdError(
                f"{self.examples.where}: none of the {len(self.examples)} {self.examples.noun} can be read"
            )


class Shuffled:
    """Batches of examples in a new order each time, for training; the incomplete last one is left out."""

    def __init__(self, examples: Examples, size: int) -> None:
        self.examples = examples
        self.size = min(size, len(examples))

    def __len__(self) -> int:
        return len(self.examples) // self.size if self.size else 0

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        order = [self.examples.numbers[i] for i in torch.randperm(len(self.examples)).tolist()]
        for start in range(0, len(self) * self.size, self.size):
            batch, labels = self.examples.batch(order[start : start + self.size])
            if batch is not None:
                yield batch, labels
