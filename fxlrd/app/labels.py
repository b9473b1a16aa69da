"""Which output of a model stands for which class of the user's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fxlrd.app.examples import Class
from fxlrd.errors import FxlrdError

_WORDNET = re.compile(r"n\d{8}")


def labels_of(where: str, classes: Sequence[Class], count: int, names: Mapping[str, int]) -> tuple[list[int], str]:
    """Return the number of the output of each example's class, and in words how classes were told, if that is a guess.

    Classes with the names of the model's are those. Numbers are those of outputs, in names of folders too. Otherwise,
    as in torchvision's ImageFolder, as many classes as there are outputs are taken in the order of their names.

    Args:
        where: where the examples are, for messages.
        classes: the class of each example.
        count: the number of the model's outputs.
        names: the outputs of the model's classes by name, as far as these are known; a class may have several.

    Raises:
        FxlrdError: for classes that are not the model's.
    """
    own = sorted(set(map(str, classes)))
    numbers = _by_name(own, names)
    if numbers is not None:
        return [numbers[str(c)] for c in classes], ""
    if all(isinstance(c, int) for c in classes):
        if odd := [int(c) for c in classes if not 0 <= int(c) < count]:
            raise FxlrdError(f"{where}: there is a label {odd[0]}, and the model has {count} outputs, from 0")
        return [int(c) for c in classes], ""
    if _are_outputs(own, count):
        in_doubt = len(own) == count and own != sorted(own, key=int)
        note = f"{where}: classes are the outputs of their numbers, not in the order of text (0, 1, 10, …)"
        return [int(c) for c in classes], note if in_doubt else ""
    if len(own) == count:
        order = {name: number for number, name in enumerate(own)}
        named = ", ".join(f"{name} is output {number}" for name, number in list(order.items())[:3])
        return [order[str(c)] for c in classes], f"{where}: classes in the order of their names: {named}"[:200]
    some = ", ".join(own[:3]) + (", …" if len(own) > 3 else "")
    known = f"by its classes ({', '.join(list(names)[:3])}, …)" if names else "by their numbers"
    raise FxlrdError(
        f"{where}: {len(own)} of the model's {count} classes may be meant by {some}: name them {known}, "
        "or give a model of as many classes"
    )


def _by_name(own: Sequence[str], names: Mapping[str, int]) -> dict[str, int] | None:
    """Return the outputs of the user's classes, or None where one has the name of none.

    Names are compared as they are, then without case and kinds of spaces, then by their letters and digits alone: each
    as far as that tells the model's classes, and at last the user's, apart.
    """
    for form in (str, _folded, _plain):
        known: dict[str, set[int]] = {}
        for name, number in names.items():
            known.setdefault(form(name), set()).add(number)
        found = [known.get(form(name), set()) if form(name) else set() for name in own]
        apart = form is not _plain or len(set(map(_plain, own))) == len(set(map(_folded, own)))
        if apart and all(len(numbers) == 1 for numbers in found):
            return {name: next(iter(numbers)) for name, numbers in zip(own, found, strict=True)}
    return None


def _are_outputs(own: Sequence[str], count: int) -> bool:
    """Whether classes are the numbers of outputs, each of another one."""
    numbers = {int(name) for name in own if name.isdecimal()}
    return len(numbers) == len(own) and max(numbers) < count


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()
