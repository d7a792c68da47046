"""Chat templates of checkpoints: where they lie, what they are handed, what they show, and what reasoning they open."""

import json
import shutil
from dataclasses import replace

import pytest
from helpers.families import QWEN_TEMPLATE, idefics_template
from helpers.models import DOCUMENTS, answer, load, message, photograph
from loguru import logger
from transformers import AutoProcessor

from lmms_plugin.arguments import ModelArguments, read_arguments
from lmms_plugin.protocol import chat_templates
from lmms_plugin.protocol.dialects import DIALECTS
from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import Response

PLAIN = {"log_probabilities": True}
THINKING = QWEN_TEMPLATE.replace(
    "<|im_start|>assistant\n",
    "<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}",
)
TEXT_ONLY = {
    "prints a list": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "takes no image": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
    "drops images": "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}",
}


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy of a tiny checkpoint with another template, in the processor's file, the tokenizer's, or nowhere."""

    def copy(family, template=None, *, tokenizer=None):
        folder = shutil.copytree(checkpoint(family), tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        if tokenizer is not None:
            config["chat_template"] = tokenizer
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return copy


@pytest.fixture
def said():
    messages: list[str] = []
    handle = logger.add(messages.append, format="{message}", level="WARNING")
    yield messages
    logger.remove(handle)


def ask(vlm, **changes):
    vlm.task_dict = {"toy": {"test": [[message(photograph(0), text="Is it red?", **PLAIN)], DOCUMENTS[3]]}}
    return [Response.decode(text) for text in answer(vlm, [0, 1], **{"until": [], **changes})]


class TestReasoningThatTheTemplateOpens:
    def test_an_answer_within_it_is_none_and_the_run_says_so(self, copied, said):
        vlm = load(copied("qwen2_5_vl", THINKING), verbalised=True, samples=2)
        for response in ask(vlm):
            assert response.opened == "<think>"
            assert response.text
            assert response.tokens
            assert (response.answer, response.spoken.tokens, response.stated) == ("", (), "")
            assert response.sampled == (None, None)
        unfinished = [line for line in said if "max_new_tokens=" in line]
        assert len(unfinished) == 1

    def test_one_that_closes_it_itself_leaves_answers_to_the_letter(self, copied, said):
        plain, closed = load(copied("qwen2_5_vl", THINKING), enable_thinking=False), THINKING.replace("<think>", "<b>")
        for response in ask(plain):
            assert (response.opened, response.answer) == ("", response.text)
            assert response.spoken.tokens == response.tokens
        assert [one.opened for one in ask(load(copied("qwen2_5_vl", closed)))] == ["", ""]
        assert not [line for line in said if "max_new_tokens=" in line]

    def test_what_a_question_says_of_tags_opens_nothing(self, copied):
        vlm = load(copied("qwen2_5_vl", QWEN_TEMPLATE))
        prompt = vlm.reader.read([message(photograph(0), text="Think between <think> and so on. <think>")], "toy")
        assert vlm.chat.opened_by(prompt) == ""

    def test_features_keep_the_probability_of_answers_alone(self, copied, tmp_path):
        from lmms_plugin.selector.features import read

        vlm = load(copied("qwen2_5_vl", THINKING), features=str(tmp_path / "features"))
        ask(vlm)
        assert read(tmp_path / "features").features.logprob.isnan().all()


class TestTagsThatAreSpecialTokens:
    def test_they_are_kept_where_other_special_tokens_are_dropped(self, copied):
        vlm = load(copied("smolvlm", idefics_template("<|im_start|>")))
        assert vlm.responder.engine.decoder.marks == set()
        tokenizer = vlm.chat.tokenizer
        tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "<|box|>"]})
        decoder = type(vlm.responder.engine.decoder).of(vlm.model, tokenizer)
        ids = tokenizer.encode("[THINK]red[/THINK]<|box|>yes", add_special_tokens=False)
        made = decoder.as_answer([*ids, decoder.ends[0]], [-0.1] * (len(ids) + 1), ())
        assert made.text == "[THINK]red[/THINK]yes"
        assert Response(made.text).answer == "yes"


class TestArguments:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("enable_thinking=False", {"enable_thinking": False}),
            ('template_args={"budget": 512, "style": "short"}', {"budget": 512, "style": "short"}),
            ('enable_thinking=True,template_args={"budget": 1},bits=4', {"budget": 1, "enable_thinking": True}),
            ("bits=4", {}),
        ],
    )
    def test_they_are_read_as_lmms_eval_hands_them_over(self, text, expected):
        assert ModelArguments.parse(read_arguments(text)).template_variables == expected

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("template_args=budget", "template_args must be a JSON object"),
            ("template_args=[1]", "template_args must be a JSON object"),
            ('enable_thinking=True,template_args={"enable_thinking": true}', "given twice"),
            ("enable_thinking=perhaps", "enable_thinking must be True or False"),
        ],
    )
    def test_what_cannot_be_is_an_error(self, text, problem):
        with pytest.raises(ValueError, match=problem):
            ModelArguments.parse(read_arguments(text))

    def test_the_template_is_handed_them(self, copied):
        template = QWEN_TEMPLATE + "{% if style %}Be {{ style }}.{% endif %}"
        vlm = load(copied("qwen2_5_vl", template), template_args={"style": "short"})
        prompt = vlm.reader.read(DOCUMENTS[0], "toy")
        assert vlm.chat.text_of(prompt).endswith("Be short.")
        ids = vlm.chat.encode([prompt]).inputs["input_ids"][0]
        assert vlm.chat.tokenizer.decode(ids).endswith("Be short.")

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            (
                {"enable_thinking": False},
                "enable_thinking: the chat template of .* knows no such variable; leave it out",
            ),
            (
                {"template_args": {"add_generation_prompt": False}},
                "add_generation_prompt is set by this package; leave it out",
            ),
            ({"template_args": {"messages": []}}, "messages is set by this package; leave it out"),
        ],
    )
    def test_a_variable_without_effect_is_an_error(self, copied, arguments, problem):
        with pytest.raises(ValueError, match=problem):
            load(copied("qwen2_5_vl", QWEN_TEMPLATE), **arguments)

    def test_without_a_template_there_is_nothing_to_set(self, checkpoint):
        with pytest.raises(ValueError, match=r"is asked without a chat template, .*; leave it out"):
            load(checkpoint("paligemma"), enable_thinking=False)


class TestWhereTemplatesLie:
    @pytest.mark.parametrize("named", [False, True])
    def test_the_tokenizers_own_is_used(self, copied, said, named):
        of_names = [{"name": "default", "template": QWEN_TEMPLATE}, {"name": "tools", "template": "no"}]
        given = load(copied("qwen2_5_vl", QWEN_TEMPLATE))
        found = load(copied("qwen2_5_vl", tokenizer=of_names if named else QWEN_TEMPLATE))
        assert said == []
        for document in DOCUMENTS[:1]:
            one, other = (vlm.chat.text_of(vlm.reader.read(document, "toy")) for vlm in (given, found))
            assert one == other
            assert "<|im_start|>user" in one

    def test_of_several_one_must_be_the_default(self, copied):
        several = [{"name": "a", "template": QWEN_TEMPLATE}, {"name": "b", "template": QWEN_TEMPLATE}]
        with pytest.raises(
            ValueError, match=r"expected a chat template named 'default' among several, got \['a', 'b'\]"
        ):
            load(copied("qwen2_5_vl", tokenizer=several))

    def test_none_at_all_is_said_once_and_plain_families_are_none_of_it(self, copied, checkpoint, said):
        folder = copied("llava")
        vlm = load(folder)
        assert not vlm.chat.has_template
        (line,) = said
        assert str(folder) in line
        assert "no chat template" in line
        said.clear()
        load(checkpoint("paligemma"))
        load(checkpoint("blip2_opt"))
        assert said == []

    def test_a_language_models_template_is_not_taken_for_a_plain_familys(self, checkpoint):
        processor = AutoProcessor.from_pretrained(checkpoint("blip2_opt"))
        processor.tokenizer.chat_template = TEXT_ONLY["takes no image"]
        chat_templates.adopt(processor, DIALECTS["fractions"], "blip2")
        assert chat_templates.text_of(processor) is None


class TestImages:
    @pytest.mark.parametrize("problem", TEXT_ONLY)
    @pytest.mark.parametrize("place", ["processor", "tokenizer"])
    def test_a_template_for_texts_alone_is_refused_before_weights_are_read(self, copied, problem, place):
        template = TEXT_ONLY[problem]
        folder = copied("llava", **({"template": template} if place == "processor" else {"tokenizer": template}))
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=problem) as raised:
            load(folder)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "smolvlm"])
    def test_a_template_that_shows_the_first_image_only_is_refused(self, checkpoint, family):
        vlm = load(checkpoint(family))
        prompt = vlm.reader.read([message(photograph(1), photograph(2), text="Compare.")], "toy")
        inputs = vlm.chat.encode([prompt]).inputs
        token = vlm.chat.processor.image_token_id
        vlm.chat.expect_images([prompt], inputs)
        shown = inputs["input_ids"].clone()
        shown[shown == token] = 5
        with pytest.raises(RequestError, match="toy: the prompt holds 0 image tokens where its 2 images take"):
            vlm.chat.expect_images([prompt], {**inputs, "input_ids": shown})

    def test_a_dropped_image_is_an_error_of_its_document(self, copied):
        shows = "{% if part.type == 'image' %}"
        assert shows in QWEN_TEMPLATE
        first = QWEN_TEMPLATE.replace(shows, "{% if part.type == 'image' and loop.first %}")
        vlm = load(copied("qwen2_5_vl", first))
        prompt = vlm.reader.read([message(photograph(1), photograph(2), text="Compare.")], "document 7")
        with pytest.raises(RequestError, match="document 7"):
            vlm.chat.encode([prompt])


def test_opened_reasoning_is_part_of_what_answers_have_in_common():
    from lmms_plugin.export.consistency import RescoredSample, expect_one_model

    record, response = {"id": "1", "image": "a"}, Response("a</think>b", opened="<think>")
    samples = [
        RescoredSample(0, record, response, "", ""),
        RescoredSample(1, record, replace(response, opened=""), "", ""),
    ]
    expect_one_model("task", samples[:1])
    with pytest.raises(ValueError, match="expected one opening of reasoning"):
        expect_one_model("task", samples)
