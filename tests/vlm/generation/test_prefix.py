import json
import shutil
import sys
import weakref

import pytest
import torch
from helpers.families import FAMILIES
from helpers.prefix import (
    IMAGES,
    LOGPROB,
    QUESTIONS,
    Documents,
    answers,
    ask,
    assert_equal,
    calls,
    instance,
    load,
    log,
    plainly,
)
from lmms_eval.api.instance import Instance

from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.processes.out_of_memory import OutOfMemory
from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.generation.prefix import VERIFIED_ROWS, PrefixSharing
from lmms_plugin.vlm.running.batching import Budget, Limits
from lmms_plugin.vlm.running.scheduling import Schedule

PLAIN = ("paligemma", "gemma3")
SHARING = tuple(family for family in FAMILIES if family not in PLAIN)


@pytest.fixture(scope="module", params=SHARING)
def vlm(request, checkpoint):
    return load(checkpoint(request.param))


@pytest.fixture(scope="module")
def smolvlm(checkpoint):
    return load(checkpoint("smolvlm"))


class TestFamiliesThatShare:
    @pytest.mark.parametrize("batch_size", [1, 2, None], ids=lambda size: f"batch_size={size}")
    def test_answers_are_those_of_the_plain_way(self, vlm, batch_size):
        with plainly(vlm):
            expected = answers(vlm)
        assert_equal(answers(vlm, batch_size), expected)
        assert vlm.responder.engine.runner.sharing.off is None
        assert vlm.responder.engine.runner.sharing.verified

    def test_an_image_is_encoded_once(self, vlm):
        answers(vlm)
        with calls(vlm) as seen:
            answers(vlm)
        assert sorted(seen) == sorted([(1, True), (4, False), (1, True), (1, True), (3, False)])

    def test_the_processor_sees_an_image_once(self, vlm, monkeypatch):
        """The other questions' tokens are put together from text; the first of a group proves that right.

        Once more for the first image of a size, to count its tokens.
        """
        answers(vlm)
        kind = type(vlm.chat.processor.image_processor)
        shown, original = [], kind.preprocess

        def preprocess(self, *args, **kwargs):
            shown.append(args)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "preprocess", preprocess)
        answers(vlm)
        assert len(shown) == len(IMAGES) + len({image.size for image in IMAGES})

    def test_a_group_too_large_for_memory_is_answered_in_parts(self, vlm):
        answers(vlm)
        with plainly(vlm):
            expected = answers(vlm)
        with calls(vlm) as seen:
            assert_equal(answers(vlm, 3, cache_bytes=1), expected)
        assert sorted(seen) == sorted([(2, True), (1, True), *[(1, False)] * 7])

    def test_choices_score_the_same(self, vlm):
        requests = choices()
        vlm.responder.engine.runner.budget = Budget.of(1, None)
        with plainly(vlm):
            expected = vlm.scores(requests)
        with calls(vlm) as seen:
            scores = vlm.scores(requests)
        assert (8, False) in seen
        for one, other in zip(scores, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=LOGPROB)
            assert one.is_greedy == other.is_greedy


def choices(texts=(" yes", " no, it is not")):
    def show(doc):
        return [IMAGES[doc[0]]]

    metadata = {"task": "toy", "doc_id": 0, "repeats": 1}
    return [
        Instance("loglikelihood", (f"Is it {QUESTIONS[i][1]}?", text, show, i, "toy", "test"), 0, metadata=metadata)
        for i in range(len(QUESTIONS))
        for text in texts
    ]


class TestFamiliesThatCannot:
    @pytest.mark.parametrize(
        ("family", "reason"),
        [("paligemma", "its attention looks ahead"), ("gemma3", "some layers see the last 64 only")],
    )
    def test_they_take_the_plain_way_and_say_so_once(self, checkpoint, family, reason):
        vlm = load(checkpoint(family))
        with log("INFO") as lines:
            found = answers(vlm, 2, max_new_tokens=24)
            answers(vlm, 2, max_new_tokens=24)
        assert len([line for line in lines if reason in line]) == 1
        assert not [line for line in lines if line.startswith("WARNING") and "encoding of the image" in line]
        assert_equal(found, answers(load(checkpoint(family), share_prefix=False), max_new_tokens=24))


class TestWindows:
    @pytest.fixture(scope="class")
    def wide(self, checkpoint, tmp_path_factory):
        """A Gemma 3 whose window holds prompts and short answers."""
        folder = tmp_path_factory.mktemp("wide") / "gemma3"
        shutil.copytree(checkpoint("gemma3"), folder)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["sliding_window"] = 512
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def test_gemma3_shares_where_its_window_holds_prompt_and_answer(self, wide):
        vlm = load(wide)
        with plainly(vlm):
            expected = answers(vlm)
        with calls(vlm) as seen:
            assert_equal(answers(vlm, 3), expected)
        assert (7, False) in seen

    def test_choices_take_no_more_of_the_window_than_they_are_long(self, wide):
        vlm = load(wide)
        vlm.responder.engine.runner.budget = Budget.of(1, None)
        with calls(vlm) as seen:
            vlm.scores(choices())
        assert (8, False) in seen

    def test_room_is_left_for_choices_whose_length_is_not_known(self, wide):
        vlm = load(wide)
        vlm.responder.engine.runner.budget = Budget.of(1, None)
        with log("INFO") as lines, calls(vlm) as seen:
            vlm.scores(choices([lambda doc: " yes", lambda doc: " no"]))
        assert {with_image for _, with_image in seen} == {True}
        assert [line for line in lines if "see the last 512 only" in line]


class TestOneModel:
    def test_it_can_be_switched_off(self, checkpoint, smolvlm):
        vlm = load(checkpoint("smolvlm"), share_prefix=False)
        with calls(vlm) as seen:
            assert_equal(answers(vlm), answers(smolvlm))
        assert seen == [(1, True)] * len(QUESTIONS)

    def test_without_a_hint_of_the_dataset_the_pixels_decide(self, smolvlm):
        hinted = smolvlm.task_dict
        expected = answers(smolvlm)
        # The first batch of several images is compared with each alone.
        answers(smolvlm, None)
        smolvlm.task_dict = {"toy": {"test": list(QUESTIONS)}}
        try:
            with calls(smolvlm) as seen:
                assert_equal(answers(smolvlm, None), expected)
        finally:
            smolvlm.task_dict = hinted
        assert sorted(seen) == [(1, True), (2, True), (7, False)]

    @pytest.mark.parametrize(
        ("family", "placeholder"), [("smolvlm", "<image>"), ("qwen2_5_vl", "<|image_pad|>"), ("llava", "<image>")]
    )
    def test_a_question_with_a_placeholder_in_it_is_refused_as_ever(self, checkpoint, family, placeholder):
        questions = [(0, "dog"), (0, "cat"), (1, "dog"), (1, f"what {placeholder} means")]
        for share in (False, True):
            vlm = load(checkpoint(family), questions[:3], share_prefix=share)
            answers(vlm)
            assert vlm.responder.engine.runner.sharing.verified == share
            vlm.task_dict = {"toy": {"test": Documents(questions)}}
            with pytest.raises(RequestError, match=r"document 3: .* refuses this"):
                answers(vlm)

    def test_images_that_only_share_a_name_are_told_apart(self, checkpoint, smolvlm):
        class Misled(Documents):
            def image_key(self, index):
                return "all the same"

        expected = answers(smolvlm)
        hinted = smolvlm.task_dict
        smolvlm.task_dict = {"toy": {"test": Misled(QUESTIONS)}}
        try:
            assert_equal(answers(smolvlm), expected)
        finally:
            smolvlm.task_dict = hinted

    def test_lengths_count_every_image_whatever_was_read_before(self, smolvlm):
        schedule = Schedule(smolvlm.chat, smolvlm.reader, smolvlm.responder.engine.runner.budget, lambda: True)
        for shown in (IMAGES[:2], IMAGES[:1], IMAGES[1:2], IMAGES[1::-1], IMAGES, IMAGES[:2], []):
            for text in ("Where is it?", "And now?"):
                content = [*({"type": "image", "url": one} for one in shown), {"type": "text", "text": text}]
                prompt = smolvlm.reader.read([{"role": "user", "content": content}], "a prompt")
                assert schedule.length_of(prompt) == smolvlm.chat.encode([prompt]).inputs["input_ids"].shape[1]

    def test_what_is_drawn_is_the_same(self, smolvlm):
        options = {"temperature": 1.0, "do_sample": True}
        with plainly(smolvlm):
            expected = answers(smolvlm, **options)
        assert_equal(answers(smolvlm, **options), expected)

    def test_plain_requests_share_too(self, smolvlm):
        def without_box(doc):
            return ask(doc, with_box=False)

        with plainly(smolvlm):
            expected = answers(smolvlm, messages=without_box)
        with calls(smolvlm) as seen:
            assert answers(smolvlm, messages=without_box) == expected
        assert (4, False) in seen

    def test_an_image_behind_the_question_is_not_shared(self, checkpoint):
        def image_last(doc):
            user, *_ = ask(doc, with_box=False)
            return [{**user, "content": user["content"][::-1]}]

        vlm = load(checkpoint("qwen2_5_vl"))
        with plainly(vlm):
            expected = answers(vlm, messages=image_last)
        with log("INFO") as lines, calls(vlm) as seen:
            assert answers(vlm, messages=image_last) == expected
        assert len([line for line in lines if "differ before the image ends" in line]) == 1
        assert {images for _, images in seen} == {True}

    def test_one_group_that_cannot_share_takes_nothing_from_its_batch(self, checkpoint):
        def sometimes_last(doc):
            user, *_ = ask(doc, with_box=False)
            return [{**user, "content": user["content"][:: -1 if doc[0] == 1 else 1]}]

        questions = [(shown, word) for shown in range(3) for word in ("dog", "cat", "a bird")]
        vlm = load(checkpoint("qwen2_5_vl"), questions)
        with plainly(vlm):
            expected = answers(vlm, messages=sometimes_last)
        limits = Budget.of(3, None).limits
        with calls(vlm) as seen:
            assert answers(vlm, 3, messages=sometimes_last) == expected
        assert vlm.responder.engine.runner.sharing.verified
        assert vlm.responder.engine.runner.budget.limits == limits
        answered = [call for call in seen if call != (1, True)]
        assert sum(rows for rows, with_image in answered if not with_image) >= 6

    def test_questions_that_cannot_share_keep_the_limit_of_tokens(self, checkpoint):
        def image_last(doc):
            user, *_ = ask(doc, with_box=False)
            return [{**user, "content": user["content"][::-1]}]

        vlm = load(checkpoint("qwen2_5_vl"), [(0, word) for word in "abcdef"])
        with plainly(vlm):
            expected = answers(vlm, messages=image_last)
        vlm.responder.engine.runner.budget = Budget(Limits(8, 1), 2**30, automatic=True, growing=False)
        requests = [instance(i, image_last) for i in range(6)]
        with calls(vlm) as seen:
            assert vlm.generate_until(requests) == expected
        assert seen == [(1, True)] * 6

    def test_keys_and_values_are_gone_when_their_group_is_done(self, smolvlm, monkeypatch):
        answers(smolvlm)
        made, alive, original = [], [], PrefixSharing.expanded

        def watched(self, *args):
            alive.append(sum(reference() is not None for reference in made))
            expanded = original(self, *args)
            made.append(weakref.ref(expanded))
            return expanded

        monkeypatch.setattr(PrefixSharing, "expanded", watched)
        answers(smolvlm, cache_bytes=1)
        assert len(made) == 7
        assert set(alive) == {0}
        assert not any(reference() for reference in made)


class TestSomethingWrong:
    def test_a_mismatch_falls_back_loudly(self, checkpoint, monkeypatch):
        original = PrefixSharing.expanded

        def distorted(self, *args):
            expanded = original(self, *args)
            for layer in expanded.layers:
                layer.values *= -1
            return expanded

        vlm = load(checkpoint("smolvlm"))
        with plainly(vlm):
            expected = answers(vlm)
        monkeypatch.setattr(PrefixSharing, "expanded", distorted)
        with log("WARNING") as lines:
            assert_equal(answers(vlm, 2), expected)
        (line,) = lines
        assert "token 1," in line
        assert "tolerance 0.001" in line
        assert line.count("log-probability") == 1
        with log("WARNING") as lines, calls(vlm) as seen:
            answers(vlm)
        assert lines == []
        assert seen == [(1, True)] * len(QUESTIONS)

    def test_decoding_is_compared_where_answers_are_one_token_long(self, checkpoint, monkeypatch):
        def misplaced(self, *args):
            for rows, inputs in original(self, *args):
                for module in self.decoder.model.modules():
                    if isinstance(getattr(module, "rope_deltas", None), torch.Tensor):
                        module.rope_deltas = module.rope_deltas + 40
                yield rows, inputs
                del inputs

        original = PrefixSharing.parts
        monkeypatch.setattr(PrefixSharing, "parts", misplaced)
        vlm = load(checkpoint("qwen2_5_vl"))
        with log("WARNING") as lines:
            answers(vlm, max_new_tokens=1)
        assert len([line for line in lines if "are not those of the plain way" in line]) == 1

    @pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
    def test_in_bfloat16_values_a_tenth_too_small_are_told_from_rounding(self, checkpoint, monkeypatch, family):
        def scaled(self, *args):
            expanded = original(self, *args)
            for layer in expanded.layers:
                layer.values *= 0.9
            return expanded

        original = PrefixSharing.expanded
        right = load(checkpoint(family), dtype="bfloat16")
        answers(right)
        assert right.responder.engine.runner.sharing.off is None
        monkeypatch.setattr(PrefixSharing, "expanded", scaled)
        wrong = load(checkpoint(family), dtype="bfloat16")
        answers(wrong)
        assert "log-probability" in wrong.responder.engine.runner.sharing.off

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_another_image_is_a_mismatch_and_no_looking_ahead(self, checkpoint, monkeypatch, dtype):
        def swapped(self, cache, owners, *more):
            return original(self, cache, (owners + 1) % len(cache.layers[0].keys), *more)

        original = PrefixSharing.expanded
        monkeypatch.setattr(PrefixSharing, "expanded", swapped)
        vlm = load(checkpoint("smolvlm"), dtype=dtype)
        with log("INFO") as lines:
            answers(vlm, 3)
        assert vlm.responder.engine.runner.sharing.off is not None
        assert [line for line in lines if line.startswith("WARNING") and "keys of the prefix differ" in line]
        assert not [line for line in lines if "looks ahead" in line]

    @pytest.mark.parametrize("error", [ValueError, KeyError, AttributeError, AssertionError, FloatingPointError])
    def test_a_model_that_refuses_a_prefix_gets_plain_requests(self, checkpoint, monkeypatch, error):
        vlm = load(checkpoint("smolvlm"))
        with plainly(vlm):
            expected = answers(vlm)
        original = vlm.model.generate

        def generate(*args, **kwargs):
            if "pixel_values" not in kwargs:
                raise error("images are required")
            return original(*args, **kwargs)

        monkeypatch.setattr(vlm.model, "generate", generate)
        with log("WARNING") as lines:
            assert_equal(answers(vlm), expected)
        (line,) = lines
        assert "cannot go on from a given prefix" in line

    @pytest.mark.parametrize("batch_size", [None, 8], ids=["auto", "8"])
    def test_out_of_memory_loses_no_answer(self, smolvlm, monkeypatch, batch_size):
        expected = answers(smolvlm)
        original = type(smolvlm.responder.engine.decoder).generate

        def generate(self, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2:
                raise OutOfMemory("no room")
            return original(self, inputs, *args, **kwargs)

        monkeypatch.setattr(type(smolvlm.responder.engine.decoder), "generate", generate)
        with log("WARNING") as lines:
            assert_equal(answers(smolvlm, batch_size), expected)
        assert lines
        assert all("smaller batches" in line for line in lines)

    @pytest.mark.parametrize("verified", [False, True], ids=["first batch", "later batch"])
    def test_copies_of_a_prefix_that_do_not_fit_lose_no_answer(self, checkpoint, smolvlm, monkeypatch, verified):
        def expanded(self, cache, owners, *more):
            if len(owners) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(self, cache, owners, *more)

        expected, original = answers(smolvlm), PrefixSharing.expanded
        vlm = load(checkpoint("smolvlm"))
        if verified:
            answers(vlm)
        monkeypatch.setattr(PrefixSharing, "expanded", expanded)
        with log("WARNING") as lines:
            assert_equal(answers(vlm, 8), expected)
        assert vlm.responder.engine.runner.sharing.off is None
        assert [line for line in lines if "smaller batches" in line]

    def test_images_that_do_not_fit_lose_no_answer(self, smolvlm, monkeypatch):
        def to(self, *args, **kwargs):
            # (images of a batch, tiles, channels, height, width)
            if self.ndim == 5 and len(self) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(self, *args, **kwargs)

        expected, original = answers(smolvlm), torch.Tensor.to
        monkeypatch.setattr(torch.Tensor, "to", to)
        assert_equal(answers(smolvlm, 8), expected)
        assert smolvlm.responder.engine.runner.sharing.off is None

    def test_comparing_takes_no_more_images_at_once_than_the_batch_size(self, checkpoint):
        vlm = load(checkpoint("smolvlm"), [(0, word) for word in "abcdefghijkl"])
        with calls(vlm) as seen:
            answers(vlm, 1)
        assert vlm.responder.engine.runner.sharing.verified
        assert seen == [*[(1, True)] * VERIFIED_ROWS, (1, True), (VERIFIED_ROWS, False), (1, True), (12, False)]

    def test_where_comparing_does_not_fit_it_goes_one_by_one(self, checkpoint, monkeypatch):
        def generate(*args, **kwargs):
            if "pixel_values" in kwargs and len(kwargs["input_ids"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(*args, **kwargs)

        vlm = load(checkpoint("smolvlm"), [(0, word) for word in "abcdefghijkl"])
        original = vlm.model.generate
        monkeypatch.setattr(vlm.model, "generate", generate)
        with calls(vlm) as seen:
            answers(vlm, 8)
        assert vlm.responder.engine.runner.sharing.verified
        assert (12, False) in seen

    def test_activations_of_8_bits_are_given_their_rounding(self, checkpoint):
        vlm = models.QuantRtn(
            pretrained=str(checkpoint("smolvlm")), device="cpu", bits=8, group_size=32, act_bits=8, dtype="float32"
        )
        vlm.task_dict = {"toy": {"test": Documents(QUESTIONS)}}
        answers(vlm)
        assert vlm.responder.engine.runner.sharing.verified
        assert vlm.responder.engine.runner.sharing.off is None

    def test_comparing_keeps_the_limit_of_tokens_too(self, checkpoint, monkeypatch):
        vlm = load(checkpoint("smolvlm"), [(0, word) for word in "abcdefghijkl"])
        monkeypatch.setattr("lmms_plugin.vlm.running.batching.FIRST_LIMITS", Limits(8, 1))
        with calls(vlm) as seen:
            answers(vlm, None)
        assert {rows for rows, with_image in seen if with_image} == {1}

    def test_a_batch_size_that_was_asked_for_is_not_changed_behind_the_back(self, smolvlm, monkeypatch):
        def generate(self, inputs, *args, **kwargs):
            raise OutOfMemory("no room")

        monkeypatch.setattr(type(smolvlm.responder.engine.decoder), "generate", generate)
        with pytest.raises(OutOfMemory), plainly(smolvlm):
            answers(smolvlm, 8)

    def test_an_exception_on_a_thread_names_its_document(self, smolvlm):
        def broken(doc):
            return ask(doc) if doc[1] != "yes" else sys.intern(1)

        with pytest.raises(RequestError, match=r"^task toy, document 7: TypeError: .*"):
            answers(smolvlm, messages=broken)

    def test_a_row_that_cannot_be_read_ends_the_command_in_one_line(self, smolvlm, monkeypatch, capsys):
        def broken(doc):
            if doc[1] == "yes":
                raise DatasetError("testA: row 4: column 'image' is empty")
            return ask(doc)

        monkeypatch.setattr(sys, "argv", ["lmms-eval"])
        with pytest.raises(SystemExit) as ended:
            answers(smolvlm, messages=broken)
        assert ended.value.code == 2
        told = (
            "lmms-plugin: task toy, document 7: testA: row 4: column 'image' is empty (--verbosity DEBUG shows where)"
        )
        assert capsys.readouterr().err.splitlines()[-1] == told


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "smolvlm"])
def test_a_static_cache_gives_the_same_answers_without_sharing(checkpoint, family):
    vlm = load(checkpoint(family), static_cache=True)
    with calls(vlm) as seen:
        found = answers(vlm, 2)
    assert all(with_image for _, with_image in seen)
    assert_equal(found, answers(load(checkpoint(family), share_prefix=False), 2))
