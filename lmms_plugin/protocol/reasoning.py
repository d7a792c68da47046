"""Separation of a model's reasoning from its answer.

A model that reasons first writes its reasoning between tags, and its answer after them. The tags depend on the family;
a chat template may open one itself, and then the text holds only the closing one. Some models write labels instead
("Thought: ... Answer: ..."), and some answer first and reason then. Only this module knows the tags: every reader of an
answer, be it a box, a word, a caption, a statement or the probability of a token, calls it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import NamedTuple

REMEDY = "which is no answer: give it room with --gen_kwargs max_new_tokens=2048"
Span = tuple[int, int]


class Tags(NamedTuple):
    """Pair of tags around a part of a text.

    Attributes:
        opening: Regular expression of the opening tag, without groups.
        closing: Regular expression of the closing tag, without groups.
        tokens: Tokens that the tags consist of, where a family has tokens for them.
        source: Source of the tags.
    """

    opening: str
    closing: str
    tokens: tuple[str, ...]
    source: str


def _written(opening: str, closing: str, source: str) -> Tags:
    return Tags(re.escape(opening), re.escape(closing), (opening, closing), source)


def _element(name: str, source: str) -> Tags:
    tokens = (f"<{name}>", f"</{name}>")
    opening, closing = (f"(?i:{re.escape(token)})" for token in tokens)
    return Tags(opening, closing, tokens, source)


REASONING: tuple[Tags, ...] = (
    _element("think", "DeepSeek-R1, Qwen3, Qwen3-VL, Qwen3.5, GLM-4.5V, InternVL3.5, MiMo-VL, Kimi-K2.5"),
    _element("thinking", "prompts of many models"),
    _element("thought", "prompts of many models"),
    _element("reasoning", "prompts of R1-like models; LLaVA-CoT, arXiv 2411.10440"),
    _element("analysis", "prompts of many models"),
    _element("reflection", "Reflection-Llama-3.1-70B, within its thinking; prompts of R1-like models"),
    _element("seed:think", "ByteDance-Seed/Seed-OSS-36B-Instruct, chat template"),
    _element("mm:think", "MiniMax M3"),
    _written("◁think▷", "◁/think▷", "moonshotai/Kimi-VL-A3B-Thinking"),
    _written("[THINK]", "[/THINK]", "mistralai/Magistral-Small-2509, tokenizer"),
    _written("<|begin_of_thought|>", "<|end_of_thought|>", "Sky-T1, arXiv 2501.19393; OpenThinker"),
    _written("<|START_THINKING|>", "<|END_THINKING|>", "CohereLabs/command-a-reasoning"),
    Tags(
        r"<\|channel>(?:thought\n)?",
        r"<channel\|>",
        ("<|channel>", "<channel|>"),
        "Gemma 4, ai.google.dev/gemma/docs/core/prompt-formatting-gemma4",
    ),
    Tags(
        r"(?:<\|start\|>assistant)?<\|channel\|>\s{0,8}(?:analysis|commentary)[^<]{0,200}(?:<\|constrain\|>[^<]{0,40})?<\|message\|>",
        r"<\|channel\|>\s{0,8}final[^<]{0,40}(?:<\|constrain\|>[^<]{0,40})?<\|message\|>",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
        "gpt-oss, the harmony response format",
    ),
)
"""Tags around reasoning. A new family is one more entry."""

ANSWER: tuple[Tags, ...] = (
    _written("<|begin_of_box|>", "<|end_of_box|>", "zai-org/GLM-V: the answer proper of GLM-4.1V and GLM-4.5V"),
    _element("answer", "R1-like models; GLM-4.1V-Thinking"),
    _element("conclusion", "LLaVA-CoT, arXiv 2411.10440"),
    _element("response", "baidu/ERNIE-4.5-VL-28B-A3B-Thinking"),
    _written("<|begin_of_solution|>", "<|end_of_solution|>", "Sky-T1, arXiv 2501.19393"),
    _written("<|START_RESPONSE|>", "<|END_RESPONSE|>", "CohereLabs/command-a-reasoning"),
)
"""Tags around the answer proper, behind the reasoning or without any."""

_TAGS = re.compile("|".join(f"(?P<o{i}>{tags.opening})|(?P<c{i}>{tags.closing})" for i, tags in enumerate(REASONING)))
_BOXES = re.compile("|".join(f"(?P<o{i}>{tags.opening})" for i, tags in enumerate(ANSWER)))
_CLOSED_BOX = tuple(re.compile(tags.closing) for tags in ANSWER)
_TURN_ENDS = re.compile(r"(?:\s*<\|(?:end|return)\|>)+\s*\Z")
_MARKDOWN = r"[ \t#*_]{0,8}"
_LABELLED = re.compile(
    rf"\s{{0,8}}{_MARKDOWN}(?:Thoughts?|THOUGHTS?|Reasoning|REASONING|Rationale|RATIONALE){_MARKDOWN}:"
    rf".*?(?:^|(?<=[.!?;])[ \t]){_MARKDOWN}(?:Answer|ANSWER|Final [Aa]nswer|FINAL ANSWER){_MARKDOWN}:{_MARKDOWN}",
    re.DOTALL | re.MULTILINE,
)
"""A label of reasoning at the beginning of what is said, up to a label of the answer where a line or sentence begins.

Such words also stand in ordinary text, so that one label without the other, or anywhere else, separates nothing.
"""


class Separated(NamedTuple):
    """Text split into reasoning and answer, which together are the whole of it.

    Attributes:
        text: Whole text.
        said: (start, end) of the part that is no reasoning: after the reasoning or, where nothing follows, before it;
            empty, at the end, where reasoning does not end.
        answer: (start, end) of the answer proper within it: the content of its own tags where it has some.
        finished: Whether reasoning, if there was some, came to its end.
        reasoned: Whether there was reasoning, be it empty.
        until: Start of reasoning after the answer; the end of the text where there is none.
    """

    text: str
    said: Span
    answer: Span
    finished: bool
    reasoned: bool
    until: int

    @property
    def reasoning_text(self) -> str:
        """Return the text before the answer and any reasoning after it, tags included; "" without reasoning."""
        return self.text[: self.said[0]] + self.text[self.until :]

    @property
    def said_text(self) -> str:
        """Return the text that is no reasoning."""
        return self.text[slice(*self.said)]

    @property
    def answer_text(self) -> str:
        """Return the answer proper."""
        return self.text[slice(*self.answer)]


class _Scan(NamedTuple):
    """Result of a scan of a text for tags.

    Attributes:
        inside: Index in `REASONING` of the tag still open at the end; None if there is none.
        opened: Tag that opened it.
        outside: (start, end) of the parts outside of reasoning, in order; the last one extends to the end of the text.
        reasoned: Whether there was a tag.
    """

    inside: int | None
    opened: str
    outside: tuple[Span, ...]
    reasoned: bool


def separate(text: str, opened: str = "") -> Separated:
    """Separate reasoning from answer.

    The answer is what follows the last reasoning or, where nothing does, the last text before it. A tag is closed by
    its own closing tag alone, whatever comes between; a closing tag without an opening one ends a reasoning that began
    before the text. Reasoning that does not end holds no answer, and neither does the text before it. Labels separate
    where a text begins with one for reasoning and continues to one for the answer.

    Args:
        text: Output of a model, including the special tokens that are tags.
        opened: Tag that the prompt opened (see `left_open`); "" if none, or if unknown.

    Raises:
        ValueError: `opened` is no tag that opens reasoning.
    """
    scan = _scanned(text, opened)
    if scan.inside is not None:
        nothing = (len(text), len(text))
        return Separated(text, nothing, nothing, finished=False, reasoned=True, until=len(text))
    spoken = [(start, end) for start, end in scan.outside if not text[start:end].isspace() and start < end]
    start, until = (spoken or scan.outside)[-1]
    end, reasoned = until, scan.reasoned
    while (labelled := _LABELLED.match(text, start, end)) is not None:
        start, reasoned = labelled.end(), True
    if reasoned:
        start += len(text[start:end]) - len(text[start:end].lstrip())
        ends = _TURN_ENDS.search(text, start, end)
        end = end if ends is None else ends.start()
    if until < len(text):
        end = start + len(text[start:end].rstrip())
    return Separated(text, (start, end), _unwrapped(text, start, end), finished=True, reasoned=reasoned, until=until)


def left_open(text: str) -> str:
    """Return the reasoning tag that a text opens and does not close, as written there; "" if there is none."""
    return _scanned(text, "").opened


def expect_opening(tag: str) -> None:
    """Check that a text is a tag that opens reasoning.

    Raises:
        ValueError: It is none; the message lists those made of words.
    """
    if _opening(tag) is None:
        known = ", ".join(tags.tokens[0] for tags in REASONING)
        raise ValueError(f"expected a tag that opens reasoning ({known}, ...), got {tag!r}")


def tokens_among(special: Collection[str], kinds: Collection[Tags]) -> frozenset[str]:
    """Return which of a tokenizer's special tokens form tags, and so must be kept where others are dropped.

    Args:
        special: Texts of the special tokens.
        kinds: `REASONING` or `ANSWER`.
    """
    known = {*special}
    # One token of a pair alone is another family's token for something else.
    return frozenset(token for tags in kinds if known.issuperset(tags.tokens) for token in tags.tokens)


@cache
def _opening(tag: str) -> int | None:
    found = _TAGS.fullmatch(tag)
    name = "" if found is None else found.lastgroup or ""
    return int(name[1:]) if name.startswith("o") else None


def _scanned(text: str, opened: str) -> _Scan:
    if opened:
        expect_opening(opened)
    inside, reasoned = _opening(opened) if opened else None, bool(opened)
    outside: list[Span] = []
    start = 0
    for match in _TAGS.finditer(text):
        kind, tags = (match.lastgroup or "")[0], int((match.lastgroup or "")[1:])
        if kind == "o" and inside is None:
            outside.append((start, match.start()))
            inside, opened, reasoned = tags, match.group(), True
        elif kind == "c" and inside in (None, tags):
            # A tag without an opening began before the text: all of it so far is reasoning.
            outside = [] if inside is None else outside
            inside, opened, start, reasoned = None, "", match.end(), True
    return _Scan(inside, opened, (*outside, (start, len(text))), reasoned)


def _unwrapped(text: str, start: int, end: int) -> Span:
    """Return the content of the first tags of an answer, and of tags within them."""
    while (box := _BOXES.search(text, start, end)) is not None:
        closed = _CLOSED_BOX[int((box.lastgroup or "")[1:])].search(text, box.end(), end)
        start, end = box.end(), end if closed is None else closed.start()
    return start, end
