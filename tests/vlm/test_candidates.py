"""Candidates scored as answers: against a plain forward pass, and with LLaVA-1.5, whose prompt is that of the paper."""

import pytest
import torch
from helpers.candidates import TEXTS, request
from helpers.prefix import IMAGES, QUESTIONS, calls, load, plainly
from transformers import AutoModelForImageTextToText

from lmms_plugin.protocol.dialects import Frame
from lmms_plugin.protocol.plain_prompts import SHORT_ANSWER
from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import Response


@pytest.fixture(scope="module", params=["llava", "blip2_opt", "blip2_t5"])
def vlm(request, checkpoint):
    return load(checkpoint(request.param))


def scores(vlm, indices=(0, 1)):
    return [Response.decode(answer).scores for answer in vlm.generate_until([request(i) for i in indices])]


def forward(vlm, index, text):
    """Log-probability of a text behind the prompt, and its number of tokens, from one forward pass of transformers."""
    model = AutoModelForImageTextToText.from_pretrained(vlm.arguments.pretrained).eval()
    prompt = vlm.reader.read(request(index).args[1](None), "toy")
    inputs = vlm.chat.encode([prompt]).inputs
    ids = vlm.chat.continuation_ids(prompt, int(inputs["input_ids"][0, -1]), f" {text}")
    given = torch.tensor([ids])
    if vlm.responder.engine.decoder.answers_apart:
        start = torch.tensor([[model.config.text_config.decoder_start_token_id]])
        inputs["decoder_input_ids"] = torch.cat([start, given[:, :-1]], dim=1)
        begin = 0
    else:
        begin = inputs["input_ids"].shape[1] - 1
        inputs["input_ids"] = torch.cat([inputs["input_ids"], given], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = model(**inputs).logits[0, begin : begin + len(ids)]
    return logits.log_softmax(-1).gather(1, given.T).sum().item(), len(ids)


def test_a_score_is_the_log_probability_of_the_text_as_the_answer(vlm):
    for index, found in enumerate(scores(vlm)):
        for column, text in enumerate(TEXTS):
            total, tokens = forward(vlm, index, text)
            assert found["logprob"][column] == pytest.approx(total, abs=1e-3)
            assert found["tokens"][column] == tokens


def test_an_image_is_encoded_once_for_all_candidates_where_that_can_be(vlm):
    shared = scores(vlm)
    with plainly(vlm):
        for one, other in zip(shared, scores(vlm), strict=True):
            assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
    with calls(vlm) as seen:
        scores(vlm)
    # One run per image; without sharing there is one per candidate.
    images = sum(rows for rows, with_image in seen if with_image)
    assert images == (2 * len(TEXTS) if vlm.responder.engine.decoder.answers_apart else 2)


def test_answers_and_scores_may_come_in_one_call(vlm):
    written = request(0)
    written.arguments = (*written.arguments[:2], {"max_new_tokens": 4}, *written.arguments[3:])
    answer, scored, again = vlm.generate_until([written, request(1), written])
    assert answer == again
    assert "<|lmms_plugin|>" not in answer
    assert Response.decode(scored).scores["logprob"] == pytest.approx(scores(vlm)[1]["logprob"], abs=1e-4)


def test_a_request_without_candidates_is_refused(vlm):
    with pytest.raises(RequestError, match="expected one message with a list of texts under 'candidates'"):
        vlm.generate_until([request(0, texts=[])])


def test_llava_reads_the_prompt_of_its_paper(checkpoint):
    """The one that arXiv 2601.15287 asks it with, by the checkpoint's own template; boxes refer to a padded square."""
    vlm = load(checkpoint("llava"))
    content = [{"type": "image", "url": IMAGES[0]}, {"type": "text", "text": f"{QUESTIONS[0][1]}?{SHORT_ANSWER}"}]
    prompt = vlm.reader.read([{"role": "user", "content": content}], "toy")
    assert vlm.chat.text_of(prompt) == f"USER: <image>\n{QUESTIONS[0][1]}?{SHORT_ANSWER} ASSISTANT:"
    assert vlm.dialect.name == "llava"
    assert vlm.dialect.frame is Frame.PADDED
