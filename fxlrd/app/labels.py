"""Which output of a model stands for which class of the user's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fxlrd.app.examples import Class
from fxlrd.errors import FxlrdError

_WORDNET = re.compile(r"n\d{8}")


def labels_of(where: str, classes: Sequence[Class], count: int, names: Mapping[str, int]) -> tuple[list[int], str]:
    """Return the number of the output of each example's class, and in words how classes were told, if that is a guess.

    Classes with the names of the model's are those. Numbers are those of outputs. Otherwise, as in torchvision's
    ImageFolder, as many classes as there are outputs are taken in the order of their names.

    Args:
        where: where the examples are, for messages.
        classes: the class of each example.
        count: the number of the model's outputs.
        names: the outputs of the model's classes by name, as far as these are known; a class may have several.

    Raises:
        FxlrdError: for classes that are not the model's.
    """
    own = sorted(set(map(str, classes)))
    by_name = {_plain(name): number for name, number in names.items()}
    if all(_plain(name) in by_name for name in own):
        return [by_name[_plain(str(c))] for c in classes], ""
    if all(isinstance(c, int) for c in classes):
        numbers = [int(c) for c in classes]
        if min(numbers) >= 0 and max(numbers) < count:
            return numbers, ""
        raise FxlrdError(f"{where}: there is a label {max(numbers)}, and the model has {count} outputs, from 0")
    if len(own) == count:
        order = {name: number for number, name in enumerate(own)}
        named = ", ".join(f"{name} is output {number}" for name, number in list(order.items())[:3])
        return [order[str(c)] for c in classes], f"{where}: classes in the order of their names: {named}"[:200]
    if all(name.isdigit() and int(name) < count for name in own):
        return [int(c) for c in classes], ""
    some = ", ".join(own[:3]) + (", …" if len(own) > 3 else "")
    known = f"by its classes ({', '.join(list(names)[:3])}, …)" if names else "by their numbers"
    raise FxlrdError(
        f"{where}: {len(own)} of the model's {count} classes may be meant by {some}: name them {known}, "
        "or give a model of as many classes"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()
