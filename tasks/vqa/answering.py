"""Visual question answering with confidence as lmms-eval functions: document → messages, answer → record → metric.

One document is one question (`lmms_plugin.tasks.vqa.questions`). The outcome of every metric is the soft VQA accuracy
of the answer, a fraction in [0, 1]; risk is 1 − accuracy. Metrics are those of the part `test`; thresholds are chosen
on the part `val`, and both parts are answered in the same run.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lmms_plugin.confidence.agreement import Agreement
from lmms_plugin.confidence.departure import departure
from lmms_plugin.confidence.estimators import LEARNED, NEEDS, TEXT_ESTIMATORS, Evidence, coordinate_mask, estimate_all
from lmms_plugin.metrics.selective import HELD_OUT, REPORTED
from lmms_plugin.protocol.response import Response
from lmms_plugin.protocol.verbalised import stated_confidence
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.vqa.accuracy import normalise, vqa_accuracy
from lmms_plugin.tasks.vqa.aggregations import BESIDE, NEEDS_HELD_OUT, ON_TEST, VqaOutcome
from lmms_plugin.tasks.vqa.datasets import SOURCES

doc_to_visual = comprehension.doc_to_visual
unfinished = comprehension.unfinished


def doc_to_text(doc: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> str:
    """Return the question, followed by the task's or else the dataset's request for a short answer."""
    words = task or {}
    post_prompt = words.get("post_prompt", SOURCES[doc["dataset"]].post_prompt)
    return f"{words.get('pre_prompt', '')}{doc['question']}{post_prompt}"


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """Return the answer that most people gave; among equals the first."""
    answers: list[str] = doc["answers"]
    return max(answers, key=answers.count)


def doc_to_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return one user turn: image and question.

    The extra key `log_probabilities` tells a model of this package to return them with the answer; other models never
    see it.
    """
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "url": doc_to_visual(doc, lmms_eval_specific_kwargs)[0]},
                {"type": "text", "text": doc_to_text(doc, lmms_eval_specific_kwargs)},
            ],
            "log_probabilities": True,
        }
    ]


def process_results(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """Score one answer.

    Args:
        doc: Document of `QuestionDocs`.
        results: Model's answer, with or without the trailer of `lmms_plugin.protocol.response`.
        estimator: Confidence estimator, of `TEXT_ESTIMATORS`, whose value the metrics use.

    Returns:
        One entry per metric that the document counts for. The entry of `accuracy` is the whole record, which thereby
        reaches the log of samples, for every document. Records of the part `val` have no `score`, so that lmms-eval's
        standard errors leave them out. Without a trailer (a model of another package) there is no confidence: the
        answer counts as one without confidence in `confidence_rate`, and all metrics of confidence are absent, not
        zero. Reasoning is not part of the answer. An answer that ends inside its reasoning is empty, has accuracy 0 and
        no confidence, and counts in `unfinished_rate`.

    Raises:
        ValueError: The model returns log-probabilities, but not what `estimator` needs; says how to obtain it.
    """
    response = Response.decode(results[0])
    identity = {"image": doc["image_id"], "id": doc["question_id"]}
    finished = response.parts.finished
    accuracy = vqa_accuracy(response.answer, doc["answers"]) if finished else 0.0
    verbatim = vqa_accuracy(response.answer, doc["answers"], verbatim_if_unanimous=True) if finished else 0.0
    estimates = _estimates(evidence := _evidence(response), response, estimator)
    confidences = {name: value for name, value in estimates.items() if finished and not math.isnan(value)}
    record: dict[str, Any] = {
        **identity,
        "part": doc["part"],
        "accuracy": accuracy,
        "accuracy_reliable_vqa": verbatim,
        "question": doc["question"],
        "answer": response.answer,
        "answers": doc["answers"],
        # Every estimate of an empty answer is missing, and recorded as missing.
        "confidence": confidences if finished else dict.fromkeys(estimates),
        **comprehension.reasoned(response),
        **({} if finished else {"unfinished": True}),
    }
    output: dict[str, Any] = {"accuracy": record}
    confidence = confidences.get(estimator)
    if doc["part"] != HELD_OUT:
        record["score"] = accuracy
        output |= {name: {"score": value, **identity} for name, value in _rates(confidence, finished, verbatim).items()}
    output |= _of_confidence(confidences, confidence, doc["part"], accuracy) | _of_reference(response, doc, record)
    if evidence is not None and evidence.stated is not None:
        record["statement"] = response.statement
        if doc["part"] == REPORTED:
            output["verbalised_rate"] = {"score": float(not math.isnan(evidence.stated)), **identity}
    return output


def _estimates(evidence: Evidence | None, response: Response, estimator: str) -> dict[str, float]:
    """Return all confidences; empty without evidence, refused if the requested one is not among them."""
    found = {} if evidence is None else estimate_all(evidence, TEXT_ESTIMATORS) | dict(response.confidence)
    if found:
        comprehension.of(estimator, found)
    return found


def _of_reference(response: Response, doc: Mapping[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Record the distance from a reference, and return the entries of its metrics; empty without one."""
    if response.forced is None:
        return {}
    reference, _ = response.of_reference
    score = vqa_accuracy(reference.answer, doc["answers"]) if reference.parts.finished else 0.0
    apart = departure(response)
    record["reference"] = {"score": score, **apart}
    if doc["part"] == HELD_OUT:
        return {}
    identity = {"image": doc["image_id"], "id": doc["question_id"]}
    found: dict[str, Any] = {name: {"score": value, **identity} for name, value in apart.items()}
    return found | comprehension.flips_entry(
        doc["question_id"], apart.get("kl"), score >= comprehension.RIGHT, record["accuracy"] >= comprehension.RIGHT
    )


def _rates(confidence: float | None, finished: bool, verbatim: float) -> dict[str, float]:
    known = {"confidence_rate": float(confidence is not None), "unfinished_rate": float(not finished)}
    return {"accuracy_reliable_vqa": verbatim, **known}


def _of_confidence(
    confidences: Mapping[str, float], confidence: float | None, part: str, accuracy: float
) -> dict[str, VqaOutcome]:
    """Return the entries of metrics of confidence: by the task's estimator, and by those that need more evidence."""
    found: dict[str, VqaOutcome] = {}
    if confidence is not None:
        scored = VqaOutcome(part, confidence, accuracy)
        found |= dict.fromkeys(ON_TEST, scored) if part == REPORTED else {}
        found |= dict.fromkeys(NEEDS_HELD_OUT, scored) if part in (HELD_OUT, REPORTED) else {}
    for beside in confidences.keys() & {*LEARNED, *NEEDS} if part == REPORTED else ():
        found |= {f"{name}_{beside}": VqaOutcome(part, confidences[beside], accuracy) for name in BESIDE}
    return found


def _evidence(response: Response) -> Evidence | None:
    """Return the evidence for an answer's confidence; None without tokens."""
    if not response.tokens:
        return None
    tokens, start = response.spoken
    first, last = response.parts.answer
    answer = response.answer
    words = (first + len(answer) - len(answer.lstrip()) - start, last - len(answer) + len(answer.rstrip()) - start)
    return Evidence(
        logprobs=[token.logprob for token in tokens],
        selected=coordinate_mask([token.text for token in tokens], [words] if words[0] < words[1] else []),
        agreement=_agreement(response),
        stated=None if response.stated is None else stated_confidence(response.stated),
    )


def _agreement(response: Response) -> Agreement | None:
    """Return 1 for samples that equal the answer after the score's normalisation, else 0; an empty one is skipped."""
    if response.sampled is None:
        return None
    sampled = [normalise(sample or "") or None for sample in response.sampled]
    return Agreement.of(normalise(response.answer) or None, sampled, lambda a, b: float(a == b))


# Functions for a task's YAML; one for every name in `TEXT_ESTIMATORS`.
scored_by_joint = partial(process_results, estimator="joint")
scored_by_mean = partial(process_results, estimator="mean")
scored_by_min = partial(process_results, estimator="min")
scored_by_first = partial(process_results, estimator="first")
scored_by_word_joint = partial(process_results, estimator="word_joint")
scored_by_word_mean = partial(process_results, estimator="word_mean")
scored_by_word_min = partial(process_results, estimator="word_min")
scored_by_word_first = partial(process_results, estimator="word_first")
scored_by_agreement = partial(process_results, estimator="agreement")
scored_by_agreement_pairwise = partial(process_results, estimator="agreement_pairwise")
scored_by_verbalised = partial(process_results, estimator="verbalised")
