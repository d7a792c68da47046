"""Expressions about demo scenes that match nothing in them: exactly, because the scenes can be drawn again."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from datasets import Dataset

from lmms_plugin.demo.dataset import MOST_OBJECTS
from lmms_plugin.demo.scenes import SceneObject, scene
from lmms_plugin.demo.wording import ADJECTIVES, ANY, COLOURS, FILLS, NOUNS, SHAPED, SHAPES, SIZES, WITH, meaning
from lmms_plugin.shifts.language.lexicon import Alternative, ExclusiveWords
from lmms_plugin.shifts.language.mismatches import Mismatch, attribute_swaps
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.grounding.reworded import RewordedDocs, asked_both_ways
from lmms_plugin.utils.copies import DatasetError

_NAME = re.compile(r"shapes_([a-z]+)_(\d+)\.jpg")
_SHAPE = "shape"


def _sets() -> Iterator[tuple[str, dict[str, tuple[str, ...]]]]:
    """Attribute and, for every way of saying its values, value → words."""
    yield "colour", {colour: (colour,) for colour in COLOURS}
    yield "size", {size: ADJECTIVES[size] for size in SIZES}
    yield "fill", {fill: ADJECTIVES[fill] for fill in FILLS}
    yield "fill", {fill: (WITH[fill],) for fill in FILLS}
    yield _SHAPE, {shape: NOUNS[shape] for shape in SHAPES}
    for noun in dict.fromkeys(ANY):
        yield _SHAPE, {shape: (f"{SHAPED[shape]} {noun}",) for shape in SHAPES}


@lru_cache(maxsize=1)
def exclusive() -> ExclusiveWords:
    """The words of the demo's expressions that exclude one another, in the construction they stand in."""
    of: dict[str, Alternative] = {}
    like: dict[str, frozenset[str]] = {}
    for attribute, values in _sets():
        for value, words in values.items():
            others = [word for other, said in values.items() if other != value for word in dict.fromkeys(said)]
            of |= dict.fromkeys(words, Alternative(attribute, tuple(others)))
            like |= dict.fromkeys(words, frozenset(words))
    return ExclusiveWords(of, like)


@lru_cache(maxsize=64)
def _objects(file_name: str) -> tuple[SceneObject, ...]:
    name = _NAME.fullmatch(file_name)
    if name is None:
        raise DatasetError(f"expected a scene of the demo such as shapes_test_0007.jpg, got {file_name!r}")
    return scene(name.group(1), int(name.group(2)), max_objects=MOST_OBJECTS).objects


def drawn(doc: Mapping[str, Any]) -> tuple[SceneObject, ...]:
    """All objects of a document's scene.

    Raises:
        DatasetError: The scene drawn now is not the one in the data.
    """
    objects = _objects(doc["file_name"])
    if not any(list(item.box) == doc["bbox"] and doc["expression"] in item.expressions for item in objects):
        raise DatasetError(f"{doc['file_name']}: expected the scene of the packaged data, but another one is drawn")
    return objects


def _matches_nothing(expression: str, objects: tuple[SceneObject, ...]) -> bool:
    said = meaning(expression)
    return not any(all(getattr(item.attributes, name) == said[name] for name in said) for item in objects)


def attribute_swaps_of(doc: Mapping[str, Any]) -> list[Mismatch]:
    """The expression with one attribute swapped, so that no object of its scene has all that it says."""
    objects = drawn(doc)
    swaps = attribute_swaps(doc["expression"], exclusive())
    return [swap for swap in swaps if _matches_nothing(swap.expression, objects)]


def absent_objects_of(doc: Mapping[str, Any]) -> list[Mismatch]:
    """The expression with its shape replaced by one that no object of its scene has."""
    there = {item.attributes.shape for item in drawn(doc)}
    swaps = attribute_swaps(doc["expression"], exclusive())
    return [swap for swap in swaps if swap.kind == _SHAPE and meaning(swap.expression)[_SHAPE] not in there]


def _pairs(name: str, candidates: Callable[[Mapping[str, Any]], list[Mismatch]]) -> Callable[[Dataset], RewordedDocs]:
    def process_docs(rows: Dataset) -> RewordedDocs:
        return asked_both_ways(ExpressionDocs(rows), name, candidates)

    return process_docs


attribute_swap = _pairs("attribute_swap", attribute_swaps_of)
absent_object = _pairs("absent_object", absent_objects_of)
