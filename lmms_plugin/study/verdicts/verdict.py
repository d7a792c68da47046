"""An analysis in words and tables: differences that were shown, equivalences that were shown, and open questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.analysis.findings import EQUIVALENT, LOST, OPEN, REVERSE, RIGHT, SHOWN, finding, p_text, points
from lmms_plugin.metrics.paired import Difference
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.verdicts.arms import UNTOUCHED
from lmms_plugin.study.verdicts.conclusions import Conclusion
from lmms_plugin.study.verdicts.contrasts import Analysis, Contrast, ContrastRow, analyse
from lmms_plugin.utils.messages import counted

NOT_JUDGED = "not judged (broken)"


class Words(NamedTuple):
    """Wording of the findings about one number; `{by}` is the difference, `{within}` the margin.

    Attributes:
        shown: Wording where the first arm has more.
        reverse: Wording where it has less.
        equivalent: Wording where the difference lies within the margin.
        open: Wording where neither a difference nor its absence was shown.
    """

    shown: str
    reverse: str
    equivalent: str
    open: str


UNDER_SHIFT = Words(
    "{first} is more often right than {second} on shifted images, {by}",
    "{first} is less often right than {second} on shifted images, {by}",
    "{first} and {second} are equally often right on shifted images, within {within} ({by})",
    "no difference on shifted images between {first} and {second} was shown, nor that there is none ({by})",
)
INTERACTION = Words(
    "{first} loses less than {second} from clean to shifted images, {by}",
    "{first} loses more than {second} from clean to shifted images, {by}",
    "both lose equally much from clean to shifted images, within {within} ({by})",
    "whether one of them loses more from clean to shifted images was not shown ({by})",
)


def conclude(study: Path, question: MethodByShift, only: Collection[str] | None, workers: int) -> list[Conclusion]:
    """Answer a question from a study's finished cells, in words and tables, for each of its models.

    Raises:
        ValueError: As `analyse`.
    """
    return [
        Conclusion(
            f"{question.question} {one.model}",
            sentences(one),
            findings(one),
            tables(one),
            [legend(question)],
            one,
        )
        for one in analyse(study, question, only, workers=workers)
    ]


def sentences(found: Analysis) -> list[str]:
    """Return the verdict: for each pair of arms, which is right more often under shift, why, and on what data."""
    return [*_answers(found), _scope(found)]


def findings(found: Analysis) -> list[str]:
    """Return the findings behind the verdict, contrast by contrast."""
    return [f"{one.bits} bits: {_told(one, found)}.{_warning(one, found)}" for one in found.contrasts]


def tables(found: Analysis) -> list[dict[str, Any]]:
    """Return tables as {"title", "columns", "rows"}, all cells text."""
    severities = sorted({severity for one in found.contrasts for severity in one.by_severity})
    return [
        {
            "title": f"{found.model}: arms compared, accuracy in points",
            "columns": [
                "bits",
                "first",
                "second",
                "clean",
                "under shift",
                "p (Holm)",
                "interaction",
                "p (Holm)",
                "finding of the interaction",
                *(f"severity {severity}" for severity in severities),
                "retained",
                "ECE interaction",
            ],
            "rows": [_contrast_row(one, found, severities) for one in found.contrasts],
        },
        {
            "title": f"{found.model}: every method and source of calibration data",
            "columns": [
                "bits",
                "method",
                "calibration",
                "seeds",
                "clean",
                "shifted",
                "sd of seeds",
                "more lost under shift than by the unquantized model",
                "ECE clean",
                "ECE shifted",
                "lost / won clean",
                "lost / won shifted",
                "shifted answers with a box",
            ],
            "rows": [_row(row) for row in sorted(found.rows, key=_order)],
        },
    ]


def legend(question: MethodByShift) -> str:
    """Return the explanation of the tables."""
    return (
        "Differences in points of accuracy, first arm less second, with"
        f" {100 * question.level:g} % intervals. Interaction: what the first keeps more from clean to shifted"
        " data, difference under shift less difference on clean data; by severity: the same with the shifted tasks of"
        " that severity alone. Retained: difference of shifted ÷ clean accuracy. ECE interaction: above 0 where the"
        " first becomes less calibrated under shift than the second. p adjusted by Holm over all rows of the table, for"
        " each question. Lost / won: answers that were right, or wrong, without quantization and are not any more, in"
        " points."
    )


def _answers(found: Analysis) -> list[str]:
    """Return one line for each pair: accuracy under shift with its bits, then the loss from clean to shifted data.

    The loss is left out where an arm is broken, since it means nothing there.
    """
    lines = []
    for pair in found.question.contrasts:
        of_pair = [one for one in found.contrasts if (one.first, one.second) == pair]
        under_shift = _at(of_pair, _under_shift, RIGHT, found)
        told = [
            f"{found.model}, {pair[0]} against {pair[1]} on shifted images: {under_shift}.",
            f"From clean to shifted images it {_at(of_pair, _robustness, LOST, found)}.",
        ]
        broken = [one for one in of_pair if one.broken]
        if len(broken) == len(of_pair):
            told.pop()
        told += [
            f"At {one.bits} bits {_keep(one.broken)} less than half of the unquantized model's clean accuracy:"
            " robustness is not judged there."
            for one in broken
        ]
        lines.append(" ".join(told))
    return lines


def _at(
    contrasts: Sequence[Contrast],
    judge: Callable[[Contrast, Analysis], str],
    words: Mapping[str, str],
    found: Analysis,
) -> str:
    """Return each finding in words with the bits at which it was made."""
    told = []
    for kind, said in words.items():
        same = [f"{one.bits} bits" for one in contrasts if judge(one, found) == kind]
        if same:
            told.append(f"{said} at {_listed(same)}")
    return "; ".join(told)


def _under_shift(one: Contrast, found: Analysis) -> str:
    return finding(one.under_shift, one.p_under_shift, found.question.level)


def _robustness(one: Contrast, found: Analysis) -> str:
    if one.broken:
        return NOT_JUDGED
    return finding(one.interaction, one.p_interaction, found.question.level)


def _keep(arms: Sequence[str]) -> str:
    return f"{_listed(arms)} {'keep' if len(arms) > 1 else 'keeps'}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _scope(found: Analysis) -> str:
    question = found.question
    size = f"{counted(found.documents[question.clean], 'document')} of {counted(found.images, 'image')}"
    limited = "" if found.limit is None else f" (limited to the first {found.limit:g} of each task)"
    tasks = ", ".join(question.shifted)
    return (
        f"{size}{limited}; clean: {question.clean}; shifted, mean of: {tasks}."
        f" {100 * question.level:g} % intervals over images and calibration seeds; equivalent means within"
        f" ±{_points(question.margin, signed=False)} points."
    )


def _told(one: Contrast, found: Analysis) -> str:
    level = found.question.level
    told = []
    judged = [(UNDER_SHIFT, one.under_shift, one.p_under_shift)]
    if not one.broken:
        judged.append((INTERACTION, one.interaction, one.p_interaction))
    for words, difference, p in judged:
        kinds = {SHOWN: words.shown, REVERSE: words.reverse, EQUIVALENT: words.equivalent, OPEN: words.open}
        told.append(
            kinds[finding(difference, p, level)].format(
                first=one.first,
                second=one.second,
                by=f"by {points(difference)} points, p {p_text(p)}",
                within=f"±{_points(found.question.margin, signed=False)} points",
            )
        )
    return "; ".join(told)


def _warning(one: Contrast, found: Analysis) -> str:
    if not one.broken:
        return ""
    return (
        f" Beware: {_keep(one.broken)} less than half of the unquantized model's clean accuracy; what is lost already"
        " on clean images cannot be lost again under shift, so robustness is not judged (interaction"
        f" {points(one.interaction)} points, p {p_text(one.p_interaction)})."
    )


def _contrast_row(one: Contrast, found: Analysis, severities: Sequence[int]) -> list[str]:
    by_severity: Mapping[int, Difference] = one.by_severity
    return [
        str(one.bits),
        one.first,
        one.second,
        points(one.clean),
        points(one.under_shift),
        p_text(one.p_under_shift),
        points(one.interaction),
        p_text(one.p_interaction),
        _robustness(one, found),
        *(points(by_severity[severity]) if severity in by_severity else "" for severity in severities),
        points(one.retained),
        points(one.calibration_error),
    ]


def _row(row: ContrastRow) -> list[str]:
    return [
        "" if row.bits is None or row.method == UNTOUCHED else str(row.bits),
        row.method,
        row.calibration or "",
        str(row.seeds),
        f"{row.clean:.3f}",
        f"{row.shifted:.3f}",
        _number(row.spread),
        "" if row.lost_more is None else points(row.lost_more),
        _number(row.ece_clean),
        _number(row.ece_shifted),
        _flips(row.flips_clean),
        _flips(row.flips_shifted),
        f"{row.parsed:.3f}",
    ]


def _order(row: ContrastRow) -> tuple[int, str, str]:
    return -(row.bits or 0), row.method, row.calibration or ""


def _points(value: float, *, signed: bool = True) -> str:
    return f"{100 * value:+.1f}" if signed else f"{100 * value:g}"


def _flips(shares: tuple[float, float] | None) -> str:
    return "" if shares is None else f"{100 * shares[0]:.1f} / {100 * shares[1]:.1f}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
