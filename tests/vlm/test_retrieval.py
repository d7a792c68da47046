"""Retrieval checkpoints against transformers' own forward pass, pair by pair."""

import pytest
import torch
from helpers.candidates import TEXTS, request
from helpers.prefix import IMAGES, QUESTIONS, Documents, load
from transformers import Blip2ForImageTextRetrieval

from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import Response
from lmms_plugin.quant_backends.structure.components import components
from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.retrieval import cleaned


@pytest.fixture(scope="module")
def vlm(checkpoint):
    return load(checkpoint("blip2_itm"))


@pytest.fixture(scope="module")
def responses(vlm):
    return [Response.decode(answer) for answer in vlm.generate_until([request(i) for i in range(3)])]


def test_scores_are_those_of_transformers(vlm, responses):
    model = Blip2ForImageTextRetrieval.from_pretrained(vlm.arguments.pretrained).eval()
    for image, response in zip(IMAGES, responses, strict=True):
        for column, text in enumerate(TEXTS):
            inputs = vlm.chat.processor(images=image, text=cleaned(text), return_tensors="pt")
            with torch.no_grad():
                matched = model(**inputs, use_image_text_matching_head=True).logits_per_image
                similar = model(**inputs, use_image_text_matching_head=False).logits_per_image
            assert response.scores["itm"][column] == pytest.approx(matched[0, 1].item(), abs=1e-4)
            assert response.scores["itc"][column] == pytest.approx(similar.item(), abs=1e-5)


def test_only_near_pairs_are_shown_to_the_matching_head(vlm, responses, monkeypatch):
    monkeypatch.setattr(vlm.responder.matcher, "nearest", 1)
    similarity = torch.tensor([response.scores["itc"] for response in responses])
    found = [Response.decode(answer) for answer in vlm.generate_until([request(i) for i in range(3)])]
    for row, response in enumerate(found):
        for column, logit in enumerate(response.scores["itm"]):
            near = similarity[row].argmax() == column or similarity[:, column].argmax() == row
            assert (logit is not None) == near
            assert logit is None or logit == pytest.approx(responses[row].scores["itm"][column], abs=1e-5)


def test_components_and_bits(checkpoint, vlm):
    by_part = {}
    for name, component in components(vlm.model).items():
        by_part.setdefault(name.partition(".")[0], set()).add(component)
    heads = {"vision_projection": {"head"}, "text_projection": {"head"}, "itm_head": {"head"}}
    assert by_part == {"vision_model": {"vision"}, "qformer": {"connector"}, **heads}
    arguments = {"bits": 16, "vision_bits": 8, "connector_bits": 4, "group_size": 32, "device": "cpu"}
    quantized = models.QuantRtn(pretrained=str(checkpoint("blip2_itm")), **arguments)
    bits = {module.component: module.bits for module in quantized.report.modules if module.bits is not None}
    assert bits == {"vision": 8, "connector": 4}
    quantized.task_dict = {"toy": {"test": Documents(QUESTIONS)}}
    assert len(Response.decode(quantized.generate_until([request(0)])[0]).scores["itm"]) == len(TEXTS)


def test_it_writes_nothing_and_is_not_calibrated_with_answers(vlm, checkpoint):
    plain = request(0)
    plain.arguments = (*plain.arguments[:2], {}, *plain.arguments[3:])
    with pytest.raises(RequestError, match="retrieval checkpoint, which writes nothing"):
        vlm.generate_until([plain])
    with pytest.raises(ValueError, match="awq is calibrated with answers"):
        models.QuantAwq(pretrained=str(checkpoint("blip2_itm")), language_bits=16, vision_bits=4, device="cpu")


def test_captions_are_cleaned_as_the_authors_do():
    assert cleaned('Two  "Dogs" (brown) run.') == "two dogs brown run"
    assert len(cleaned("word " * 80).split()) == 50
