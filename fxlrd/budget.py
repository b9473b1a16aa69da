"""What a compressed model may cost, and the best way of spending that.

One form is to be chosen for each of a number of layers, each with a cost and an error, so that the sum of errors is
least and the sum of costs within a budget: the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger
2004, ch. 11). Dynamic programming over the budget in small steps solves it, whatever the shape of the trade-offs.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, fields

from fxlrd.errors import FxlrdError, unknown


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost, as a fraction of the original: one of parameters, FLOPs, or latency
    measured on this device. Raises FxlrdError unless exactly one is given and lies between 0 and 1.
    """

    params: float | None = None
    flops: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "nothing"
            raise FxlrdError(f"budget: give one of params, flops or latency, such as Budget(latency=0.5); got {found}")
        if not is_share(self.share):
            raise FxlrdError(
                f"budget: {self.measure}={self.share!r} is no fraction of the original between 0 and 1, such as 0.5"
            )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read the text form, such as latency=0.5."""
        measure, _, share = str(text).partition("=")
        known = [f.name for f in fields(cls)]
        if measure not in known:
            raise unknown("budget", measure, known)
        try:
            return cls(**{measure: float(share)})
        except ValueError as error:
            said = str(error) if isinstance(error, FxlrdError) else f"{share!r} is no number"
            raise FxlrdError(f"budget {text}: {said.removeprefix('budget: ')}") from error

    @property
    def measure(self) -> str:
        """What is limited: params, flops or latency."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def share(self) -> float:
        """The fraction of the original that it is limited to."""
        found: float = getattr(self, self.measure)
        return found


def is_share(value: object) -> bool:
    """Whether the value is a number between 0 and 1, both excluded."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < float(value) < 1
