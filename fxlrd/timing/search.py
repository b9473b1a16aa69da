"""The search for ranks at which the device is fast. Time is a staircase in the rank: kernels work in vectors and tiles.

`grid` and `best_share`, which `snap` and `merge` use: candidates are the rank R itself and the largest multiples of 16
(of 8, where that is under the floor) and of 64 up to it. Choose the candidate r with the largest gain

    t(R)·(cost(r)/cost(R))^trade − t(r)

if that exceeds the noise of the measurement; otherwise keep R. With trade=1 a rank is lowered only where time falls by
more than the cost does, in proportion; ½ allows for the directions that go being those that matter least.

`scan` and `largest_drop`: the paper's Algorithm 1 times every r and chooses the one below the largest drop of t between
r+1 and r. (Its argmax names the rank *above* the drop; compare its Table 2.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from fxlrd.layers.forms import Ranks, ranks_text
from fxlrd.timing.clock import Timing


def reaches(ranks: Ranks, lowest: Ranks) -> bool:
    """Whether no rank is below its floor."""
    return all(a is None or b is None or a >= b for a, b in zip(ranks, lowest, strict=True))


def grid(ranks: Ranks, lowest: Ranks, groups: int) -> list[Ranks]:
    """Return the present ranks and the hardware multiples below them, descending."""
    sixteen, eight, sixty_four = (_rounded(ranks, m, groups) for m in (16, 8, 64))
    candidates = [ranks, sixteen if reaches(sixteen, lowest) else eight, sixty_four]
    return list(dict.fromkeys(r for r in candidates if reaches(r, lowest)))


def _rounded(ranks: Ranks, multiple: int, groups: int) -> Ranks:
    """Return the ranks rounded down so that groups·rank is a multiple."""
    unit = multiple // math.gcd(multiple, groups)
    return tuple(None if r is None else r // unit * unit for r in ranks)


def best_share(
    candidates: Sequence[Ranks], timings: Mapping[str, Timing], cost: Callable[[Ranks], float], trade: float
) -> Ranks:
    """Return the candidate with the largest gain (module docstring); the first is R."""
    top = candidates[0]
    full = timings[ranks_text(top)]

    def gain(ranks: Ranks) -> float:
        timing = timings[ranks_text(ranks)]
        share = (cost(ranks) / cost(top)) ** trade
        gained = share * full.ratio - timing.ratio
        return gained if gained > math.hypot(timing.spread, full.spread * share) else 0.0

    return max(candidates, key=gain)  # the first, highest rank where no candidate gains


def scan(ranks: Ranks, lowest: Ranks) -> list[Ranks]:
    """Return every rank from the present one down to the lowest, the second mode in proportion to the first."""
    top = next(r for r in ranks if r is not None)
    return [scaled for r in range(top, 0, -1) if reaches(scaled := _scaled(ranks, r / top), lowest)]


def _scaled(ranks: Ranks, share: float) -> Ranks:
    return tuple(None if r is None else max(1, round(r * share)) for r in ranks)


def largest_drop(candidates: Sequence[Ranks], timings: Mapping[str, Timing]) -> Ranks:
    """Return the candidate below the largest drop of time that exceeds the noise, or the first; they descend."""
    best, largest = candidates[0], 0.0
    for above, below in pairwise(candidates):
        high, low = timings[ranks_text(above)], timings[ranks_text(below)]
        if low.faster(high) and high.ratio - low.ratio > largest:
            best, largest = below, high.ratio - low.ratio
    return best
