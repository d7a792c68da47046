import math

import pytest
import torch
from helpers.families import byte_level_tokenizer, sentencepiece_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from lmms_plugin.utils.processes.out_of_memory import OutOfMemory, while_answering
from lmms_plugin.vlm.contracts.settings import GenerationSettings, Sampling
from lmms_plugin.vlm.generation.decoding import Decoder
from lmms_plugin.vlm.generation.token_texts import cut, decode
from lmms_plugin.vlm.generation.token_texts import token_texts as split_text

TOKENIZERS = {
    "byte-level": byte_level_tokenizer(("<end>", "<box>"), eos_token="<end>"),
    "sentencepiece": sentencepiece_tokenizer(
        ("<s>", "</s>"), prefix_space=True, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ),
    "sentencepiece-no-prefix": sentencepiece_tokenizer(
        ("<bos>", "<eos>"), prefix_space=False, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ),
}


@pytest.fixture(scope="module", params=TOKENIZERS.values(), ids=TOKENIZERS)
def tokenizer(request):
    return request.param


class TestTokenTexts:
    def test_a_character_of_several_tokens_belongs_to_the_last_of_them(self, tokenizer):
        ids = tokenizer.encode("5é7", add_special_tokens=False)
        texts = split_text(tokenizer, ids)
        assert "".join(texts) == "5é7"
        position = texts.index("é")
        assert texts[position - 1] == ""
        assert texts[position + 1] == "7"

    def test_words_keep_the_space_before_them(self, tokenizer):
        ids = tokenizer.encode("the dog on the right", add_special_tokens=False)
        assert "".join(split_text(tokenizer, ids)) == "the dog on the right"


class TestCut:
    @given(
        st.lists(st.text("ab\n", max_size=3), max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=2)
    )
    def test_what_is_left_is_the_text_before_the_first_of_the_strings(self, texts, until):
        whole = "".join(texts)
        expected = whole[: min((whole.find(s) for s in until if s in whole), default=len(whole))]
        kept = cut(texts, until)
        assert "".join(kept) == expected
        assert len(kept) <= len(texts)
        assert all(text.startswith(part) for text, part in zip(texts, kept, strict=False))

    def test_a_token_that_holds_the_beginning_of_the_string_is_shortened(self):
        assert cut(["one", " two\n", "\nthree"], ["\n\n"]) == ["one", " two"]

    def test_without_the_string_everything_stays_the_last_empty_token_included(self):
        assert cut(["one", ""], ["\n\n"]) == ["one", ""]


class TestSettings:
    @pytest.mark.parametrize(
        ("kwargs", "expected"),
        [
            ({}, GenerationSettings()),
            ({"temperature": 0, "do_sample": False, "top_p": None, "num_beams": 1}, GenerationSettings()),
            ({"temperature": 0, "do_sample": True}, GenerationSettings()),
            ({"temperature": 0.7, "do_sample": False}, GenerationSettings()),
            ({"temperature": 0.7}, GenerationSettings(sampling=Sampling(0.7))),
            ({"do_sample": True, "top_p": 0.9, "top_k": 5}, GenerationSettings(sampling=Sampling(1.0, 0.9, 5))),
            ({"max_new_tokens": 7, "until": "\n"}, GenerationSettings(max_new_tokens=7, until=("\n",))),
            ({"max_gen_toks": 9, "until": ["a", "", "a", "b"]}, GenerationSettings(max_new_tokens=9, until=("a", "b"))),
            ({"image_aspect_ratio": "pad", "until": None}, GenerationSettings()),
        ],
        ids=str,
    )
    def test_generation_kwargs_are_read_as_everywhere_in_lmms_eval(self, kwargs, expected):
        assert GenerationSettings.from_kwargs(kwargs) == expected

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"temperature": -1}, "temperature must not be negative, got -1"),
            ({"temperature": 1, "top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
            ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
            ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
            ({"num_beams": 2, "temperature": 1}, "num_beams > 1 cannot be combined with sampling"),
            ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
            ({"num_return_sequences": 3}, "one answer per request"),
        ],
        ids=str,
    )
    def test_values_that_make_no_sense_are_refused(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            GenerationSettings.from_kwargs(kwargs)


@pytest.fixture(scope="module")
def language_model():
    """A text-only causal model: what is tested here has nothing to do with images."""
    import transformers as hf

    tokenizer = byte_level_tokenizer(("<end>", "<pad>", "<box>"), eos_token="<end>", pad_token="<pad>")
    torch.manual_seed(3)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    model = hf.LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=9, repetition_penalty=5.0, max_length=3, eos_token_id=[0]
    )
    return Decoder.of(model, tokenizer)


def test_plain_generate_of_the_model_ends_where_answers_do(language_model):
    """Whoever takes the model out of an evaluation: sampling and lengths of the checkpoint are gone, its end is not."""
    assert language_model.model.generation_config.eos_token_id == list(language_model.ends)
    inputs = rows(language_model, "the dog")
    ids = language_model.model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist()
    end = ids[2]
    decoder = Decoder.of(language_model.model, language_model.tokenizer)
    kept, decoder.model.generation_config.eos_token_id = decoder.model.generation_config.eos_token_id, [end]
    try:
        again = Decoder.of(decoder.model, decoder.tokenizer)
        stopped = again.model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist()
    finally:
        decoder.model.generation_config.eos_token_id = kept
    assert stopped == ids[: ids.index(end) + 1]


def rows(decoder, *texts):
    return dict(decoder.tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt"))


def plain_greedy(decoder, text, length):
    """Greedy decoding without any of the code under test: one full forward pass per token."""
    ids = decoder.tokenizer(text, return_tensors="pt")["input_ids"]
    logprobs = []
    for _ in range(length):
        with torch.no_grad():
            step = decoder.model(ids).logits[0, -1].double().log_softmax(-1)
        logprobs.append(step.max().item())
        ids = torch.cat([ids, step.argmax().view(1, 1)], dim=1)
        if ids[0, -1].item() in decoder.ends:
            break
    return ids[0, -len(logprobs) :].tolist(), logprobs


def test_greedy_decoding_ignores_what_the_checkpoint_says_about_sampling(language_model):
    ids, logprobs = plain_greedy(language_model, "Locate the dog", 12)
    (answer,) = language_model.generate(rows(language_model, "Locate the dog"), GenerationSettings(max_new_tokens=12))
    assert "".join(token.text for token in answer.tokens) == decode(language_model.tokenizer, ids)
    assert [token.logprob for token in answer.tokens] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("length", [1, 5])
def test_an_answer_has_at_most_max_new_tokens(language_model, length):
    (answer,) = language_model.generate(rows(language_model, "Locate"), GenerationSettings(max_new_tokens=length))
    assert len(answer.tokens) == length


def test_the_end_of_sequence_token_counts_and_has_no_text(language_model):
    """Whatever the third token is: made the end of sequence, it ends the answer and keeps its log-probability."""
    ids, logprobs = plain_greedy(language_model, "Where is it?", 3)
    decoder = Decoder(language_model.model, language_model.tokenizer, (ids[2],), language_model.special | {ids[2]})
    assert ids[2] not in ids[:2]
    (answer,) = decoder.generate(rows(decoder, "Where is it?"), GenerationSettings(max_new_tokens=12))
    assert [token.text for token in answer.tokens] == [*split_text(decoder.tokenizer, ids[:2]), ""]
    assert answer.tokens[2].logprob == pytest.approx(logprobs[2], abs=1e-4)


def test_an_answer_that_ends_at_once_is_empty_and_not_an_error(language_model):
    (first,), (logprob,) = plain_greedy(language_model, "Where", 1)
    decoder = Decoder(language_model.model, language_model.tokenizer, (first,), frozenset({first}))
    (answer,) = decoder.generate(rows(decoder, "Where"), GenerationSettings())
    assert answer.text == ""
    assert answer.tokens == (("", pytest.approx(logprob, abs=1e-4), None),)


def test_until_cuts_the_answer_where_the_string_begins_whatever_its_neighbours_do(language_model):
    free = language_model.generate(rows(language_model, "the dog", "yes or no"), GenerationSettings(max_new_tokens=16))
    whole = "".join(token.text for token in free[0].tokens)
    string = whole[len(whole) // 2 :][:2]
    stopped = language_model.generate(
        rows(language_model, "the dog", "yes or no"), GenerationSettings(max_new_tokens=16, until=(string,))
    )
    assert string in whole
    assert "".join(token.text for token in stopped[0].tokens) == whole[: whole.find(string)]
    other = "".join(token.text for token in free[1].tokens)
    expected = other[: other.find(string)] if string in other else other
    assert "".join(token.text for token in stopped[1].tokens) == expected


def test_until_ends_the_decoding_and_not_only_the_text(language_model):
    (free,) = language_model.generate(rows(language_model, "the dog"), GenerationSettings(max_new_tokens=8))
    string = next(token.text for token in free.tokens if token.text)
    calls = []
    hook = language_model.model.register_forward_hook(lambda *_: calls.append(1))
    language_model.generate(rows(language_model, "the dog"), GenerationSettings(max_new_tokens=400, until=(string,)))
    hook.remove()
    assert len(calls) <= 8


class TestSampling:
    def draw(self, decoder, texts, seeds, **options):
        asked = GenerationSettings(max_new_tokens=8, sampling=Sampling(**options))
        return decoder.generate(rows(decoder, *texts), asked, seeds)

    def test_what_is_drawn_depends_on_the_seed_of_the_row_and_not_on_its_batch(self, language_model):
        alone = self.draw(language_model, ["the dog"], [7])[0]
        first, second = self.draw(language_model, ["a longer question about", "the dog"], [5, 7])
        assert [token.text for token in second.tokens] == [token.text for token in alone.tokens]
        assert self.draw(language_model, ["the dog"], [8])[0].text != alone.text
        assert first.text != second.text

    def test_log_probabilities_are_those_before_temperature_and_truncation(self, language_model):
        (answer,) = self.draw(language_model, ["the dog"], [1], temperature=0.5, top_k=3)
        with torch.no_grad():
            raw = language_model.model(rows(language_model, "the dog")["input_ids"]).logits[0, -1].log_softmax(-1)
        assert min(abs(raw.topk(3).values - answer.tokens[0].logprob)) < 1e-4

    def test_one_candidate_left_is_greedy_decoding(self, language_model):
        (greedy,) = language_model.generate(rows(language_model, "the dog"), GenerationSettings(max_new_tokens=8))
        assert self.draw(language_model, ["the dog"], [3], top_k=1)[0].text == greedy.text
        assert self.draw(language_model, ["the dog"], [3], temperature=1e-4)[0].text == greedy.text

    def test_tokens_are_drawn_as_often_as_they_are_likely(self, language_model):
        inputs = rows(language_model, *["the dog"] * 500)
        answers = language_model.generate(
            inputs, GenerationSettings(max_new_tokens=1, sampling=Sampling(temperature=0.8)), list(range(500))
        )
        with torch.no_grad():
            expected = (language_model.model(inputs["input_ids"][:1]).logits[0, -1] / 0.8).softmax(-1).max().item()
        likeliest = max(answer.tokens[0].logprob for answer in answers)
        share = sum(answer.tokens[0].logprob == likeliest for answer in answers) / 500
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 500))

    def test_a_seed_per_row_is_needed(self, language_model):
        with pytest.raises(ValueError, match="one seed per row"):
            language_model.generate(rows(language_model, "a"), GenerationSettings(sampling=Sampling()))


def test_a_repetition_penalty_changes_the_choice_and_not_its_log_probability(language_model):
    inputs = rows(language_model, "the dog")
    (plain,) = language_model.generate(inputs, GenerationSettings(max_new_tokens=24))
    (varied,) = language_model.generate(inputs, GenerationSettings(max_new_tokens=24, repetition_penalty=3.0))
    assert plain.text != varied.text
    same = next(i for i, (a, b) in enumerate(zip(plain.tokens, varied.tokens, strict=False)) if a.text != b.text)
    for a, b in zip(plain.tokens[:same], varied.tokens[:same], strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_repetition_penalty_does_not_take_padding_for_words(language_model, num_beams):
    """Where padding is the very token that a row would write first, it must be no less likely for being padding."""
    asked = GenerationSettings(max_new_tokens=12, num_beams=num_beams, repetition_penalty=3.0)
    alone = language_model.generate(rows(language_model, "the dog"), asked)[0]
    padded = rows(language_model, "the dog", "a much longer question about the dog")
    ids, _ = plain_greedy(language_model, "the dog", 1)
    padded["input_ids"][padded["attention_mask"] == 0] = ids[0]
    assert ids[0] not in rows(language_model, "the dog")["input_ids"]
    assert language_model.generate(padded, asked)[0].text == alone.text


def test_a_repetition_penalty_without_padding_is_that_of_transformers(language_model):
    inputs = rows(language_model, "the dog")
    (answer,) = language_model.generate(
        inputs, GenerationSettings(max_new_tokens=12, num_beams=3, repetition_penalty=1.7)
    )
    ends = list(language_model.ends)
    config = GenerationConfig(max_new_tokens=12, num_beams=3, repetition_penalty=1.7, eos_token_id=ends)
    (ids,) = language_model.model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    assert answer.text == language_model.tokenizer.decode(ids, skip_special_tokens=True)


def test_beam_search_is_passed_on_and_reports_no_log_probabilities(language_model):
    inputs = rows(language_model, "the dog", "yes or no")
    answers = language_model.generate(inputs, GenerationSettings(max_new_tokens=6, num_beams=4))
    config = GenerationConfig(max_new_tokens=6, num_beams=4, eos_token_id=list(language_model.ends))
    found = language_model.model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    for answer, ids in zip(answers, found, strict=True):
        assert answer.text == language_model.tokenizer.decode(ids, skip_special_tokens=True)
        assert all(math.isnan(token.logprob) for token in answer.tokens)


class TestScore:
    def test_a_score_is_the_sum_of_a_teacher_forced_forward_pass(self, language_model):
        prompts, texts = ["the dog", "a much longer question about it:"], [" on the right", " no"]
        given = [language_model.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        scores = language_model.score(rows(language_model, *prompts), given)
        for prompt, ids, score in zip(prompts, given, scores, strict=True):
            context = language_model.tokenizer.encode(prompt)
            with torch.no_grad():
                logits = language_model.model(torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
            expected = [logits[len(context) + i - 1, token].item() for i, token in enumerate(ids)]
            assert score.logprobs == pytest.approx(expected, abs=1e-4)

    def test_what_greedy_decoding_writes_is_greedy_and_a_change_in_it_is_not(self, language_model):
        ids, logprobs = plain_greedy(language_model, "the dog", 5)
        changed = [*ids[:-1], (ids[-1] + 1) % 200]
        inputs = rows(language_model, "the dog", "the dog", "the dog")
        same, other, short = language_model.score(inputs, [ids, changed, ids[:2]])
        assert same.is_greedy
        assert same.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert not other.is_greedy
        assert short.is_greedy
        assert len(short.logprobs) == 2

    def test_the_end_of_sequence_token_may_be_part_of_what_is_scored(self, language_model):
        end = language_model.ends[0]
        (score,) = language_model.score(rows(language_model, "the dog"), [[end, 40, end]])
        assert len(score.logprobs) == 3

    def test_nothing_to_score_is_certain(self, language_model):
        inputs = rows(language_model, "the dog", "a")
        assert language_model.score(inputs, [[], []]) == [((), True), ((), True)]
        assert language_model.score(inputs, [[], [41]])[0] == ((), True)


def test_logits_that_are_not_numbers_are_an_error(language_model):
    hook = language_model.model.lm_head.register_forward_hook(lambda module, args, logits: logits * float("nan"))
    try:
        with pytest.raises(FloatingPointError, match="not numbers"):
            language_model.generate(rows(language_model, "the dog"), GenerationSettings(max_new_tokens=2))
    finally:
        hook.remove()


def test_out_of_memory_says_what_helps():
    with (
        pytest.raises(OutOfMemory, match=r"batch_size \(now 8 requests\), max_pixels, bits"),
        while_answering(8),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_real_failed_allocation_is_recognised():
    with pytest.raises(OutOfMemory, match="max_pixels"), while_answering(1):
        torch.empty(1 << 50, dtype=torch.uint8)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="shapes"), while_answering(1):
        raise RuntimeError("shapes do not match")


def test_a_checkpoint_without_any_end_is_refused(language_model):
    tokenizer = byte_level_tokenizer(())
    model = language_model.model
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with pytest.raises(ValueError, match="names an eos token"):
            Decoder.of(model, tokenizer)
    finally:
        model.generation_config = kept
