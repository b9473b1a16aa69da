"""What a report advises where a result is not what its user hoped for."""

from __future__ import annotations

from fxlrd.timing.clock import Timing


def advice(timing: Timing | None) -> list[str]:
    """Return a sentence for a model that is not faster.

    ``timing`` is that of the compressed model relative to the original; None if it was not timed or not changed.
    """
    if timing is None or timing.faster():
        return []
    return [
        f"not faster than the original here: {1 / timing.ratio:.2f}× its speed; "
        "try a larger ratio, the ranks preset, or another batch size"
    ]
