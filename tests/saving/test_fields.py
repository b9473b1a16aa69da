"""A field's annotation is its check; errors name the JSON path, what was expected and what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from fxlrd.errors import FxlrdError
from fxlrd.saving.fields import Check, Record, parse

Even = Annotated[int, Check("an even integer", lambda n: n % 2 == 0)]


@dataclass(frozen=True)
class Point(Record):
    x: float
    name: str | None


@dataclass(frozen=True)
class Circle(Record):
    radius: Even


@dataclass(frozen=True)
class Drawing(Record):
    shapes: Mapping[str, Point | Circle]
    tags: tuple[str, ...]
    corner: tuple[int, bool]
    style: Literal["solid", "dashed"] | tuple[Even, ...]
    extra: Any


GOOD = {
    "shapes": {"p": {"x": 1, "name": None}, "c": {"radius": 4}},
    "tags": ["a", "b"],
    "corner": [3, True],
    "style": [2, 4],
    "extra": {"any": [1.5]},
}


def test_what_is_parsed_is_typed_and_goes_back_to_the_same_json():
    drawing = Drawing.from_json(GOOD)
    assert drawing == Drawing({"p": Point(1, None), "c": Circle(4)}, ("a", "b"), (3, True), (2, 4), {"any": [1.5]})
    assert json.dumps(drawing.to_json()) == json.dumps(GOOD)
    assert parse(tuple[Literal["a"], ...], [], "x") == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": ["a", 7]}, "tags[1]: expected a string, found 7"),
        ({"tags": "a"}, 'tags: expected a list, found "a"'),
        ({"tags": {"a": 1}}, "tags: expected a list, found an object of 'a'"),
        ({"corner": [3]}, "corner: expected a list of 2, found a list of 1"),
        ({"corner": [True, True]}, "corner[0]: expected an integer, found true"),
        ({"corner": [3.0, True]}, "corner[0]: expected an integer, found 3.0"),
        ({"corner": [3, 1]}, "corner[1]: expected true or false, found 1"),
        ({"style": "dotted"}, 'style: expected "solid" or "dashed" or a list, found "dotted"'),
        ({"style": [2, 3]}, "style[1]: expected an even integer, found 3"),
        ({"style": ["2"]}, 'style[0]: expected an even integer, found "2"'),
        ({"shapes": []}, "shapes: expected an object, found a list of 0"),
        (
            {"shapes": {"a.b": {}}},
            "shapes['a.b']: expected an object of x, name or an object of radius, found an empty object",
        ),
        ({"shapes": {"p": {"x": "1", "name": None}}}, "shapes['p'].x: expected a number, found \"1\""),
        ({"shapes": {"p": {"x": True, "name": None}}}, "shapes['p'].x: expected a number, found true"),
        ({"shapes": {"p": {"x": 1, "name": 2}}}, "shapes['p'].name: expected a string or null, found 2"),
        ({"shapes": {"c": {"radius": 3}}}, "shapes['c'].radius: expected an even integer, found 3"),
        ({"more": None}, "['more']: expected nothing, found null"),
    ],
    ids=str,
)
def test_another_type_is_named_with_its_path(change, message):
    with pytest.raises(FxlrdError) as error:
        Drawing.from_json(GOOD | change)
    assert str(error.value) == message


def test_a_missing_key_is_named():
    with pytest.raises(FxlrdError, match=r"^drawing.tags: expected a list, found nothing$"):
        Drawing.from_json({name: value for name, value in GOOD.items() if name != "tags"}, "drawing")
    with pytest.raises(FxlrdError, match=r"^the plan: expected an object of shapes, tags, .*, found null$"):
        Drawing.from_json(None)


@pytest.mark.parametrize(
    "value",
    ["x\n\ud800" * 1000, {"\n\ud800" * 1000: 1}, 10**1000, float("nan"), [[[]]]],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_short_line(value):
    for data in (GOOD | {"tags": value}, GOOD | {"shapes": {"\n" * 1000: value}}):
        with pytest.raises(FxlrdError) as error:
            Drawing.from_json(data)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
        assert str(error.value).isascii()
