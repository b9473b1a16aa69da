"""What a compressed model may cost, as a fraction of what the original costs."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, fields

from fxlrd.errors import FxlrdError, unknown


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost: one of parameters, FLOPs, or latency measured on this device.

    ``layers`` counts the parameters of the convs and linears that may be cut, and nothing else: of a transformer those
    of the linear layers in its blocks, without embeddings, a head that is tied to them, norms and layers to skip.

    >>> import fxlrd
    >>> half = fxlrd.Budget(latency=0.5)  # half the time of the original
    >>> half.measure, half.share
    ('latency', 0.5)
    >>> half == fxlrd.Budget.parse("latency=0.5")
    True

    Each is a fraction of the original's, between 0 and 1. Raises FxlrdError unless exactly one is given.
    """

    params: float | None = None
    flops: float | None = None
    latency: float | None = None
    layers: float | None = None

    def __post_init__(self) -> None:
        limits = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(limits) != 1:
            got = " and ".join(limits) or "nothing"
            raise FxlrdError(
                f"budget: give one of params, flops, latency or layers, such as Budget(latency=0.5); got {got}"
            )
        if not is_share(self.share):
            raise FxlrdError(
                f"budget: {self.measure}={self.share!r} is not a fraction of the original between 0 and 1, such as 0.5"
            )

    def __str__(self) -> str:
        """Return the text form, such as latency=0.5."""
        return f"{self.measure}={self.share:g}"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read the text form, such as latency=0.5."""
        measure, _, share = str(text).partition("=")
        measures = [f.name for f in fields(cls)]
        if measure not in measures:
            raise unknown("budget", measure, measures)
        try:
            return cls(**{measure: float(share)})
        except ValueError as error:
            cause = str(error) if isinstance(error, FxlrdError) else f"{share!r} is not a number"
            raise FxlrdError(f"budget {text}: {cause.removeprefix('budget: ')}") from error

    @property
    def measure(self) -> str:
        """What is limited: params, flops, latency or layers."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def share(self) -> float:
        """The fraction of the original that it is limited to."""
        share: float = getattr(self, self.measure)
        return share


def is_share(value: object) -> bool:
    """Whether the value is a number between 0 and 1, both excluded."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < float(value) < 1
