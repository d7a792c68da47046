import io
import json
import math

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES, VIDEO_FAMILIES
from helpers.models import DOCUMENTS, OPTIONS, answer, ask_for_box, choice, generation, load, message, photograph
from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_plugin.protocol.dialects import DIALECTS
from lmms_plugin.protocol.prompts import PromptReader, RequestError, pad_to_square
from lmms_plugin.protocol.response import MARKER, Response
from lmms_plugin.quant_backends import get, names
from lmms_plugin.quant_backends.backend import CalibratedBackend
from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.generation.processor import Chat
from lmms_plugin.vlm.running.batching import Budget
from lmms_plugin.vlm.wrapper import QuantizedVLM

CHOICES = ("dog", "man", "white shirt")


def write_multiple_choice_task(folder):
    import datasets

    rows = [{"image": photograph(seed), "choices": list(CHOICES), "answer": seed % 3} for seed in range(4)]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    data.to_parquet(folder / "data.parquet")
    (folder / "show.py").write_text("def images(doc):\n    return [doc['image'].convert('RGB')]\n")
    (folder / "toy.yaml").write_text(
        "{task: toy, dataset_path: parquet, test_split: test, output_type: multiple_choice, doc_to_text: 'Which?',\n"
        f" dataset_kwargs: {{data_files: {{test: {folder / 'data.parquet'}}}}}, doc_to_choice: choices,\n"
        " doc_to_visual: !function show.images, doc_to_target: answer,\n"
        " metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]}\n"
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def vlm(family, checkpoint):
    return load(checkpoint(family))


@pytest.fixture(scope="module")
def smolvlm(checkpoint):
    return load(checkpoint("smolvlm"))


def encoded(vlm, messages):
    prompt = vlm.reader.read(messages, "toy")
    return prompt, vlm.chat.encode([prompt]).inputs


def extended(inputs, ids, family):
    """The inputs of one forward pass over prompt and answer together."""
    length = len(ids)
    more = {key: torch.zeros(1, length, dtype=torch.long) for key in ("token_type_ids", "mm_token_type_ids")}
    # PaliGemma attends in both directions over the prompt, which is type 0, and to the left over the rest.
    more["token_type_ids"] += family == "paligemma"
    more |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, length, dtype=torch.long)}
    return {key: torch.cat([value, more[key]], dim=1) if key in more else value for key, value in inputs.items()}


def teacher_forced(vlm, inputs, ids, family):
    with torch.no_grad():
        logits = vlm.model(**extended(inputs, ids, family)).logits[0].double().log_softmax(-1)
    start = inputs["input_ids"].shape[1] - 1
    return [logits[start + i, token].item() for i, token in enumerate(ids)]


class TestEveryFamily:
    def test_an_answer_does_not_depend_on_its_batch(self, vlm):
        """Text-only, one image, two images, several sizes, boxes: alone, in threes and all at once."""
        alone = [Response.decode(text) for text in answer(vlm)]
        for batch_size in (3, 7):
            together = [Response.decode(text) for text in answer(vlm, batch_size=batch_size)]
            assert [response.text for response in together] == [response.text for response in alone]
            for one, other in zip(alone, together, strict=True):
                assert (one.original_size, one.model_size, one.dialect) == (
                    other.original_size,
                    other.model_size,
                    other.dialect,
                )
                for token, again in zip(one.tokens, other.tokens, strict=True):
                    assert token.logprob == pytest.approx(again.logprob, abs=1e-4)

    def test_answers_depend_on_images_and_words(self, vlm):
        vlm.task_dict = {"toy": {"test": [[message(photograph(seed))] for seed in range(4)]}}
        different = set(answer(vlm, range(4)))
        vlm.task_dict = {"toy": {"test": DOCUMENTS}}
        assert len(different) > 1
        assert answer(vlm, [1]) != answer(vlm, [4])

    def test_log_probabilities_equal_those_of_a_teacher_forced_pass(self, vlm, family):
        response = Response.decode(answer(vlm, [3])[0])
        prompt, inputs = encoded(vlm, DOCUMENTS[3])
        with torch.no_grad():
            ids = vlm.model.generate(
                **inputs, max_new_tokens=8, do_sample=False, eos_token_id=list(vlm.responder.engine.decoder.ends)
            )
        new = ids[0, inputs["input_ids"].shape[1] :].tolist()
        expected = teacher_forced(vlm, inputs, new[: len(response.tokens)], family)
        assert [token.logprob for token in response.tokens] == pytest.approx(expected, abs=1e-4)
        assert prompt.grounding.expression == "the dog"
        assert any(token.text for token in response.tokens)

    def test_a_plain_question_can_ask_for_log_probabilities(self, vlm):
        asked = [{**message, "log_probabilities": True} for message in DOCUMENTS[0]]
        vlm.task_dict = {"toy": {"test": [DOCUMENTS[0], asked]}}
        plain, encoded = answer(vlm, [0, 1])
        vlm.task_dict = {"toy": {"test": DOCUMENTS}}
        response = Response.decode(encoded)
        assert MARKER in encoded
        assert response.text == plain
        assert all(token.logprob <= 0 for token in response.tokens)
        assert response.tokens
        assert response.dialect is None

    def test_a_response_tells_sizes_and_dialect(self, vlm, family):
        response = Response.decode(answer(vlm, [5])[0])
        assert response.original_size == (200, 64)
        assert DIALECTS[response.dialect] == vlm.dialect
        assert vlm.dialect.name == family
        if family.startswith("qwen"):
            width, height = response.model_size
            patch = vlm.chat.processor.image_processor.patch_size
            assert width % (2 * patch) == height % (2 * patch) == 0
            assert width / height == pytest.approx(200 / 64, rel=0.35)
        else:
            assert response.model_size is None

    def test_plain_requests_get_plain_answers(self, vlm):
        assert all(MARKER not in text for text in answer(vlm, [0, 1, 2, 4, 6]))

    def test_both_images_of_a_request_reach_the_model_in_order(self, vlm):
        first, second = photograph(1), photograph(2)
        documents = [
            [message(*images, text="Compare.")] for images in ((first, second), (second, first), (first, first))
        ]
        scores = [encoded_score(vlm, messages) for messages in documents]
        assert len({round(score, 4) for score in scores}) == 3

    def test_a_log_likelihood_is_the_sum_of_a_teacher_forced_pass(self, vlm, family):
        texts = [" the dog", " yes", " a man in the white shirt"]
        vlm.responder.engine.runner.budget = Budget.of(4, None)
        scores = vlm.scores([choice(0, text) for text in texts])
        prompt, inputs = encoded(
            vlm, [message(*[part["url"] for part in DOCUMENTS[0][0]["content"][:-1]], text="Which?")]
        )
        for text, score in zip(texts, scores, strict=True):
            ids = vlm.chat.continuation_ids(prompt, inputs["input_ids"][0, -1].item(), text)
            assert vlm.chat.tokenizer.decode(ids).strip() == text.strip()
            assert score.logprobs == pytest.approx(teacher_forced(vlm, inputs, ids, family), abs=1e-4)

    def test_several_rounds(self, vlm):
        vlm.task_dict = {"toy": {"test": DOCUMENTS[:2]}}
        rounds = vlm.generate_until_multi_round([generation(index, messages=ask_twice) for index in range(2)])
        vlm.task_dict = {"toy": {"test": DOCUMENTS}}
        assert [len(answers) for answers in rounds] == [2, 2]
        for index, (first, second) in enumerate(rounds):
            assert first == answer(vlm, [index])[0]
            assert second == again(vlm, [message(text=f"You said: {first}")])


def encoded_score(vlm, messages):
    vlm.task_dict = {"toy": {"test": [messages]}}
    (score,) = vlm.scores([choice(0, " dog")])
    vlm.task_dict = {"toy": {"test": DOCUMENTS}}
    return score.total


def again(vlm, messages):
    vlm.task_dict = {"toy": {"test": [messages]}}
    (text,) = answer(vlm, [0])
    vlm.task_dict = {"toy": {"test": DOCUMENTS}}
    return text


def ask_twice(doc, *, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx is None:
        return doc
    if round_idx == 2:
        assert previous_round_info == "seen once"
        return None, True, previous_output, None
    return [message(text=f"You said: {previous_output[0]}")], False, previous_output, "seen once"


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    import av

    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(12):
            frame = av.VideoFrame.from_image(photograph(index, (96, 64)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


class TestVideo:
    @pytest.mark.parametrize("family", VIDEO_FAMILIES)
    def test_evenly_spaced_frames_reach_the_model(self, family, checkpoint, video):
        vlm = load(checkpoint(family), max_num_frames=4)
        content = [{"type": "video", "url": str(video)}, {"type": "text", "text": "What happens?"}]
        documents = [[{"role": "user", "content": content}], *DOCUMENTS[:2]]
        vlm.task_dict = {"toy": {"test": documents}}
        alone = answer(vlm, range(3))
        assert alone[0]
        assert alone == answer(vlm, range(3), batch_size=3)
        prompt = vlm.reader.read(documents[0], "toy")
        inputs = vlm.chat.encode([prompt]).inputs
        frames, metadata = vlm.chat.frames(str(video), "toy")
        assert len(frames) == 4
        assert list(metadata.frames_indices) == [0, 4, 7, 11]
        assert any("pixel_values" in key for key in inputs)

    def test_a_model_without_video_says_so(self, checkpoint, video):
        vlm = load(checkpoint("llava"))
        content = [{"type": "video", "url": str(video)}, {"type": "text", "text": "What happens?"}]
        vlm.task_dict = {"toy": {"test": [[{"role": "user", "content": content}]]}}
        with pytest.raises(RequestError, match="task toy, document 0: LlavaProcessor has no way to show a video"):
            answer(vlm, [0])

    def test_a_video_that_cannot_be_read_is_named(self, smolvlm, tmp_path):
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        content = [{"type": "video", "url": str(tmp_path / "broken.mp4")}, {"type": "text", "text": "?"}]
        smolvlm.task_dict = {"toy": {"test": [[{"role": "user", "content": content}]]}}
        with pytest.raises(RequestError, match="task toy, document 0: its video cannot be decoded"):
            answer(smolvlm, [0])


class TestLmmsEvalInterfaces:
    def test_results_come_back_in_the_order_of_the_requests(self, smolvlm):
        smolvlm.task_dict = {"toy": {"test": DOCUMENTS}}
        expected = {length: answer(smolvlm, max_new_tokens=length) for length in (2, 5)}
        mixed = [(index, length) for index in range(7) for length in (5, 2)]
        smolvlm.responder.engine.runner.budget = Budget.of(4, None)
        texts = smolvlm.generate_until(
            [generation(index, {**OPTIONS, "max_new_tokens": length}) for index, length in mixed]
        )
        assert [Response.decode(text).text for text in texts] == [
            Response.decode(expected[length][index]).text for index, length in mixed
        ]

    def test_the_simple_interface_gives_the_same_answer(self, smolvlm):
        smolvlm.task_dict = {"toy": {"test": DOCUMENTS}}
        arguments = ("What is this?", OPTIONS, lambda doc: [doc[0]["content"][0]["url"]], 0, "toy", "test")
        request = Instance("generate_until", arguments, 0, metadata={"task": "toy", "doc_id": 0, "repeats": 1})
        assert smolvlm.generate_until([request]) == answer(smolvlm, [0])

    def test_several_rounds_through_the_simple_interface(self, smolvlm):
        smolvlm.task_dict = {"toy": {"test": DOCUMENTS}}

        def doc_to_text(doc, *, previous_output, round_idx, previous_round_info):
            return None, f"You said: {previous_output[0]}", round_idx == 2, previous_output, None

        arguments = ("What is this?", OPTIONS, lambda doc: [doc[0]["content"][0]["url"]], doc_to_text, 0, "toy", "test")
        metadata = {"task": "toy", "doc_id": 0, "repeats": 1}
        request = Instance("generate_until_multi_round", arguments, 0, metadata=metadata)
        ((first, second),) = smolvlm.generate_until_multi_round([request])
        assert first == answer(smolvlm, [0])[0]
        assert second == again(smolvlm, [message(text=f"You said: {first}")])

    def test_a_choice_gets_a_loss_because_lmms_eval_takes_the_smallest(self, smolvlm):
        """`ConfigurableTask.process_results` of output type multiple_choice decides by argmin."""
        smolvlm.task_dict = {"toy": {"test": DOCUMENTS}}
        requests = [choice(0, text) for text in (" dog", " cat", " yes")]
        totals = [score.total for score in smolvlm.scores(requests)]
        given = [result.text.number for result in smolvlm.loglikelihood(requests)]
        assert given == [-total for total in totals]
        assert np.argmin(given) == np.argmax(totals)

    def test_a_target_gets_its_log_likelihood_for_perplexity(self, smolvlm):
        smolvlm.task_dict = {"toy": {"test": DOCUMENTS}}
        (result,) = smolvlm.loglikelihood([choice(0, lambda doc: " dog")])
        assert result.text.number == smolvlm.scores([choice(0, " dog")])[0].total < 0

    def test_a_choice_without_any_question(self, smolvlm):
        metadata = {"task": "toy", "doc_id": 0, "repeats": 1}
        (result,) = smolvlm.loglikelihood([Instance("loglikelihood", ("", " dog"), 0, metadata=metadata)])
        assert result.text.number > 0

    @pytest.mark.parametrize("cached", [False, True], ids=["plain", "use_cache"])
    def test_a_multiple_choice_task_of_lmms_eval_picks_the_likeliest_choice(self, checkpoint, tmp_path, cached):
        """Through the real evaluator, twice: the second time a cache would answer."""
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

        write_multiple_choice_task(tmp_path)
        options = {"tasks": ["toy"], "task_manager": TaskManager(include_path=str(tmp_path), include_defaults=False)}
        options |= {"use_cache": str(tmp_path / "cache")} if cached else {}
        vlm = models.QuantNoneSimple(pretrained=str(checkpoint("smolvlm")), device="cpu", batch_size=3)
        vlm.task_dict = {"toy": {"test": [[message(photograph(seed))] for seed in range(4)]}}
        picked = [
            np.argmax([score.total for score in vlm.scores([choice(i, f" {word}") for word in CHOICES])])
            for i in range(4)
        ]
        right = np.mean([pick == i % 3 for i, pick in enumerate(picked)])
        for _ in range(2):
            vlm = models.QuantNoneSimple(pretrained=str(checkpoint("smolvlm")), device="cpu", batch_size=3)
            results = simple_evaluate(model=vlm, **options)["results"]
            assert results["toy"]["acc,none"] == right
        assert len(set(picked)) > 1

    def test_the_greedy_answer_is_a_greedy_continuation_and_no_other_is(self, smolvlm):
        """With answers of one token that, written out, is read as that token again."""
        questions = [f"Is it {number}?" for number in range(20)]
        smolvlm.task_dict = {"toy": {"test": [[message(text=question)] for question in questions]}}
        answers = answer(smolvlm, range(20), max_new_tokens=1, batch_size=20)
        readable = [
            i for i, text in enumerate(answers) if len(smolvlm.chat.tokenizer.encode(text)) == 1 and text.isascii()
        ]
        assert readable
        for index in readable:
            asked = {"context": questions[index], "show": lambda doc: []}
            right, wrong = smolvlm.scores([choice(index, answers[index], **asked), choice(index, " dog", **asked)])
            assert right.is_greedy
            assert not wrong.is_greedy
            assert right.total > wrong.total

    def test_sampled_answers_depend_on_seed_and_repeat_and_not_on_the_batch(self, smolvlm, monkeypatch):
        smolvlm.task_dict = {"toy": {"test": DOCUMENTS}}
        requests = [generation(0, {**OPTIONS, "temperature": 1.0})] * 3 + [
            generation(1, {**OPTIONS, "temperature": 1.0})
        ]
        smolvlm.responder.engine.runner.budget = Budget.of(1, None)
        alone = smolvlm.generate_until(requests)
        smolvlm.responder.engine.runner.budget = Budget.of(4, None)
        assert smolvlm.generate_until(requests) == alone
        assert len(set(alone[:3])) > 1
        monkeypatch.setattr(smolvlm.responder.engine, "seed", 1)
        assert smolvlm.generate_until(requests) != alone

    def test_speed_and_size_reach_the_results_file(self, checkpoint):
        from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics, summarize_logged_metrics

        vlm = load(checkpoint("smolvlm"))
        vlm.task_dict = {"toy": {"test": DOCUMENTS}}
        reset_logged_metrics()
        answer(vlm, [0, 1])
        vlm.clean()
        summary = summarize_logged_metrics()
        assert summary["total_gen_tokens"] == 16
        assert summary["avg_bits_per_weight"] == vlm.report.bits_per_weight

    def test_no_requests_give_no_answers(self, smolvlm):
        assert smolvlm.generate_until([]) == []
        assert smolvlm.loglikelihood([]) == []
        assert smolvlm.generate_until_multi_round([]) == []

    def test_clean_frees_the_model_and_keeps_the_report(self, checkpoint):
        import gc
        import weakref

        vlm = load(checkpoint("smolvlm"))
        model = weakref.ref(vlm.model)
        vlm.clean()
        gc.collect()
        assert model() is None
        assert vlm.report.method == "none"


class TestClasses:
    def test_every_backend_has_a_class_for_each_interface(self):
        for backend in names():
            name = models.class_name(backend)
            chat, simple = getattr(models, name), getattr(models, f"{name}Simple")
            assert issubclass(chat, QuantizedVLM)
            assert (chat.__name__, chat.method, chat.is_simple) == (name, backend, False)
            assert (simple.method, simple.is_simple) == (backend, True)
            assert models.model_class(backend) is chat
            assert models.model_class(backend, simple=True) is simple


class TestQuantized:
    # Every backend goes through tests/end_to_end/test_quant_matrix.py; here it is the way from a model's name to its
    # answers.
    @pytest.mark.parametrize("backend", ["rtn", "hqq", "awq", "mbq", "gptq"])
    def test_a_quantized_model_answers_like_any_other_and_says_what_was_done(self, backend, checkpoint):
        options = {"bits": 4, "group_size": 32, "vision_bits": 8, "device": "cpu"}
        if issubclass(type(get(backend)), CalibratedBackend):
            options["calibration_samples"] = 2
        vlm = getattr(models, models.class_name(backend))(pretrained=str(checkpoint("smolvlm")), **options)
        vlm.task_dict = {"toy": {"test": DOCUMENTS}}
        responses = [Response.decode(text) for text in answer(vlm, [3, 5])]
        assert all(response.tokens and response.dialect == "smolvlm" for response in responses)
        assert {module.bits for module in vlm.report.quantized} == {4, 8}
        assert vlm.report.bytes_after < vlm.report.bytes_before

    def test_answers_do_not_depend_on_storage_and_the_report_tells_its_memory(self, checkpoint):
        told, said = {}, {}
        for storage in ("packed", "dense", "auto"):
            vlm = models.QuantRtn(pretrained=str(checkpoint("smolvlm")), bits=3, device="cpu", storage=storage)
            vlm.task_dict = {"toy": {"test": DOCUMENTS}}
            told[storage], said[storage] = vlm.report, answer(vlm, [3, 5])
        assert said["packed"] == said["dense"] == said["auto"]
        packed, dense = told["packed"], told["dense"]
        weights = sum(module.weights for module in dense.quantized)
        assert packed.resident_bytes == packed.bytes_after == dense.bytes_after
        assert dense.resident_bytes == told["auto"].resident_bytes == dense.bytes_after + 4 * weights
        assert dense.bits_per_weight == packed.bits_per_weight
        assert set(packed.kernels) == {"dequantize"}
        assert set(dense.kernels) == {"dense float32"}
        assert (dense.totals()["resident_bytes"], dense.to_dict()["storage"]) == (dense.resident_bytes, "dense")
        assert "storage=dense: " in dense.table()
        assert "storage=packed: " not in packed.table()

    def test_bfloat16_is_the_arithmetic_that_was_asked_for(self, checkpoint):
        vlm = load(checkpoint("smolvlm"), dtype="bfloat16")
        vlm.task_dict = {"toy": {"test": DOCUMENTS}}
        assert vlm.model.dtype == torch.bfloat16
        assert Response.decode(answer(vlm, [3])[0]).tokens


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"bit": 4}, r"unknown model argument 'bit', did you mean 'bits'\? \(known: pretrained, bits, group_size"),
            ({"pretraned": "demo"}, "did you mean 'pretrained'"),
            ({"bits": "four"}, "bits must be an integer from 2 to 8, or 16 for untouched, got 'four'"),
            ({"bits": 4.5}, "bits must be an integer from 2 to 8, or 16 for untouched, got 4.5"),
            ({"bits": True}, "bits must be an integer from 2 to 8, or 16 for untouched, got True"),
            ({"storage": "disk"}, "storage must be one of auto, packed, dense, got 'disk'"),
            ({"head_bits": 9}, "head_bits must be an integer from 2 to 8, or 16 for untouched, got 9"),
            ({"group_size": "x"}, "group_size must be a whole number, got 'x'"),
            ({"group_size": True}, "group_size must be a whole number, got True"),
            ({"act_bits": 8.5}, "act_bits must be a whole number, got 8.5"),
            ({"sample_temperature": 0}, "sample_temperature must be above 0, got 0"),
            ({"symmetric": 3}, "symmetric must be True or False, got 3"),
            ({"batch_size": 0}, "batch_size must be a whole number from 1, or 'auto', got 0"),
            ({"batch_size": "many"}, "batch_size must be a whole number from 1, or 'auto', got 'many'"),
            ({"dtype": "int8"}, "dtype must be one of auto, bfloat16, float16, float32, got 'int8'"),
            ({"min_pixels": 99, "max_pixels": 9}, "min_pixels 99 is above max_pixels 9"),
            ({"calibration": "magic"}, "unknown calibration source 'magic'"),
            ({"bits": 1}, "bits must be an integer from 2 to 8"),
        ],
        ids=str,
    )
    def test_they_are_errors_before_anything_is_loaded(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            models.QuantRtn(**arguments)

    @pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder", "~/no-such-folder"])
    def test_a_missing_checkpoint_is_named(self, path):
        with pytest.raises(FileNotFoundError, match=r"no[/-]such[/-]folder"):
            models.QuantNone(pretrained=path)

    def test_a_folder_without_checkpoint_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no config"):
            models.QuantNone(pretrained=str(tmp_path))

    def test_an_unknown_dialect_is_named(self, checkpoint):
        with pytest.raises(ValueError, match="unknown dialect 'qwen2_5'"):
            load(checkpoint("smolvlm"), dialect="qwen2_5")

    def test_what_lmms_eval_does_to_numbers_is_undone(self):
        """`-1` arrives as -1.0, `None` as a text, and max_batch_size comes along whether asked for or not."""
        from lmms_plugin.arguments import ModelArguments

        parsed = ModelArguments.parse(
            {"group_size": -1.0, "batch_size": "8", "language_bits": "None", "pretrained": 7, "max_batch_size": 64}
        )
        assert (parsed.group_size, parsed.batch_size, parsed.language_bits, parsed.pretrained) == (-1, 8, None, "7")

    def test_pixel_limits_need_a_processor_that_has_them(self, checkpoint):
        with pytest.raises(ValueError, match="SmolVLMImageProcessor has no such limits"):
            load(checkpoint("smolvlm"), max_pixels=10000)


class TestSettingsOfTheProcessor:
    def test_pixel_limits_bound_what_the_model_sees(self, checkpoint):
        large = Response.decode(answer(load(checkpoint("qwen2_vl"), min_pixels=120 * 120, max_pixels=40000), [3])[0])
        small = Response.decode(answer(load(checkpoint("qwen2_vl"), min_pixels=784, max_pixels=60 * 60), [3])[0])
        assert 120 * 120 <= math.prod(large.model_size) <= 40000
        assert 784 <= math.prod(small.model_size) <= 60 * 60

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_system_prompt_reaches_the_model(self, family, checkpoint):
        vlm = load(checkpoint(family), system_prompt="Answer like a pirate.")
        prompt = vlm.reader.read(DOCUMENTS[0], "toy")
        assert "Answer like a pirate." in vlm.chat.text_of(prompt)
        ids = vlm.chat.encode([prompt]).inputs["input_ids"][0]
        assert "pirate" in vlm.chat.tokenizer.decode(ids)

    def test_a_system_prompt_may_be_a_file_and_replaces_the_tasks_own(self, checkpoint, tmp_path):
        (tmp_path / "prompt.txt").write_text("From a file.\n")
        vlm = load(checkpoint("smolvlm"), system_prompt=str(tmp_path / "prompt.txt"))
        system = {"role": "system", "content": [{"type": "text", "text": "From the task."}]}
        text = vlm.chat.text_of(vlm.reader.read([system, *DOCUMENTS[0]], "toy"))
        assert "From a file." in text
        assert "From the task." not in text

    def test_a_template_that_drops_system_prompts_is_refused(self, checkpoint):
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(checkpoint("smolvlm"))
        processor.chat_template = (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}"
        )
        with pytest.raises(ValueError, match="drops system messages"):
            Chat(processor).expect_system_prompts()

    def test_a_checkpoint_can_declare_its_dialect(self, checkpoint, tmp_path):
        import shutil

        folder = shutil.copytree(checkpoint("smolvlm"), tmp_path / "declared")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "grounding_dialect": "demo"}))
        vlm = load(folder)
        assert vlm.dialect.name == "demo"
        assert "Locate the dog." in vlm.chat.text_of(vlm.reader.read(DOCUMENTS[3], "toy"))
        assert load(folder, dialect="shikra").dialect.name == "shikra"

    def test_a_dialect_in_pixels_of_the_resized_image_needs_to_know_its_size(self, checkpoint):
        vlm = load(checkpoint("smolvlm"), dialect="qwen2_5_vl")
        with pytest.raises(RequestError, match="SmolVLMProcessor does not tell its size"):
            answer(vlm, [3])

    def test_beam_search_has_no_log_probabilities_to_give(self, smolvlm):
        smolvlm.task_dict = {"toy": {"test": DOCUMENTS}}
        with pytest.raises(RequestError, match=r"task toy, document 3: .*beam search has none"):
            answer(smolvlm, [3], num_beams=2)
        assert answer(smolvlm, [0], num_beams=2)[0]
        smolvlm.task_dict = {"toy": {"test": [[message(photograph(0), log_probabilities=True)]]}}
        with pytest.raises(RequestError, match=r"task toy, document 0: .*beam search has none"):
            answer(smolvlm, [0], num_beams=2)
        smolvlm.task_dict = {"toy": {"test": DOCUMENTS}}


class TestPrompts:
    def read(self, messages, dialect="fractions", **options):
        return PromptReader(DIALECTS[dialect], **options).read(messages, "task toy, document 9")

    def test_a_wish_for_a_box_is_put_in_the_words_of_the_dialect(self):
        prompt = self.read(ask_for_box(photograph(0)), "paligemma")
        assert prompt.text == "detect the dog"
        assert prompt.raw
        assert [image.size for image in prompt.images] == [(120, 90)]

    def test_other_requests_keep_the_words_of_the_task(self):
        assert self.read([message(photograph(0), text="Where is the dog?")], "paligemma").text == "Where is the dog?"

    def test_a_dialect_of_padded_images_is_shown_a_padded_image(self):
        (image,) = self.read(ask_for_box(photograph(0)), "llava", background=(9, 8, 7)).images
        assert image.size == (120, 120)
        assert image.getpixel((60, 14)) == image.getpixel((60, 105)) == (9, 8, 7)
        assert image.crop((0, 15, 120, 105)).tobytes() == photograph(0).tobytes()
        (plain,) = self.read(DOCUMENTS[0], "llava").images
        assert plain.size == (120, 90)

    @pytest.mark.parametrize(
        ("size", "corner"), [((5, 3), (0, 1)), ((3, 6), (1, 0)), ((5, 2), (0, 1)), ((4, 4), (0, 0))]
    )
    def test_padding_puts_the_odd_pixel_right_or_below(self, size, corner):
        square = pad_to_square(Image.new("RGB", size, (255, 0, 0)), (0, 0, 0))
        assert square.size == (max(size),) * 2
        assert square.getbbox() == (*corner, corner[0] + size[0], corner[1] + size[1])

    @pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1", "I;16"])
    def test_images_of_any_mode_become_rgb(self, mode):
        (image,) = self.read([message(photograph(0).convert("L").convert(mode))]).images
        assert image.mode == "RGB"

    def test_a_path_is_an_image_too(self, tmp_path):
        photograph(0).save(tmp_path / "image.png")
        (image,) = self.read([message(str(tmp_path / "image.png"))]).images
        assert image.tobytes() == photograph(0).tobytes()

    @pytest.mark.parametrize("kind", ["truncated", "broken png", "no image"])
    def test_a_corrupt_image_names_the_document(self, kind, tmp_path):
        with pytest.raises(RequestError, match="task toy, document 9: its image cannot be decoded"):
            self.read([message(corrupt(kind, tmp_path))])

    def test_a_document_that_the_dataset_cannot_decode_is_named(self, smolvlm):
        class Dataset:
            def __getitem__(self, index):
                return Image.open(io.BytesIO(b"no image"))

        smolvlm.task_dict = {"toy": {"test": Dataset()}}
        with pytest.raises(RequestError, match="task toy, document 3: the document cannot be read"):
            answer(smolvlm, [3])

    @pytest.mark.parametrize(
        ("messages", "expected"),
        [
            ([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], "audio is not supported"),
            ([message(7)], "an image must be a PIL image or a path, got int"),
            (ask_for_box(photograph(0)) * 2, "2 messages ask for a box"),
            ([message(grounding={"expression": "x", "original_size": [1, 1]})], "exactly one image, got 0"),
            ([message(photograph(0), grounding={"expression": "x"})], "'grounding' must be"),
        ],
        ids=["audio", "number", "two boxes", "box in no image", "no size"],
    )
    def test_what_cannot_be_asked_names_the_document(self, messages, expected):
        with pytest.raises(RequestError, match=f"task toy, document 9: .*{expected}"):
            self.read(messages)

    def test_an_image_that_a_processor_refuses_names_the_document(self, checkpoint):
        vlm = load(checkpoint("qwen2_vl"))
        vlm.task_dict = {"toy": {"test": [[message(Image.new("RGB", (3000, 3)))]]}}
        with pytest.raises(RequestError, match=r"task toy, document 0: .*aspect ratio"):
            answer(vlm, [0])


def corrupt(kind, folder):
    """An image that opens and cannot be decoded, as datasets hand it out; or a path that is none at all."""
    buffer = io.BytesIO()
    photograph(0, (400, 300)).save(buffer, "PNG" if kind == "broken png" else "JPEG")
    data = buffer.getvalue()
    if kind == "no image":
        (folder / "image.jpg").write_bytes(b"no image")
        return str(folder / "image.jpg")
    if kind == "truncated":
        return Image.open(io.BytesIO(data[: len(data) // 2]))
    broken = data[:60] + bytes(len(data) - 60)
    return Image.open(io.BytesIO(broken))


def test_model_args_win_over_what_the_command_adds(checkpoint):
    cls = models.QuantNone
    arguments = f"pretrained={checkpoint('idefics3')},batch_size=3"
    assert cls.create_from_arg_string(arguments, {"batch_size": 1, "device": None}).batch_size == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrained=demo,bits=4,bits=8", "bits is given 2 times; say it once"),
        ("pretrained=demo,bits=4, bits=4", "bits is given 2 times"),
        ("pretrained=demo,four", "expected name=value,name=value,..., got 'four'"),
    ],
)
def test_what_lmms_eval_would_silently_overwrite_or_trip_over_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        models.QuantRtn.create_from_arg_string(text)


def test_commas_within_a_value_repeat_nothing():
    from lmms_plugin.arguments import read_arguments

    assert read_arguments("pretrained=demo,system_prompt='say a=1, a=2',bits=4")["bits"] == 4
    assert read_arguments("") == {}


@pytest.mark.parametrize("given", [{"group_size": 64}, {"symmetric": True}])
@pytest.mark.parametrize("method", ["QuantNone", "QuantPrequantized"])
def test_arguments_that_would_have_no_effect_are_refused(method, given):
    with pytest.raises(ValueError, match=f"as the checkpoint has them: leave out {next(iter(given))}"):
        getattr(models, method)(pretrained="demo", **given)
