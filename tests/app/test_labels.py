"""Classes of the user's as outputs of a model."""

from __future__ import annotations

import pytest

from fxlrd import FxlrdError
from fxlrd.app.labels import labels_of

NAMES = {"NEGATIVE": 0, "POSITIVE": 1, "very_good": 2}


@pytest.mark.parametrize(
    ("classes", "count", "names", "labels"),
    [
        (["positive", "Very Good", "negative"], 3, NAMES, [1, 2, 0]),
        ([2, 0], 3, NAMES, [2, 0]),
        (["dog", "cat", "dog"], 2, {}, [1, 0, 1]),
        (["2", "0", "2"], 3, {}, [2, 0, 2]),
        (["2", "10", "2"], 2, {}, [1, 0, 1]),  # as torchvision's ImageFolder: in the order of the names
        (["dog", "cat"], 2, {"LABEL_0": 0, "LABEL_1": 1}, [1, 0]),
        (["C", "C++", "C#"], 3, {"C": 0, "C++": 1, "C#": 2}, [0, 1, 2]),
        (["-1", 0, 1], 3, {"-1": 0, "0": 1, "1": 2}, [0, 1, 2]),
        (["👍", "👎"], 2, {"👎": 0, "👍": 1}, [1, 0]),
        (["c-sharp", "c"], 2, {"C": 0, "C sharp": 1}, [1, 0]),
        (["c", "d"], 3, {"C": 1, "C#": 0, "D": 2}, [1, 2]),
        ([str(i) for i in range(12)], 12, {}, list(range(12))),  # and not 0, 1, 10, …
        (["1", "01"], 2, {}, [1, 0]),
        (["negative", "Negative", "very good", "Very-good"], 3, NAMES, [0, 0, 2, 2]),
        (["C", "C++"], 2, {"C": 1, "D": 0}, [0, 1]),  # C++ is not C: in the order of the names
    ],
)
def test_classes_are_told_by_name_or_number_or_order(classes, count, names, labels):
    assert labels_of("it", classes, count, names)[0] == labels


def test_a_guess_is_said():
    assert labels_of("it", ["positive"], 3, NAMES)[1] == ""
    assert labels_of("it", ["0", "1"], 2, {})[1] == ""
    assert "outputs of their numbers" in labels_of("it", [str(i) for i in range(12)], 12, {})[1]
    assert (
        labels_of("it", ["dog", "cat"], 2, {})[1]
        == "it: classes in the order of their names: cat is output 0, dog is output 1"
    )


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        (
            ["dog", "cat"],
            NAMES,
            r"it: 2 of the model's 3 classes may be meant by cat, dog: name them by its classes \(NEGATIVE, ",
        ),
        (["dog", "cat"], {}, "name them by their numbers, or give a model of as many classes"),
        ([0, 3], {}, "it: there is a label 3, and the model has 3 outputs"),
    ],
)
def test_classes_that_are_not_the_models(classes, names, message):
    with pytest.raises(FxlrdError, match=message):
        labels_of("it", classes, 3, names)
