"""BLIP-2, which has no chat template, a Q-Former, and a language model that generates on its own."""

from contextlib import contextmanager

import pytest
from helpers.families import WITHOUT_BOXES
from helpers.prefix import IMAGES, QUESTIONS, answers, assert_equal, calls, instance, load, plainly
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_plugin.protocol.plain_prompts import CAPTION_REQUESTS, TEMPLATES
from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import Response
from lmms_plugin.quant_backends.structure.components import components
from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.contracts.settings import GenerationSettings


def ask(doc, wanted=True):
    content = [{"type": "image", "url": IMAGES[doc[0]]}, {"type": "text", "text": doc[1]}]
    return [{"role": "user", "content": content, "log_probabilities": wanted}]


@pytest.fixture(scope="module", params=WITHOUT_BOXES)
def vlm(request, checkpoint):
    return load(checkpoint(request.param))


@pytest.fixture(scope="module")
def opt(checkpoint):
    return load(checkpoint("blip2_opt"))


@pytest.mark.parametrize(
    ("request_text", "read"),
    [
        (
            "What is shown?\nAnswer the question using a single word or phrase.",
            "Question: What is shown? Short answer:",
        ),
        ("Is it a dog?", "Question: Is it a dog? Short answer:"),
        *((request, "a photo of") for request in sorted(CAPTION_REQUESTS)),
    ],
)
def test_requests_are_put_in_the_words_of_the_family(request_text, read):
    assert TEMPLATES["Blip2Processor"].write(request_text) == read


def test_answers_are_those_of_transformers_alone(vlm, checkpoint):
    path = vlm.arguments.pretrained
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    for (image, question), ours in zip(QUESTIONS[:4], answers(vlm, messages=ask), strict=False):
        text = f"Question: {question} Short answer:"
        inputs = processor(images=IMAGES[image], text=text, return_tensors="pt")
        given = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, eos_token_id=list(vlm.responder.engine.decoder.ends)
        )
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        ids = [token for token in given[0, start:].tolist() if token not in vlm.responder.engine.decoder.special]
        assert Response.decode(ours).text == processor.tokenizer.decode(ids)


@contextmanager
def in_float64(vlm):
    """Random weights magnify rounding, most of all those of T5, whose attention is not scaled."""
    vlm.model.double()
    try:
        yield
    finally:
        vlm.model.float()


def test_answers_depend_neither_on_their_batch_nor_on_sharing(vlm):
    with in_float64(vlm):
        with plainly(vlm):
            expected = answers(vlm, messages=ask)
            assert_equal(answers(vlm, 4, messages=ask), expected)
        assert_equal(answers(vlm, 2, messages=ask), expected)


def test_the_image_is_shared_or_it_is_said_why_not(vlm, checkpoint):
    answers(vlm, messages=ask)
    with calls(vlm) as seen:
        answers(vlm, messages=ask)
    if vlm.responder.engine.runner.sharing.off is not None:
        reason = "encoder-decoder" if vlm.responder.engine.decoder.answers_apart else "Q-Former reads the question"
        assert reason in vlm.responder.engine.runner.sharing.off
        assert seen == [(1, True)] * len(QUESTIONS)
    else:
        assert vlm.arguments.pretrained == str(checkpoint("blip2_opt"))
        assert vlm.responder.engine.runner.sharing.verified
        # One run per image: the questions go to the language model within.
        assert seen == [(1, True)] * 3


def test_an_answer_scored_has_the_log_probabilities_it_was_generated_with(vlm):
    with plainly(vlm):
        generated = [Response.decode(answer) for answer in answers(vlm, messages=ask)]
        prompts = [vlm.reader.read(ask(doc), "toy") for doc in QUESTIONS]
        for prompt, answer in zip(prompts, generated, strict=True):
            ids = vlm.responder.engine.decoder.generate(
                vlm.chat.encode([prompt]).inputs, GenerationSettings(max_new_tokens=8)
            )[0].ids
            score = vlm.responder.engine.decoder.score(vlm.chat.encode([prompt]).inputs, [ids])[0]
            assert score.is_greedy
            assert score.logprobs == pytest.approx([token.logprob for token in answer.tokens], abs=1e-5)


def test_components_are_vision_tower_connector_and_language_model(vlm):
    by_part = {}
    for name, component in components(vlm.model).items():
        by_part.setdefault(name.partition(".")[0], set()).add(component)
    assert by_part == {
        "vision_model": {"vision"},
        "qformer": {"connector"},
        "language_projection": {"connector"},
        "language_model": {"language", "head"},
    }


@pytest.mark.parametrize(
    ("family", "method", "more"),
    [
        ("blip2_opt", "Gptq", {"calibration_samples": 2}),
        ("blip2_t5", "Awq", {"calibration_samples": 2}),
        ("instructblip", "Rtn", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_component_is_quantized_as_asked(family, method, more, checkpoint):
    bits = {"bits": 4, "vision_bits": 8, "connector_bits": 3, "group_size": 32}
    vlm = getattr(models, f"Quant{method}")(pretrained=str(checkpoint(family)), device="cpu", **bits, **more)
    bits = {module.component: module.bits for module in vlm.report.modules if module.bits is not None}
    assert bits == {"vision": 8, "connector": 3, "language": 4}
    vlm.task_dict = {"toy": {"test": QUESTIONS}}
    assert len(answers(vlm, messages=ask)) == len(QUESTIONS)


def test_without_an_image_the_language_model_is_asked_alone(opt):
    text_only = [{"role": "user", "content": [{"type": "text", "text": "What is a dog?"}]}]
    opt.task_dict = {"toy": {"test": [0]}}
    (answer,) = opt.generate_until([instance(0, lambda doc: text_only)])
    ids = opt.chat.tokenizer("Question: What is a dog? Short answer:", return_tensors="pt")
    given = opt.model.language_model.generate(
        **ids, max_new_tokens=8, do_sample=False, eos_token_id=list(opt.responder.engine.decoder.ends)
    )
    assert answer == opt.responder.engine.decoder.tokenizer.decode(
        [
            token
            for token in given[0, ids["input_ids"].shape[1] :].tolist()
            if token not in opt.responder.engine.decoder.special
        ]
    )


def test_what_it_cannot_be_shown_is_refused(opt):
    opt.task_dict = {"toy": {"test": [0]}}
    image = {"type": "image", "url": IMAGES[0]}
    two = [{"role": "user", "content": [image, image, {"type": "text", "text": "Alike?"}]}]
    with pytest.raises(RequestError, match="one image, got 2"):
        opt.generate_until([instance(0, lambda doc: two)])
    turns = [*ask(QUESTIONS[0]), {"role": "assistant", "content": "yes"}, *ask(QUESTIONS[0])]
    with pytest.raises(RequestError, match="one turn, got user, assistant, user"):
        opt.generate_until([instance(0, lambda doc: turns)])
    with pytest.raises(ValueError, match="knows no system message"):
        load(opt.arguments.pretrained, system_prompt="Be brief.")
