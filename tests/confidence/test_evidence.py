"""What our models bring along for confidence: other digits, sampled answers, and their own word."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_plugin.demo import DATA
from lmms_plugin.protocol.response import Response
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.contracts.requests import read
from lmms_plugin.vlm.contracts.settings import GenerationSettings, Sampling
from lmms_plugin.vlm.generation.number_tokens import LEAST, DigitRecorder, NumberTokens
from lmms_plugin.vlm.running.batching import Budget

OPTIONS = {"max_new_tokens": 24, "temperature": 0, "until": []}


def load(path="demo", **arguments):
    return models.QuantNone(pretrained=str(path), device="cpu", **arguments).make_ready()


def instance(ask, index, options=OPTIONS):
    metadata = {"task": "toy", "doc_id": index, "repeats": 1}
    return Instance("generate_until", ("", ask, options, index, "toy", "test"), 0, metadata=metadata)


def answer(vlm, documents, ask, *, batch_size=1, indices=None, options=OPTIONS):
    vlm.task_dict = {"toy": {"test": documents}}
    vlm.responder.engine.runner.budget = Budget.of(batch_size, None)
    indices = range(len(documents)) if indices is None else indices
    requests = [instance(ask, index, options) for index in indices]
    return [Response.decode(text) for text in vlm.generate_until(requests)]


@pytest.fixture(scope="module")
def documents():
    import datasets

    return ExpressionDocs(datasets.load_dataset(DATA, split="test").select(range(2)))


@pytest.fixture(scope="module")
def demo():
    return load(samples=3, sample_temperature=1.5)


@pytest.fixture(scope="module")
def answers(demo, documents):
    return answer(demo, documents, comprehension.doc_to_messages)


class Vocabulary:
    """A tokenizer with just what is asked of one here."""

    def __init__(self, *texts):
        self.texts = texts

    def get_vocab(self):
        return {f"{index}:{text}": index for index, text in enumerate(self.texts) if any(c.isdecimal() for c in text)}

    def decode(self, ids, **_):
        return "".join(self.texts[index] for index in ids)


def recorded(vocabulary, probabilities, *chosen):
    recorder = DigitRecorder(NumberTokens(vocabulary))
    logits = torch.tensor([probabilities]).log() + 3.0
    for token in chosen:
        recorder.note(logits, logits.logsumexp(1), torch.tensor([token]))
    return recorder.alternatives()


class TestDigits:
    def test_tokens_stand_for_one_another_where_the_text_around_their_digits_is_the_same(self):
        vocabulary = Vocabulary("a", "7", "42", "<loc0007>", "<loc0042>", "7", "1-2", ",")
        (row,) = recorded(vocabulary, [0.1, 0.2, 0.3, 0.1, 0.05, 0.05, 0.1, 0.1], 1, 2, 3, 0, 6)
        assert row[0] == row[1]
        assert row[0].probabilities == pytest.approx({"42": 0.3, "7": 0.25})
        assert row[0].unlisted == pytest.approx(0.0, abs=1e-6)
        assert row[2].probabilities == pytest.approx({"0007": 0.1, "0042": 0.05})
        assert row[3:] == [None, None]

    def test_unlikely_ones_go_unlisted_and_are_not_lost(self):
        rest = LEAST / 2
        (row,) = recorded(Vocabulary("1", "2", "3"), [1 - 2 * rest, rest, rest], 0)
        assert row[0].probabilities == pytest.approx({"1": 1.0}, abs=1e-4)
        assert row[0].unlisted == pytest.approx(2 * rest, rel=0.05)

    def test_a_vocabulary_without_digits_records_nothing(self):
        assert recorded(Vocabulary("a", "b"), [0.5, 0.5], 0) is None

    @torch.inference_mode()
    def test_they_are_those_of_a_teacher_forced_pass(self, demo, documents, answers):
        prompt = demo.reader.read(comprehension.doc_to_messages(documents[0]), "toy")
        inputs = demo.chat.encode([prompt]).inputs
        length = inputs["input_ids"].shape[1]
        ids = demo.chat.ids(answers[0].text)
        whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
        more = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        probabilities = demo.model(**more).logits[0, length - 1 : -1].softmax(1)
        tokens = [token for token in answers[0].tokens if token.text]
        assert [token.text for token in tokens] == [demo.chat.tokenizer.decode([i]) for i in ids]
        for token, row in zip(tokens, probabilities, strict=True):
            if not token.text.isdecimal():
                assert token.alternatives is None
                continue
            expected = {str(d): float(row[demo.chat.ids(str(d))[0]]) for d in range(10)}
            listed = token.alternatives.probabilities
            assert listed == pytest.approx({d: expected[d] for d in listed}, abs=2e-5)
            assert sum(expected[d] for d in expected.keys() - listed) == pytest.approx(
                token.alternatives.unlisted, abs=2e-5
            )

    def test_nothing_is_recorded_unless_the_task_asks(self, demo, documents):
        def without(doc, **_):
            (message,) = comprehension.doc_to_messages(doc)
            return [{**message, "grounding": {k: v for k, v in message["grounding"].items() if k != "digits"}}]

        (found,) = answer(demo, documents, without, indices=[0])
        assert not found.records_digits
        assert all(token.alternatives is None for token in found.tokens)


class TestSamples:
    def test_they_are_as_many_as_asked_for_and_differ(self, answers):
        assert all(len(found.samples) == 3 for found in answers)
        assert any(len(set(found.samples)) > 1 for found in answers)

    @pytest.mark.parametrize("share", [True, False], ids=["shared prefix", "plain"])
    def test_they_depend_neither_on_the_batch_nor_on_how_the_image_is_encoded(self, share, demo, documents, answers):
        vlm = demo if share else load(samples=3, sample_temperature=1.5, share_prefix=False)
        again = answer(vlm, documents, comprehension.doc_to_messages, batch_size=4, indices=range(len(documents))[::-1])
        assert [found.samples for found in again[::-1]] == [found.samples for found in answers]
        assert [found.text for found in again[::-1]] == [found.text for found in answers]
        assert (vlm.responder.engine.runner.sharing.off is None) == share

    def test_at_a_low_temperature_they_are_the_greedy_answer(self, documents):
        vlm = load(samples=2, sample_temperature=1e-3)
        for found in answer(vlm, documents, comprehension.doc_to_messages, indices=[0, 1]):
            assert found.samples == (found.text, found.text)

    def test_another_seed_draws_others(self, documents, answers):
        vlm = load(samples=3, sample_temperature=1.5, seed=1)
        again = answer(vlm, documents, comprehension.doc_to_messages)
        assert [found.text for found in again] == [found.text for found in answers]
        assert [found.samples for found in again] != [found.samples for found in answers]

    def test_they_are_what_a_plain_sampling_run_draws(self, demo, documents, answers):
        prompt = demo.reader.read(comprehension.doc_to_messages(documents[0]), "toy")
        inputs = demo.chat.encode([prompt]).inputs
        settings = replace(GenerationSettings.from_kwargs(OPTIONS), sampling=Sampling(1.5))
        (request,) = read([instance(comprehension.doc_to_messages, 0)], {"toy": {"test": documents}})
        for sample, text in enumerate(answers[0].samples):
            (drawn,) = demo.responder.engine.decoder.generate(inputs, settings, [request.seed(0, sample)])
            assert "".join(token.text for token in drawn.tokens) == text

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "paligemma"])
    def test_other_families_sample_the_same_over_a_shared_prefix(self, family, checkpoint):
        # Three-dimensional positions; a model whose attention looks ahead and that may not share.
        shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
        wish = {"original_size": [120, 90], "digits": True}

        def ask(doc, **_):
            content = [{"type": "image", "url": shown}, {"type": "text", "text": "?"}]
            return [{"role": "user", "content": content, "grounding": {**wish, "expression": doc}}]

        found = [
            answer(
                load(checkpoint(family), samples=2, share_prefix=share),
                ["dog", "red circle"],
                ask,
                options={**OPTIONS, "max_new_tokens": 6},
            )
            for share in (True, False)
        ]
        assert [one.samples for one in found[0]] == [one.samples for one in found[1]]

    def test_questions_that_want_no_confidence_get_none(self, demo, documents):
        def plain(doc, **_):
            (message,) = comprehension.doc_to_messages(doc)
            return [{key: value for key, value in message.items() if key != "grounding"}]

        (found,) = answer(demo, documents, plain, indices=[0])
        assert found == Response(found.text)


class TestStatements:
    def test_a_second_turn_follows_the_answer(self, checkpoint, documents):
        def ask(doc, **_):
            (message,) = comprehension.doc_to_messages(doc)
            return [{**message, "grounding": None, "log_probabilities": True}]

        vlm = load(checkpoint("qwen2_5_vl"), verbalised=True)
        (found,) = answer(vlm, documents, ask, indices=[0], options={**OPTIONS, "max_new_tokens": 4})
        (message,) = ask(documents[0])
        turns = [
            {"role": "assistant", "content": [{"type": "text", "text": found.text}]},
            {"role": "user", "content": [{"type": "text", "text": vlm.dialect.confidence_prompt}]},
        ]
        prompt = vlm.reader.read([{**message, "log_probabilities": False}, *turns], "toy")
        (expected,) = vlm.responder.engine.decoder.generate(
            vlm.chat.encode([prompt]).inputs, GenerationSettings(max_new_tokens=4)
        )
        assert found.statement == expected.text

    def test_without_a_chat_template_there_is_no_second_turn(self, checkpoint):
        with pytest.raises(ValueError, match="knows no second turn"):
            load(checkpoint("paligemma"), verbalised=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 1}, "samples must be 0 or at least 2"),
        ({"samples": -2}, "samples must be 0 or at least 2"),
        ({"samples": 2, "sample_temperature": 0}, "sample_temperature must be above 0"),
    ],
)
def test_impossible_wishes_are_errors_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        load("nowhere", **arguments)
