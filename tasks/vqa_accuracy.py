"""VQA accuracy of an answer against those of several people (Antol et al., ICCV 2015).

An answer is worth min(1, matches / 3) against all people but one, averaged over who is left out. Answers are compared
after the normalisation of the standalone evaluator of Reliable VQA (Whitehead et al., ECCV 2022, `eval_scripts` of
facebookresearch/reliable_vqa), which is that of the VQA challenge: punctuation, lower case, number words as digits, no
articles, apostrophes put back into contractions.
"""

import re
from collections.abc import Sequence

_MARKS = r"\\;/\"`\[\](){}<>@=+_\-,?!"
_LEADING = re.compile(rf"\A[ {_MARKS}]+(?=[a-zA-Z0-9 ])")
_TRAILING = re.compile(rf"(?<=[a-zA-Z0-9 ])[ {_MARKS}]+\Z")
_THOUSANDS = re.compile(r"(?<=\d),+(?=\d)")
_BESIDE_A_GAP = re.compile(rf"(?<=[ {_MARKS}])[{_MARKS}]|[{_MARKS}](?=[ {_MARKS}])")
_SPACES = re.compile(" +")
_BETWEEN_LETTERS = re.compile(rf"(?<=[a-zA-Z])[{_MARKS}](?=[a-zA-Z])")
_FULL_STOP = re.compile(r"\.(?!\d)")

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset({"a", "an", "the"})


def _without_one_apostrophe(words: str) -> dict[str, str]:
    return {word[:i] + word[i + 1 :]: word for word in words.split() for i, letter in enumerate(word) if letter == "'"}


# The challenge's table: each of these words gets one lost apostrophe back, and no other word does.
_CONTRACTIONS = _without_one_apostrophe(
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
) | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """Bring an answer to the form in which answers are compared."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    text = _TRAILING.sub("", _LEADING.sub("", text))
    text = _BESIDE_A_GAP.sub(" ", _THOUSANDS.sub("", text))
    text = _BETWEEN_LETTERS.sub(" ", _SPACES.sub(" ", text))
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


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
