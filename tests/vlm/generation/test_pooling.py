"""Features of real architectures, captured while they answer: what they are, and that nothing else changes."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES
from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import Response
from lmms_plugin.quant_backends.checkpoints.loading import Preparation
from lmms_plugin.selector.features import key, read
from lmms_plugin.selector.network import Selector, SelectorSettings, fit
from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.generation import observer

# Three-dimensional positions; tiles with tokens between; attention that looks ahead and no chat template.
CHOSEN = ("qwen2_5_vl", "idefics3", "paligemma")
QUESTIONS = ((0, "dog"), (1, "red circle"), (0, "the man in the white shirt"), (0, "a"), (1, "a cat"), (2, "x"))
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (90, 70 + 10 * seed)
    )
    for seed in range(3)
]


class Documents(list):
    def image_key(self, index):
        return f"image{self[index][0]}"


def ask(doc, **extra):
    shown, expression = IMAGES[doc[0]], doc[1]
    content = [{"type": "image", "url": shown}, {"type": "text", "text": f"Where is {expression}?"}]
    wish = {"grounding": {"expression": expression, "original_size": list(shown.size)}}
    return [{"role": "user", "content": content, **(extra or wish)}]


def requests(messages=ask, task="toy", **options):
    generation = {"max_new_tokens": 4, "temperature": 0, **options}
    about = [{"task": task, "doc_id": k, "repeats": 1} for k in range(len(QUESTIONS))]
    return [
        Instance("generate_until", ("", messages, generation, k, task, "test"), 0, metadata=metadata)
        for k, metadata in enumerate(about)
    ]


def load(path, backend="QuantNone", **arguments):
    vlm = getattr(models, backend)(pretrained=str(path), device="cpu", **arguments)
    vlm.task_dict = {task: {"test": Documents(QUESTIONS)} for task in ("toy", "other")}
    # What does not fit the model is found when it is loaded.
    return vlm.make_ready()


def by_hand(vlm, doc, layer):
    """Features of one prompt from all hidden states of a plain forward pass."""
    batch = vlm.chat.encode([vlm.reader.read(ask(doc), "toy")])
    ids = batch.inputs["input_ids"][0].tolist()
    with torch.no_grad():
        states = vlm.model(**batch.inputs, output_hidden_states=True).hidden_states[layer][0]
    image = [k for k, token in enumerate(ids) if token == vlm.model.config.image_token_id]
    words = [k for k in range(image[-1] + 1, len(ids)) if ids[k] not in vlm.responder.engine.decoder.special]
    return states[image].amax(0), states[words].amax(0), states[-1]


@pytest.fixture(scope="module", params=CHOSEN)
def family(request):
    return request.param


@pytest.mark.parametrize("layer", [-1, 1])
def test_features_are_those_of_a_plain_forward_pass(family, checkpoint, tmp_path, layer):
    vlm = load(checkpoint(family), features=tmp_path, feature_layer=layer, batch_size=3)
    answers = vlm.generate_until(requests())
    assert (vlm.responder.engine.runner.sharing.off is None) == (family != "paligemma")
    store = read(tmp_path)
    assert set(store.index) == {key("toy", k) for k in range(len(QUESTIONS))}
    assert store.origin.layer == layer
    found = store.features.rows([store.index[key("toy", k)] for k in range(len(QUESTIONS))])
    for k, doc in enumerate(QUESTIONS):
        for part, expected in zip(found[:3], by_hand(vlm, doc, layer), strict=True):
            torch.testing.assert_close(part[k], expected, atol=2e-4, rtol=2e-4)
        logged = math.fsum(token.logprob for token in Response.decode(answers[k]).tokens)
        assert float(found.logprob[k]) == pytest.approx(logged, abs=1e-4)


def test_answers_are_the_same_with_features_and_without(family, checkpoint, tmp_path):
    asked = load(checkpoint(family), features=tmp_path, batch_size=2)
    plain = load(checkpoint(family), batch_size=2)
    assert asked.generate_until(requests()) == plain.generate_until(requests())
    assert plain.responder.engine.observer is None
    # Neither keeps a hook that records; that which numbers tokens by the mask stays on both.
    assert not any(module._forward_hooks for vlm in (asked, plain) for module in vlm.model.modules())
    before = [[len(module._forward_pre_hooks) for module in vlm.model.modules()] for vlm in (asked, plain)]
    assert before[0] == before[1]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in CHOSEN])
def test_every_other_family_has_features_too(family, checkpoint, tmp_path):
    vlm = load(checkpoint(family), features=tmp_path)
    vlm.generate_until(requests()[:2])
    found = read(tmp_path).features
    expected = by_hand(vlm, QUESTIONS[0], -1)
    row = read(tmp_path).index[key("toy", 0)]
    for part, hand in zip(found[:3], expected, strict=True):
        torch.testing.assert_close(part[row], hand, atol=2e-4, rtol=2e-4)


@pytest.fixture(scope="module")
def captured(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    vlm = load(checkpoint("idefics3"), features=folder, batch_size=4)
    vlm.generate_until([*requests(), *requests(task="other")])
    return folder


@pytest.fixture(scope="module")
def selector(captured, tmp_path_factory):
    """A file with a selector for tiny idefics3, trained on images that no test here asks about."""
    store = read(captured)
    file = tmp_path_factory.mktemp("selector") / "selector.safetensors"
    right = [k % 2 for k in range(len(store.index))]
    images = [f"elsewhere{k}" for k in range(len(right))]
    quick = SelectorSettings(hidden=8, epochs=3)
    fit(store.features, right, images, quick, origin=store.origin, predicts="right", data={}).save(file)
    return file


def test_a_selector_answers_beside_the_tokens(checkpoint, captured, selector):
    answers = load(checkpoint("idefics3"), selector=selector, batch_size=2).generate_until(requests())
    store, trained = read(captured), Selector.load(selector)
    for k, answer in enumerate(answers):
        features = store.features.rows([store.index[key("toy", k)]])
        confidence = Response.decode(answer).confidence
        assert list(confidence) == ["selector"]
        assert confidence["selector"] == pytest.approx(trained.confidence(features)[0], abs=1e-4)
    plain = load(checkpoint("idefics3"), batch_size=2).generate_until(requests())
    assert [Response.decode(one).tokens for one in answers] == [Response.decode(one).tokens for one in plain]
    assert all("confidence" not in answer.rpartition("|>")[2] for answer in plain)


def test_only_answers_with_confidence_get_one(checkpoint, selector, tmp_path):
    vlm = load(checkpoint("idefics3"), selector=selector, features=tmp_path)
    (answer,) = vlm.generate_until(requests(lambda doc: ask(doc, log_probabilities=True))[:1])
    assert set(Response.decode(answer).confidence) == {"selector"}
    bare = vlm.generate_until(requests(lambda doc: ask(doc, nothing=True), num_beams=1)[1:2])
    assert Response.decode(bare[0]).tokens == ()
    assert set(read(tmp_path).index) == {key("toy", 0)}
    beams = vlm.generate_until(requests(lambda doc: ask(doc, nothing=True), num_beams=2)[2:3])
    assert isinstance(beams[0], str)


@pytest.mark.parametrize(
    ("backend", "arguments", "named"),
    [
        pytest.param("QuantRtn", {"bits": 4, "group_size": 32}, "method none and rtn", id="method"),
        pytest.param("QuantNone", {"feature_layer": 1}, "feature layer -1 and 1", id="layer"),
    ],
)
def test_what_a_selector_was_not_trained_for_is_refused_before_loading(
    checkpoint, selector, backend, arguments, named, monkeypatch
):
    monkeypatch.setattr(Preparation, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=named):
        load(checkpoint("idefics3"), backend, selector=selector, **arguments)


def test_another_checkpoint_is_refused_and_taken_only_when_told_to(checkpoint, selector, tmp_path):
    from helpers.families import build

    other = build("idefics3", tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"another model .*: model \w{12}… and \w{12}…; selector_transfer=True"):
        load(other, selector=selector)
    answers = load(other, selector=selector, selector_transfer=True).generate_until(requests())
    assert {tuple(Response.decode(answer).confidence) for answer in answers} == {("selector_transferred",)}
    same = load(checkpoint("idefics3"), selector=selector, selector_transfer=True).generate_until(requests()[:1])
    assert tuple(Response.decode(same[0]).confidence) == ("selector",)
    with pytest.raises(ValueError, match=r"selector_transfer says nothing without selector"):
        load(other, selector_transfer=True)


def test_a_quantized_model_is_known_by_all_that_it_depends_on(checkpoint):
    from lmms_plugin.arguments import ModelArguments
    from lmms_plugin.quant_backends import get, option_types

    def known_by(method, **given):
        arguments = ModelArguments.parse(given, option_types(method))
        return observer.quantization(arguments, get(method, **arguments.options))

    assert known_by("awq", bits=3) == known_by("awq", bits=3, calibration="self", batch_size=7, dtype="float32")
    different = [
        known_by("awq", bits=3),
        known_by("awq", bits=4),
        known_by("awq", bits=3, vision_bits=4),
        known_by("awq", bits=3, calibration="noise"),
        known_by("awq", bits=3, seed=1),
        known_by("gptq", bits=3),
        known_by("gptq", bits=3, damping=0.5),
        known_by("rtn", bits=3),
    ]
    assert len({json.dumps(one, sort_keys=True) for one in different}) == len(different)


def test_images_that_were_trained_on_are_refused_before_any_is_answered(checkpoint, captured, tmp_path):
    store = read(captured)
    images = ["image1", *(f"elsewhere{k}" for k in range(1, len(store.index)))]
    right = [k % 2 for k in range(len(images))]
    quick = SelectorSettings(hidden=8, epochs=1)
    fit(store.features, right, images, quick, origin=store.origin, predicts="right", data={}).save(tmp_path / "s")
    vlm = load(checkpoint("idefics3"), selector=tmp_path / "s")
    with pytest.raises(ValueError, match="trained on 1 of the 3 images asked about"):
        vlm.generate_until(requests())
    assert len(vlm.generate_until([requests()[0]])) == 1


def test_a_prompt_without_image_is_named(checkpoint, tmp_path):
    vlm = load(checkpoint("idefics3"), features=tmp_path)
    message = {"role": "user", "content": [{"type": "text", "text": "What?"}], "log_probabilities": True}
    with pytest.raises(RequestError, match="task toy, document 0: features need an image"):
        vlm.generate_until(requests(lambda doc: [message])[:1])


def test_layers_that_do_not_exist_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="feature_layer must be -1 or from 0 to 1 for this model, got 2"):
        load(checkpoint("idefics3"), features=tmp_path, feature_layer=2)
    with pytest.raises(ValueError, match="feature_layer says nothing without"):
        load(checkpoint("idefics3"), feature_layer=1)


def test_the_demo_has_features_of_an_inner_layer(tmp_path):
    vlm = load(CHECKPOINT, features=tmp_path, feature_layer=2, batch_size=3)
    vlm.generate_until(requests())
    found = read(tmp_path).features
    for part, expected in zip(found[:3], by_hand(vlm, QUESTIONS[0], 2), strict=True):
        torch.testing.assert_close(part[read(tmp_path).index[key("toy", 0)]], expected, atol=2e-4, rtol=2e-4)
