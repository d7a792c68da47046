"""VQA accuracy of an answer against those of several people (Antol et al., ICCV 2015).

An answer is worth min(1, matches / 3) against all people but one, averaged over who is left out. Answers are compared
after the normalisation of the standalone evaluator of Reliable VQA (Whitehead et al., ECCV 2022, `eval_scripts` of
facebookresearch/reliable_vqa), which is that of the VQA challenge: punctuation, lower case, number words as digits, no
articles, apostrophes put back into contractions.
"""

import re
from collections.abc import Sequence

_MARKS = '()[]{}<>/\\"`,;?!@+-=_'
"""What separates words or stands around them. The full stop and the apostrophe have rules of their own."""
_GAP = re.compile(f"[ {re.escape(_MARKS)}]+")
_FULL_STOP = re.compile(r"\.(?!\d)")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = frozenset({"a", "an", "the"})

# Each of these words gets one lost apostrophe back, and no other word does: which are known is the challenge's choice.
_ENDINGS = {
    "n't": "ai are ca could did do does had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
}
_OTHERS = "'twas 'ow's'at ma'am o'clock y'all y'all'll y'all'd've"


def _contractions() -> dict[str, str]:
    """A word that lost one of its apostrophes → the word."""
    words = [stem + ending for ending, stems in _ENDINGS.items() for stem in stems.split()]
    lost = {
        word[:place] + word[place + 1 :]: word
        for word in (*words, *_OTHERS.split())
        for place, letter in enumerate(word)
        if letter == "'"
    }
    # The challenge's own slip, kept because it decides scores.
    return lost | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def _parted(gap: re.Match[str]) -> str:
    """What comes of spaces and marks that stand together: nothing in a number, else a space, or a lone mark itself.

    A lone mark parts letters (`red,white`) and falls away around a word (`(no)`); in `7-up` it stays.
    """
    text, marks = gap.string, gap.group()
    before, after = text[max(gap.start() - 1, 0) : gap.start()], text[gap.end() : gap.end() + 1]
    if not marks.strip(",") and before.isdecimal() and after.isdecimal():
        return ""
    if len(marks) > 1 or marks == " ":
        return " "
    beside = before + after
    parts = beside.isalpha() if before and after else beside.isalnum()
    return " " if parts and beside.isascii() else marks


def normalise(answer: str) -> str:
    """Bring an answer to the form in which answers are compared."""
    text = _GAP.sub(_parted, _one_line(answer))
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, given: Sequence[str], *, verbatim_if_unanimous: bool = False) -> float:
    """Accuracy of an answer against those that people gave.

    Args:
        answer: the model's answer, without special tokens.
        given: what people answered, one entry per person, at least two; ten in VQAv2, AdVQA and VizWiz.
        verbatim_if_unanimous: False compares normalised answers always, as the VQA challenge's server and lmms-eval do.
            True is what the standalone evaluator of Reliable VQA does: where all people gave the same answer, it
            compares letter by letter, so that "Yes" or "yes." is wrong if all said "yes". Its models chose from a list
            of lower-case answers; for one that writes freely this measures capitals and full stops.

    Returns:
        A fraction in [0, 1]; for ten people 0, 0.3, 0.6, 0.9 or 1 with 0, 1, 2, 3 or more of them agreeing.

    Raises:
        ValueError: fewer than two people answered.
    """
    if len(given) < 2:
        raise ValueError(f"expected the answers of at least two people, got {list(given)}")
    people = [_one_line(text) for text in given]
    if verbatim_if_unanimous and len(set(people)) == 1:
        matches = people.count(_one_line(answer))
    else:
        matches = [normalise(text) for text in people].count(normalise(answer))
    if matches == 0:
        return 0.0
    others = len(people) - matches
    return (matches * min(matches - 1, 3) + others * min(matches, 3)) / (3 * len(people))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
