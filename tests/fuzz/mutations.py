"""Random damage to JSON and to bytes."""

from __future__ import annotations

import copy
import random
from typing import Any

WORDS = [
    "", "a", "x", "first", "core", "last", "branch", "same", "valid", "zeros", "circular", "reflect", "replicate",
    "Identity", "Linear", "Conv1d", "Conv2d", "BatchNorm2d", "ReLU", "GELU", "constant", "\x1b[2J", "../x", "\ud800",
    "F32", "F64", "BF16", "I32", "U8", "F8_E4M3", "BOOL",
]  # fmt: skip
NUMBERS = [0, 1, 2, 3, -1, 7, 16, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, 1e-320, float("inf"), float("nan")]


def value(rng: random.Random, depth: int = 2) -> Any:
    """Return any JSON value, seldom a large one."""
    kind = rng.randrange(8 if depth else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice([rng.choice(WORDS), rng.choice([None, True, False])])
    count = rng.randrange(4)
    if kind == 5:
        return {rng.choice(WORDS): value(rng, depth - 1) for _ in range(count)}
    return [value(rng, depth - 1) for _ in range(count)]


def places(data: Any) -> list[tuple[Any, Any]]:
    """Return every place in a JSON value, as a container and a key of it."""
    found = []
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        found.append((data, key))
        found += places(data[key])
    return found


def edit(rng: random.Random, data: Any) -> None:
    """Change a JSON object at one place, more often a little than much."""
    options = places(data)
    if not options:
        return
    holder, key = rng.choice(options)
    old, other = holder[key], rng.choice(options)
    how = rng.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1:
        holder[key] = value(rng)
    elif how == 2:
        holder[key] = copy.deepcopy(other[0][other[1]])
    elif how == 3 and isinstance(holder, list):
        rng.shuffle(holder)
    elif how == 4 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(old))
    elif how == 5 and isinstance(holder, dict):
        siblings = list(holder)
        rng.shuffle(siblings)
        entries = [(new, holder[k]) for new, k in zip(siblings, list(holder), strict=True)]
        holder.clear()
        holder.update(entries)
    else:
        holder[key] = near(rng, old)


def near(rng: random.Random, old: Any) -> Any:
    """Return a value of the same kind."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return old + rng.choice([1, -1, 2, old, -old])
    if isinstance(old, float):
        return rng.choice([old * 2, -old, 0.0, old + 1])
    if isinstance(old, str):
        return rng.choice(WORDS) if rng.random() < 0.7 else old[:-1] + rng.choice("0123456789abcdef\n\x1b")
    return value(rng)


def damage(rng: random.Random, content: bytes) -> bytes:
    """Return bytes with flipped bits, or a piece cut out, doubled or replaced by noise."""
    changed = bytearray(content)
    how = rng.randrange(5)
    at, size = rng.randrange(len(changed) + 1), rng.choice([1, 2, 8, 64, 1000])
    if how == 0:
        return bytes(changed[:at])
    if how == 1:
        del changed[at : at + size]
    elif how == 2:
        changed[at:at] = changed[at : at + size] or b"\0"
    elif how == 3:
        changed[at : at + size] = rng.randbytes(size)
    else:
        for _ in range(rng.randrange(1, 4)):
            if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)
