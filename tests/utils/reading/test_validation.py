"""What pydantic finds wrong, in a line of our own words."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, replace
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from lmms_plugin.utils.reading.validation import (
    Expected,
    Number,
    OneOf,
    Problem,
    Schema,
    Text,
    Truth,
    Whole,
    left_out,
    refused,
    validated,
)


@validated
class Point:
    x: Whole
    y: Number = 0.0


class Drawing(Schema):
    name: Text
    points: Annotated[tuple[Point, ...], Field(min_length=1)] = left_out()
    colour: Annotated[str, OneOf(lambda: ("red", "green"))] = left_out()
    tool: Literal["pen", "brush"] = left_out()
    filled: Truth = False
    width: Annotated[Whole, Field(ge=1, le=9)] = 1
    opacity: Annotated[Number, Field(gt=0), Expected("a share")] = 1.0
    layers: Mapping[str, Point] = left_out()

    @model_validator(mode="after")
    def _has_ends(self) -> "Drawing":
        if self.points and len(self.points) == 3:
            raise refused("expected two or four points, got three", "points", 2)
        return self


POINT = {"x": 1}


@pytest.mark.parametrize(
    ("given", "loc", "told"),
    [
        ({"name": 3}, ("name",), "name must be a text, got 3"),
        ({"name": ""}, ("name",), "name must be a text, got ''"),
        ({"filled": 1}, ("filled",), "filled must be True or False, got 1"),
        ({"width": True}, ("width",), "width must be a whole number, got True"),
        ({"width": 0}, ("width",), "width must be at least 1, got 0"),
        ({"width": 10}, ("width",), "width must be at most 9, got 10"),
        ({"opacity": True}, ("opacity",), "opacity must be a share, got True"),
        ({"opacity": float("nan")}, ("opacity",), "opacity must be a share, got nan"),
        ({"colour": "gren"}, ("colour",), "one of red, green, got 'gren', did you mean 'green'?"),
        ({"colour": ["red"]}, ("colour",), "colour must be one of red, green, got ['red']"),
        ({"tool": "knife"}, ("tool",), "tool must be 'pen' or 'brush', got 'knife'"),
        ({"points": []}, ("points",), "points must be a list of at least 1, got []"),
        ({"points": "xy"}, ("points",), "points must be a list, got 'xy'"),
        ({"points": [POINT, {}]}, ("points", 1, "x"), "points[1]: x is missing"),
        ({"points": [POINT, 5]}, ("points", 1), "points[1]: expected a mapping with x, y, got 5"),
        ({"points": [POINT] * 3}, ("points", 2), "points[2]: expected two or four points, got three"),
        ({"layers": {"sky": {"x": 0.5}}}, ("layers", "sky", "x"), "layers: sky: x must be a whole number, got 0.5"),
        # What is unknown may explain what is missing.
        ({"widht": 3}, ("widht",), "unknown key 'widht', did you mean 'width'? (known: name, points, colour,"),
        ({"name": None, "widht": 3}, ("widht",), "unknown key 'widht', did you mean 'width'?"),
        ({"points": [{"x": 1, "z": 2}]}, ("points", 0, "z"), "points[0]: unknown key 'z' (known: x, y)"),
        ({5: 6}, ("5",), "5 must be a name, got 5"),
        ({"Point": 6}, ("Point",), "unknown key 'Point', did you mean 'points'?"),
        ({"": 6}, ("",), "unknown key '' (known: name"),
        ({"\0": 6}, (), "unknown key '' (known: name"),
        ({"width": "x" * 9999}, ("width",), "width must be a whole number, got 'xxx"),
        ({"x" * 9999: 1}, ("x" * 9999,), "unknown key 'xxx"),
        ({"tool": "a\nb"}, ("tool",), r"tool must be 'pen' or 'brush', got 'a\nb'"),
    ],
)  # fmt: skip
def test_the_first_problem_is_told_in_one_line(given, loc, told):
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate({"name": "a"} | given)
    problem = Problem.of(caught.value, Drawing)
    assert told in problem.text
    assert problem.loc == loc
    assert "\n" not in problem.text
    assert len(problem.text) < 300


def test_what_is_missing_is_told():
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate({})
    assert Problem.of(caught.value, Drawing) == Problem(("name",), "name is missing", of_name=False)


def test_a_problem_needs_no_model():
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate({"name": "a", "size": 3})
    assert Problem.of(caught.value) == Problem(("size",), "unknown key 'size'", of_name=True)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Point(), "x is missing"),
        (lambda: Point(1, 2.0, 3), r"\[2\] must be Unexpected positional argument, got 3"),
        (lambda: Point("1"), "x must be a whole number, got '1'"),
        (lambda: Point(1, "2"), "y must be a number, got '2'"),
        (lambda: Point(x=1, y=True), "y must be a number, got True"),
        (lambda: Point(x=1, z=2), r"unknown key 'z' \(known: x, y\)"),
        (lambda: replace(Point(1), x=None), "x must be a whole number, got None"),
    ],
)
def test_values_refuse_in_one_line_what_they_are_made_of(make, told):
    with pytest.raises(ValueError, match=f"^{told}$") as caught:
        make()
    assert type(caught.value) is ValueError


def test_values_are_frozen_and_have_a_hash():
    assert {Point(1): "a"}[Point(1, 0.0)] == "a"
    assert Point(1, 2).y == 2.0
    with pytest.raises(FrozenInstanceError):
        Point(1).x = 2
    with pytest.raises(ValidationError, match="frozen"):
        Drawing(name="a").name = "b"
