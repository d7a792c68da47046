"""What of a model's text is reasoning and what is its answer.

A model that reasons first writes its reasoning between tags, and its answer behind them. Which tags is a matter of the
family; a chat template may open one itself, and then the text holds only what closes it. Some write labels instead
("Thought: ... Answer: ..."), and some answer first and reason then. This is the one place that knows the tags: whatever
reads an answer, be it a box, a word, a caption, a statement or the probability of a token, asks here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import NamedTuple

REMEDY = "which is no answer: give it room with --gen_kwargs max_new_tokens=2048"
Span = tuple[int, int]


class Tags(NamedTuple):
    """What stands around a part of a text.

    Attributes:
        opening: regular expression, without groups.
        closing: likewise.
        tokens: the tokens that the tags are made of, where a family has tokens for them.
        source: where they come from.
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
    """A text in parts, which together are the whole of it.

    Attributes:
        text: all of it.
        said: (start, end) of what is no reasoning: what follows it or, where nothing does, what stands in front of it;
            empty, at the end, where reasoning does not end.
        answer: (start, end) of the answer proper within it: what its own tags enclose where it has some.
        finished: whether reasoning, if there was some, came to its end.
        reasoned: whether there was reasoning, be it empty.
        until: where reasoning begins behind what is said; the end of the text where none does.
    """

    text: str
    said: Span
    answer: Span
    finished: bool
    reasoned: bool
    until: int

    @property
    def reasoning_text(self) -> str:
        """What stands in front of the answer, and what reasoning behind it, tags included; "" without reasoning."""
        return self.text[: self.said[0]] + self.text[self.until :]

    @property
    def said_text(self) -> str:
        """What is no reasoning."""
        return self.text[slice(*self.said)]

    @property
    def answer_text(self) -> str:
        """The answer proper."""
        return self.text[slice(*self.answer)]


class _Scan(NamedTuple):
    """What tags make of a text.

    Attributes:
        inside: index in `REASONING` of what is open at the end; None if nothing is.
        opened: the tag that opened it.
        outside: (start, end) of what stands outside of reasoning, in order; the last goes to the end of the text.
        reasoned: whether there was a tag.
    """

    inside: int | None
    opened: str
    outside: tuple[Span, ...]
    reasoned: bool


def separate(text: str, opened: str = "") -> Separated:
    """Separate reasoning from answer.

    The answer is what follows the last reasoning or, where nothing does, what was said last before it. What opens is
    closed by its own tag alone, whatever stands between; a tag that closes what nobody opened ends a reasoning that
    began before the text. Reasoning that does not end holds no answer, and neither does what a model wrote before it.
    Labels separate where a text begins with one for reasoning and goes on to one for the answer.

    Args:
        text: what a model wrote, its special tokens included where tags are some.
        opened: the tag that the prompt opened (see `left_open`); "" if none, or nobody knows.

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
    """Return the tag of a reasoning that a text opens and does not close, as written there; "" if there is none."""
    return _scanned(text, "").opened


def expect_opening(tag: str) -> None:
    """Check that a text is a tag that opens reasoning.

    Raises:
        ValueError: it is none; lists those of words.
    """
    if _opening(tag) is None:
        known = ", ".join(tags.tokens[0] for tags in REASONING)
        raise ValueError(f"expected a tag that opens reasoning ({known}, ...), got {tag!r}")


def tokens_among(special: Collection[str], kinds: Collection[Tags]) -> frozenset[str]:
    """Return which of a tokenizer's special tokens make tags, and so are to be kept where others are dropped.

    Args:
        special: texts of the special tokens.
        kinds: `REASONING` or `ANSWER`.
    """
    known = {*special}
    # One of a pair alone is another family's token for something else.
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
            # What nobody opened began before the text: all of it so far is reasoning.
            outside = [] if inside is None else outside
            inside, opened, start, reasoned = None, "", match.end(), True
    return _Scan(inside, opened, (*outside, (start, len(text))), reasoned)


def _unwrapped(text: str, start: int, end: int) -> Span:
    """Return what the first tags of an answer enclose, and those within them."""
    while (box := _BOXES.search(text, start, end)) is not None:
        closed = _CLOSED_BOX[int((box.lastgroup or "")[1:])].search(text, box.end(), end)
        start, end = box.end(), end if closed is None else closed.start()
    return start, end
