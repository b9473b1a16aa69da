"""Damaged entries of the timing cache: each is ignored, or is an entry of sane numbers."""

from __future__ import annotations

import json
import math
import random
import warnings
from pathlib import Path

from fxlrd.timing.cache import Cache, Entry, Ratio, Setting
from tests.fuzz.mutations import damage, edit

SETTING = Setting("cpu: some", "2.0", 2, False)
ENTRY = Entry({"original": Ratio(1.0), "16": Ratio(0.5, 0.01), "8x8": Ratio(0.25)}, Ratio(0.25, 0.02), 5e-4)


def cache_case(scratch: Path, rng: random.Random) -> bool:
    """Damage an entry; return whether it is read. Whatever it was, a new one takes its place."""
    cache = Cache(scratch)
    cache.store(SETTING, "layer", ENTRY)
    (file,) = scratch.iterdir()
    if rng.random() < 0.3:
        file.write_bytes(damage(rng, file.read_bytes()))
    else:
        content = json.loads(file.read_text())
        for _ in range(rng.choice([1, 1, 2])):
            edit(rng, content)
        file.write_text(json.dumps(content))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        entry = cache.load(SETTING, "layer")
    assert all(str(w.message).isprintable() for w in warned), [str(w.message) for w in warned]
    if entry is not None:
        assert not warned
        ratios = [*entry.timings.values(), entry.reference]
        assert all(0 < r.ratio < math.inf and 0 <= r.spread < math.inf for r in ratios)
        assert 0 < entry.reference_seconds < math.inf
    cache.store(SETTING, "layer", ENTRY)
    assert cache.load(SETTING, "layer") == ENTRY
    return entry is not None
