"""Content of a photograph according to its expressions, for the construction of expressions that match nothing.

RefCOCO+ does not list what else a photograph contains. An added word is therefore never mentioned by any expression
about the photograph, by any synonym, and an added object is also of no supercategory mentioned there and not of COCO's
commonest categories. Unmentioned things may still be present: a few per cent of absent objects, and more of swapped
attributes (someone in the background wears green), do match something. That bounds AUROC from above, equally for every
model.
"""

from collections import defaultdict
from collections.abc import Callable

from datasets import Dataset

from lmms_plugin.shifts.language.lexicon import Category, alternatives, categories, find
from lmms_plugin.shifts.language.mismatches import Mismatch, absent_objects, swaps_about_photographs
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.grounding.reworded import RewordedDocs, asked_both_ways
from lmms_plugin.tasks.sources.documents import Documents

_OTHER = "other"


class Mentions:
    """Mentions of the expressions about each photograph.

    Args:
        documents: All documents of a split, with `expression` and `image_id`.
    """

    def __init__(self, documents: Documents) -> None:
        self._attributes: defaultdict[str, set[str]] = defaultdict(set)
        self._objects: defaultdict[str, set[Category]] = defaultdict(set)
        exclusive, known = alternatives(), categories()
        attributes = exclusive.like.keys() | {new for entry in exclusive.of.values() for new in entry.replacements}
        for i in range(len(documents)):
            doc = documents.content(i)
            expression, image = doc["expression"], doc["image_id"]
            self._attributes[image] |= {span.phrase for span in find(expression, attributes)}
            for span in find(expression, known.of):
                self._objects[image] |= set(known.of[span.phrase])

    def attribute_swaps(self, expression: str, image: str) -> list[Mismatch]:
        """Swap an attribute or noun of the expression for one that no expression about the photograph mentions."""
        like, mentioned = alternatives().like, self._attributes[image]
        swaps = swaps_about_photographs(expression)
        said = ({swap.new} | {p for span in find(swap.new, like) for p in like[span.phrase]} for swap in swaps)
        return [swap for swap, phrases in zip(swaps, said, strict=True) if not phrases & mentioned]

    def absent_objects(self, expression: str, image: str) -> list[Mismatch]:
        """Replace the object of the expression by one of an offered category whose supercategory is not mentioned."""
        near = {category.supercategory for category in self._objects[image]} - {_OTHER}
        absent = [category for category in categories().all if category.offered and category.supercategory not in near]
        return absent_objects(expression, categories(), absent)


def attribute_swap(rows: Dataset) -> RewordedDocs:
    """Pair each true expression of RefCOCO+-shaped rows with one with a swapped attribute; for `process_docs`."""
    return _pairs(rows, "attribute_swap", Mentions.attribute_swaps)


def absent_object(rows: Dataset) -> RewordedDocs:
    """Pair each true expression of RefCOCO+-shaped rows with one about an absent object; for `process_docs`."""
    return _pairs(rows, "absent_object", Mentions.absent_objects)


def _pairs(rows: Dataset, name: str, candidates: Callable[[Mentions, str, str], list[Mismatch]]) -> RewordedDocs:
    docs = ExpressionDocs(rows)
    mentions = Mentions(docs)
    return asked_both_ways(docs, name, lambda doc: candidates(mentions, doc["expression"], doc["image_id"]))
