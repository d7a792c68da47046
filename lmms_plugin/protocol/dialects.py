"""Grounding dialects: how each model family is asked for a box, and how its answer writes one.

Order, scale and frame of the numbers are declared per family. They are never inferred from the numbers of an answer and
never chosen with the ground truth: both would make an answer's correctness depend on what it is compared with.

A new family is one more `Dialect` in the table at the end of this file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from string import Formatter
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.protocol.boxes import OVERSHOOT, Box
from lmms_plugin.protocol.reasoning import separate
from lmms_plugin.utils import suggest

Floats = npt.NDArray[np.float64]
Size = tuple[int, int]

CONFIDENCE_QUESTION = (
    "How sure are you that your answer is right? Answer with a number between 0 (certainly wrong) and 100 (certainly "
    "right), and nothing else."
)
"""After "Just ask for calibration" (arXiv 2305.14975); a dialect may ask otherwise (`Dialect.confidence_prompt`)."""

# Bounded repetition keeps the work per character constant: no answer, however long, causes deep backtracking.
_NUMBER = r"-?[0-9]{1,6}(?:\.[0-9]{1,20})?"
_SPACE = r"\s{0,24}"
# The style of bracket carries no meaning (GLM-4.5V says so), and a semicolon separates the boxes of one list (Shikra).
_BRACKETS = {"[": r"[\[(<;]", "]": r"(?=[\])>;])"}
_CORNERS = ("x1", "y1", "x2", "y2")


class Frame(Enum):
    """Reference frame of a coordinate's whole range."""

    ORIGINAL = "original"
    """The original image; also the right frame for a processor that squashes the image to another shape."""
    RESIZED = "resized"
    """The image as the model saw it, in its pixels: `model_size` is needed."""
    PADDED = "padded"
    """The square on the longer side, the image in its middle: the model must be shown the padded image."""
    CROPPED = "cropped"
    """The square on the shorter side, cut from the image's middle."""


class Parsed(NamedTuple):
    """Box parsed from an answer.

    Attributes:
        box: First box; None where the answer holds none, or where the first one is invalid: inverted corners, no area,
            numbers outside the declared scale or in fractions of it, or a size that its frame needs is unknown.
        count: Number of boxes in the answer, valid or not. 0 means that nothing could be parsed; `box is None` with
            count > 0 means that something was written that is not a valid box.
        coordinates: (start, end) of each number of the first box in the text, in text order; where a number is a token
            of its own, the whole token, and two patch indices for Kosmos-2. Empty when count is 0.
        other_scale: Whether the first box is none because its numbers are not in the declared scale: beyond its end, or
            fractions where it is of whole numbers.
    """

    box: Box | None
    count: int  # type: ignore[assignment]  # a field, over tuple.count, which nobody wants of an answer
    coordinates: tuple[tuple[int, int], ...]
    other_scale: bool = False


class _Axis(NamedTuple):
    """One axis of a frame: its length in units, and its start and end in fractions of the original."""

    units: float
    origin: float
    extent: float


@cache
def _pattern(box: str, number: str) -> re.Pattern[str]:
    """Convert the notation of a box to a regular expression, with one named group per number."""
    before, after = map(re.escape, re.split(r"\{.*\}", number))
    parts: list[str] = []
    for literal, field, _, _ in Formatter().parse(box):
        parts += [_BRACKETS.get(char, re.escape(char)) for char in literal if not char.isspace()]
        if field:
            parts.append(f"(?P<{field}>{before}{_NUMBER}{after})")
    return re.compile(_SPACE.join(parts))


def _in_unit_square(numbers: Floats) -> Any:
    """Return whether all numbers, along the last axis, are fractions of 1 or overshoot them by rounding."""
    return ((numbers >= -OVERSHOOT) & (numbers <= 1 + OVERSHOOT)).all(axis=-1)


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """Notation of boxes and questions of a model family.

    Attributes:
        name: Key in `DIALECTS`; a checkpoint may declare it as `grounding_dialect` in its config.json.
        prompt: Question, with {expression}.
        source: Publication of prompt and format; where there is none, what was looked through for one.
        model_types: `config.model_type` of the checkpoints that use it.
        number: Format specification of one number; text around it belongs to the number's own token.
        box: Format of one box, with {x1} {y1} {x2} {y2} in the family's order.
        answer: Format of a whole answer, with {box} and perhaps {expression}. Only `write` uses it.
        scale: Number of the far edge of the frame. Unused for `Frame.RESIZED`.
        offset: Position of a number in its bin: 0 its lower edge, 0.5 its middle.
        largest: Largest number that the format can write; a larger one is not a number of this dialect.
        frame: Reference frame of the numbers.
        confidence_prompt: Question of a second turn, for the model's confidence in its answer.
        raw_prompt: Whether the family has no chat template and takes the prompt unchanged, after its image tokens.
        published: Whether the family publishes a grounding format; if not, a generic one is used. Such a model is a
            control: nothing says that it was ever trained to ground.
    """

    name: str
    prompt: str
    source: str
    model_types: tuple[str, ...] = ()
    number: str = "{:.2f}"
    box: str = "[{x1}, {y1}, {x2}, {y2}]"
    answer: str = "{box}"
    scale: float = 1.0
    offset: float = 0.0
    largest: float = math.inf
    frame: Frame = Frame.ORIGINAL
    confidence_prompt: str = CONFIDENCE_QUESTION
    raw_prompt: bool = False
    published: bool = True

    @property
    def requires_model_size(self) -> bool:
        """Return whether an answer has no meaning without the size of the image as the model saw it."""
        return self.frame is Frame.RESIZED

    @property
    def whole(self) -> bool:
        """Return whether the format writes integers: pixels, thousandths, cells."""
        return ".0f}" in self.number

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the names of the numbers of one box, in the order in which they are written."""
        return tuple(field for _, field, _, _ in Formatter().parse(self.box) if field)

    def ask(self, expression: str) -> str:
        """Return the text of the question, without image tokens and chat template."""
        return self.prompt.format(expression=expression)

    def parse(self, text: str, *, original_size: Size | None, model_size: Size | None, opened: str = "") -> Parsed:
        """Parse the first box of an answer.

        The search takes only the numbers and the characters between them into account: keys, labels, tags and fences
        may be missing, and a complete first box is read from an answer that was cut off later.

        Total: any text and any sizes give a result, in time linear in the length of the text. Numbers up to `OVERSHOOT`
        outside the frame are clipped at the edge of the image; further ones are not in the declared scale and give no
        box. Neither do fractions of 1 where integers are declared: the answer is counted as written, and not read.
        Reasoning is skipped, and reasoning that never ends holds no answer (`lmms_plugin.protocol.reasoning`).

        Args:
            text: Answer, with or without special tokens; Florence-2's location tokens are special, so keep them.
            original_size: (width, height) of the original image in pixels; used by the square frames alone.
            model_size: (width, height) in pixels of the image as the model saw it; used where `requires_model_size`.
            opened: Tag of a reasoning block that the prompt opened; "" if none.
        """
        matches = _pattern(self.box, self.number).finditer(text, *separate(text, opened).said)
        first = next(matches, None)
        if first is None:
            return Parsed(None, 0, ())
        count = 1 + sum(1 for _ in matches)
        box, other_scale = self._read(first, original_size, model_size)
        return Parsed(box, count, tuple(map(first.span, first.groupdict())), other_scale)

    def boxes(self, numbers: Floats, *, original_size: Size | None, model_size: Size | None) -> Floats:
        """Convert many boxes at once, by the rules of `parse`; fractions are recognised by their value alone.

        Args:
            numbers: Numbers, shape (n, len(fields)), in the order of `fields`.
            original_size: As in `parse`.
            model_size: As in `parse`.

        Returns:
            Shape (n, 4), xyxy fractions of the original image; NaN where the numbers make no box.
        """
        axes = self._axes(original_size, model_size)
        if axes is None:
            return np.full((len(numbers), 4), np.nan)
        units, origin, extent = (np.array(column) for column in zip(*axes * 2, strict=True))
        corners = self._corners_from_numbers(dict(zip(self.fields, numbers.T, strict=True)))
        shares = np.stack(corners, axis=1) / units
        boxes = np.clip(origin + extent * shares, 0.0, 1.0)
        outside = ((shares < -OVERSHOOT) | (shares > 1 + OVERSHOOT)).any(axis=1)
        empty = (boxes[:, 0] >= boxes[:, 2]) | (boxes[:, 1] >= boxes[:, 3])
        fractions = (numbers % 1 != 0).any(axis=1) & _in_unit_square(numbers)
        none = outside | empty | (numbers > self.largest).any(axis=1) | (self.whole & fractions)
        return np.where(none[:, None], np.nan, boxes)

    def write(
        self, box: Box, *, original_size: Size | None = None, model_size: Size | None = None, expression: str = ""
    ) -> str:
        """Write an answer as the family would: the inverse of `parse` up to the rounding of the format.

        Args:
            box: Box to write, clipped at the edge of the frame.
            original_size: As in `parse`.
            model_size: As in `parse`.
            expression: Expression, repeated in the answer where the family does so.

        Raises:
            ValueError: The frame needs a size that was not given.
        """
        axes = self._axes(original_size, model_size)
        if axes is None:
            raise ValueError(
                f"Dialect {self.name!r} writes boxes relative to the {self.frame.value} image and needs its size, "
                f"but got original_size={original_size}, model_size={model_size}"
            )
        corners = [(v - axis.origin) / axis.extent * axis.units for v, axis in zip(box, axes * 2, strict=True)]
        limits = [min(axis.units, self.largest) for axis in axes * 2]
        numbers = {
            field: self.number.format(value) for field, value in self._numbers_from_corners(corners, limits).items()
        }
        return self.answer.format(box=self.box.format(**numbers), expression=expression)

    def _read(
        self, match: re.Match[str], original_size: Size | None, model_size: Size | None
    ) -> tuple[Box | None, bool]:
        """Return the box of a match, and whether there is none because its numbers are in another scale."""
        before, after = re.split(r"\{.*\}", self.number)
        numbers = {field: float(raw[len(before) : len(raw) - len(after)]) for field, raw in match.groupdict().items()}
        axes = self._axes(original_size, model_size)
        if axes is None:
            return None, False
        if max(numbers.values()) > self.largest:
            return None, True
        if self.whole and "." in "".join(match.groups()) and _in_unit_square(np.array(list(numbers.values()))):
            return None, True
        pairs = list(zip(self._corners_from_numbers(numbers), axes * 2, strict=True))
        if any(not -OVERSHOOT <= value / axis.units <= 1 + OVERSHOOT for value, axis in pairs):
            return None, True
        return Box.clip(*(axis.origin + axis.extent * (value / axis.units) for value, axis in pairs)), False

    def _axes(self, original_size: Size | None, model_size: Size | None) -> tuple[_Axis, _Axis] | None:
        """Map the frame to the original image; None where a size that this needs is unknown or empty."""
        if self.frame is Frame.ORIGINAL:
            return _Axis(self.scale, 0.0, 1.0), _Axis(self.scale, 0.0, 1.0)
        size = model_size if self.frame is Frame.RESIZED else original_size
        if size is None or min(size) <= 0:
            return None
        if self.frame is Frame.RESIZED:
            return _Axis(size[0], 0.0, 1.0), _Axis(size[1], 0.0, 1.0)
        side = max(size) if self.frame is Frame.PADDED else min(size)
        # LLaVA and Shikra put the odd pixel of padding to the right and at the bottom.
        x, y = (_Axis(self.scale, -((side - length) // 2) / length, side / length) for length in size)
        return x, y

    def _corners_from_numbers(self, numbers: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(numbers[corner] + self.offset for corner in _CORNERS)

    def _numbers_from_corners(self, corners: list[float], limits: list[float]) -> dict[str, float]:
        return {
            corner: min(max(value - self.offset, 0.0), limit)
            for corner, value, limit in zip(_CORNERS, corners, limits, strict=True)
        }


@dataclass(frozen=True, kw_only=True)
class PatchDialect(Dialect):
    """Notation of a box by its first and last cell in a `scale` x `scale` grid, rows first (Kosmos-2).

    The corners are the middles of the two cells; where these share a row or a column, the outer edges.
    """

    def _corners_from_numbers(self, numbers: Mapping[str, Any]) -> tuple[Any, ...]:
        (top, left), (bottom, right) = (divmod(numbers[cell], self.scale) for cell in ("first", "last"))
        inside = 0.5 * ((top != bottom) & (left != right))
        outside = 1.0 - inside
        return left + inside, top + inside, right + outside, bottom + outside

    def _numbers_from_corners(self, corners: list[float], limits: list[float]) -> dict[str, float]:
        cells = [math.floor(value) for value in corners[:2]] + [math.ceil(value) - 1 for value in corners[2:]]
        left, top, right, bottom = (min(max(cell, 0), self.scale - 1) for cell in cells)
        return {"first": top * self.scale + left, "last": bottom * self.scale + right}


_DESCRIBES = "Please provide the bounding box coordinate of the region this sentence describes: "
_FRACTIONS = (
    "Answer with one bounding box [x1, y1, x2, y2]: left, top, right and bottom as fractions of the image's width and "
    "height between 0 and 1, with two decimals. " + _DESCRIBES + "{expression}"
)
_NONE_PUBLISHED = "none published; generic format"


def _looked(where: str) -> str:
    """Return the source of a family without a published format."""
    return f"{_NONE_PUBLISHED} (looked for in {where})"


_BBOX_2D = '```json\n[\n\t{{"bbox_2d": {box}, "label": "{expression}"}}\n]\n```'

_TABLE: tuple[Dialect, ...] = (
    Dialect(name="fractions", prompt=_FRACTIONS, source=_NONE_PUBLISHED, published=False),
    Dialect(
        name="demo",
        prompt="Locate {expression}.",
        source="this package's demo checkpoint",
        number="{:02.0f}",
        box="[{x1},{y1},{x2},{y2}]",
        scale=100,
        largest=99,
    ),
    Dialect(
        name="qwen2_vl",
        prompt=_DESCRIBES + "{expression}",
        source="QwenLM/Qwen3-VL issue 536 (the prompt without special tokens reproduces the published RefCOCO numbers)",
        model_types=("qwen2_vl",),
        number="{:.0f}",
        box="({x1},{y1}),({x2},{y2})",
        answer="<|object_ref_start|>{expression}<|object_ref_end|><|box_start|>{box}<|box_end|>",
        scale=1000,
    ),
    Dialect(
        name="qwen2_5_vl",
        prompt="Locate {expression} in this image and output the bbox coordinates in JSON format.",
        source="QwenLM/Qwen3-VL issue 991 (the authors' RefCOCO prompt)",
        model_types=("qwen2_5_vl",),
        number="{:.0f}",
        answer=_BBOX_2D,
        frame=Frame.RESIZED,
    ),
    Dialect(
        name="qwen3_vl",
        prompt=(
            'Locate every object that matches the description "{expression}" in the image. '
            "Report bbox coordinates in JSON format."
        ),
        source="QwenLM/Qwen3-VL issue 1721 (the authors' RefCOCO prompt); cookbook spatial_understanding (scale)",
        model_types=("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        number="{:.0f}",
        answer=_BBOX_2D,
        scale=1000,
    ),
    Dialect(
        name="qwen3_omni",
        prompt="Locate the object: {expression}.",
        source="QwenLM/Qwen3-Omni cookbooks/object_grounding.ipynb (prompt, key and scale)",
        model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
        number="{:.0f}",
        answer=_BBOX_2D,
        scale=1000,
    ),
    Dialect(
        name="internvl",
        prompt=_DESCRIBES + "<ref>{expression}</ref>",
        source="OpenGVLab/InternVL eval/refcoco",
        model_types=("internvl", "internvl_chat"),
        number="{:.0f}",
        answer="<ref>{expression}</ref><box>[{box}]</box>",
        scale=1000,
    ),
    # Trained and evaluated on images padded to a square, with boxes relative to that square (haotian-liu/LLaVA issues
    # 591 and 606). The Hugging Face port's processor does not pad unless told (transformers PR 33191): it crops the
    # centre, and then the model sees, and answers for, a different square.
    Dialect(
        name="llava",
        prompt=_DESCRIBES + "{expression}",
        source="LLaVA-1.5, arXiv 2310.03744 (mix665k); haotian-liu/LLaVA issue 606 (frame)",
        model_types=("llava",),
        frame=Frame.PADDED,
    ),
    Dialect(
        name="llava_cropped",
        prompt=_DESCRIBES + "{expression}",
        source="as llava, for a processor with do_center_crop and without do_pad",
        frame=Frame.CROPPED,
    ),
    # Whether the boxes of LLaVA-1.5's data were converted for these models' unpadded tiles was asked, never answered:
    # the frame is this package's choice.
    Dialect(
        name="llava_onevision",
        prompt=_DESCRIBES + "{expression}",
        source=_looked("haotian-liu/LLaVA issue 1158, which was never answered"),
        model_types=("llava_onevision", "llava_next"),
        published=False,
    ),
    # The Hugging Face processor appends the newline that ends a PaliGemma prompt.
    Dialect(
        name="paligemma",
        prompt="detect {expression}",
        source="PaliGemma, arXiv 2407.07726",
        model_types=("paligemma",),
        number="<loc{:04.0f}>",
        box="{y1}{x1}{y2}{x2}",
        answer="{box} {expression}",
        scale=1024,
        largest=1023,
        raw_prompt=True,
    ),
    Dialect(
        name="florence2",
        prompt="<CAPTION_TO_PHRASE_GROUNDING>{expression}",
        source="Florence-2, arXiv 2311.06242; transformers Florence2PostProcessor",
        model_types=("florence2",),
        number="<loc_{:.0f}>",
        box="{x1}{y1}{x2}{y2}",
        answer="{expression}{box}",
        scale=1000,
        offset=0.5,
        largest=999,
        raw_prompt=True,
    ),
    PatchDialect(
        name="kosmos2",
        prompt="<grounding><phrase> {expression}</phrase>",
        source="microsoft/kosmos-2-patch14-224 model card; transformers Kosmos2Processor",
        model_types=("kosmos-2",),
        number="<patch_index_{:04.0f}>",
        box="{first}{last}",
        answer="<object>{box}</object>",
        scale=32,
        largest=32 * 32 - 1,
        raw_prompt=True,
    ),
    Dialect(
        name="deepseek_vl2",
        prompt="<|ref|>{expression}<|/ref|>.",
        source="deepseek-ai/DeepSeek-VL2 README and inference.py",
        model_types=("deepseek_vl_v2",),
        number="{:.0f}",
        answer="<|ref|>{expression}<|/ref|><|det|>[{box}]<|/det|>",
        scale=999,
    ),
    Dialect(
        name="shikra",
        prompt="In the given image, could you find and tell me the coordinates of {expression}?",
        source="Shikra, arXiv 2306.15195, table of REC templates; shikras/shikra (Expand2square, PlainBoxFormatter)",
        model_types=("shikra",),
        number="{:.3f}",
        box="[{x1},{y1},{x2},{y2}]",
        answer="Answer: {box} .",
        frame=Frame.PADDED,
    ),
    Dialect(
        name="glm4v",
        prompt="Help me to locate {expression} in the image and give me its bounding boxes.",
        source="zai-org/GLM-V model cards of GLM-4.5V and GLM-4.6V",
        model_types=("glm4v", "glm4v_moe", "glm46v"),
        number="{:.0f}",
        box="[{x1},{y1},{x2},{y2}]",
        answer="<|begin_of_box|>[{box}]<|end_of_box|>",
        scale=1000,
    ),
    # The authors say of the scale that it is Qwen3-VL's, and publish no prompt; these words are this package's.
    Dialect(
        name="ernie4_5_vl",
        prompt=(
            'Locate the object that matches the description "{expression}" in the image. '
            "Report bbox coordinates in JSON format."
        ),
        source="PaddlePaddle/ERNIE issue 1364 (order and scale, by the authors); prompt of this package",
        model_types=("ernie4_5_vl_moe", "ernie4_5_moe_vl"),
        number="{:.0f}",
        answer=_BBOX_2D,
        scale=1000,
    ),
    Dialect(
        name="gemma4",
        prompt="detect {expression}, output only ```json",
        source="ai.google.dev/gemma/docs/capabilities/vision/image (Gemma 4: prompt, key, order and scale)",
        model_types=("gemma4", "gemma4_unified"),
        number="{:.0f}",
        box="[{y1}, {x1}, {y2}, {x2}]",
        answer='```json\n[\n  {{"box_2d": {box}, "label": "{expression}"}}\n]\n```',
        scale=1000,
    ),
    # LFM2-VL has the same model type, and no grounding before LFM2.5: its checkpoints are a control.
    Dialect(
        name="lfm2_vl",
        prompt=(
            "Detect all instances of: {expression}. Response must be a JSON array: "
            '[{{"label": ..., "bbox": [x1, y1, x2, y2]}}, ...]. Coordinates are normalized to [0,1].'
        ),
        source="LiquidAI/LFM2.5-VL-450M model card (visual grounding)",
        model_types=("lfm2_vl",),
        answer='[{{"label": "{expression}", "bbox": {box}}}]',
    ),
    Dialect(
        name="ovis2_5",
        prompt="Find the <ref>{expression}</ref> in the image. Please provide the bounding box coordinates.",
        source="AIDC-AI/Ovis2.5-9B model card (grounding: prompt, tags and scale)",
        model_types=("ovis2_5",),
        number="{:.3f}",
        box="({x1},{y1}),({x2},{y2})",
        answer="<ref>{expression}</ref><box>{box}</box>",
    ),
    # Three digits are the decimals of a fraction that is clamped to 0.999.
    Dialect(
        name="perception_lm",
        prompt=(
            "Provide a bounding box of the region this sentence describes: '{expression}'.\n"
            "Use the format [x1, y1, x2, y2]."
        ),
        source=(
            "facebookresearch/perception_models apps/plm/notebook_demos/image_grounding.ipynb (prompt, scale) and "
            "core/transforms/region_transform.py (training format)"
        ),
        model_types=("perception_lm",),
        number="{:03.0f}",
        box="[{x1},{y1},{x2},{y2}]",
        scale=1000,
        largest=999,
    ),
    *(
        Dialect(name=types[0], prompt=_FRACTIONS, source=_looked(where), model_types=types, published=False)
        for types, where in (
            (("idefics3",), "issues and public code on GitHub"),
            (("smolvlm",), "issues and public code on GitHub"),
            (("gemma3",), "google/gemma-3-4b-it discussion 38: its authors were asked and named none"),
            (
                ("qwen2_5_omni", "qwen2_5_omni_thinker"),
                "QwenLM/Qwen2.5-Omni issues 236 and 392: its authors were asked for the scale and did not tell",
            ),
        )
    ),
)

DIALECTS: Mapping[str, Dialect] = MappingProxyType({dialect.name: dialect for dialect in _TABLE})
"""Every dialect by its name."""

_BY_MODEL_TYPE = {model_type: dialect for dialect in _TABLE for model_type in dialect.model_types}


def dialect_for(model_type: str, declared: str | None = None) -> Dialect:
    """Choose the dialect of a checkpoint.

    An unknown model uses "fractions"; so does an answer that came without its dialect, from a model that was asked the
    generic question.

    Args:
        model_type: `config.model_type` of the checkpoint.
        declared: Name of a dialect that the checkpoint or the user declares; it overrides the model type.

    Raises:
        ValueError: The declared name is not known; the message names the nearest known one.
    """
    if declared is None:
        return _BY_MODEL_TYPE.get(model_type, DIALECTS["fractions"])
    if declared not in DIALECTS:
        raise suggest.unknown("dialect", declared, DIALECTS)
    return DIALECTS[declared]
