"""Families whose code is like no other's: a generate of its own, routers that are layers, padding that counts."""

import copy
import json
import re

import pytest
import torch
import transformers as hf
from helpers.families import BUILDERS, byte_level_tokenizer
from helpers.prefix import answers, ask, assert_equal, calls, load, log
from PIL import Image

from lmms_plugin.protocol.dialects import DIALECTS
from lmms_plugin.protocol.prompts import Prompt, mean_colour, placeholder
from lmms_plugin.protocol.response import Response
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.generation import decoding

APART = r"^WARNING Answers in a (padded batch|batch without padding) are not those that "


def warnings_of(lines):
    return [line for line in lines if re.match(APART, line)]


def without_boxes(doc):
    return ask(doc, with_box=False)


class TestPaddedBatches:
    @pytest.mark.parametrize("messages", [ask, without_boxes], ids=["boxes", "text"])
    @pytest.mark.parametrize("share_prefix", [True, False])
    def test_positions_of_the_mask_make_batches_answer_as_alone(self, checkpoint, share_prefix, messages):
        """transformers drops Kosmos-2's positions, so that a new token's would be those of the padded row."""
        path = checkpoint("kosmos2")
        expected = answers(load(path), 1, messages)
        vlm = load(path, share_prefix=share_prefix)
        with log("WARNING") as lines:
            found = answers(vlm, 4, messages)
        assert_equal(found, expected)
        assert not warnings_of(lines)
        assert [padded for (_, padded), as_alone in vlm.responder.engine.runner.batched.items() if as_alone] == [True]

    def test_alone_they_are_the_positions_of_transformers(self, checkpoint, monkeypatch):
        path = checkpoint("kosmos2")
        ours = answers(load(path), 1)
        monkeypatch.setattr(decoding, "number_by_mask", lambda model: None)
        assert ours == answers(load(path), 1)

    def test_positions_that_count_padding_leave_batches_of_equal_length(self, checkpoint, monkeypatch):
        path = checkpoint("kosmos2")
        expected = answers(load(path), 1)
        monkeypatch.setattr(decoding, "number_by_mask", lambda model: None)
        vlm = load(path)
        with log("WARNING") as lines, calls(vlm) as seen:
            found = answers(vlm, 4)
        assert_equal(found, expected)
        (warning,) = warnings_of(lines)
        assert "padded batch are not those that Kosmos2ForConditionalGeneration gives to each question alone" in warning
        assert "questions of different length are not answered together" in warning
        assert sorted(vlm.responder.engine.runner.batched.items(), key=str)[-1][1] is False
        assert any(rows > 1 for rows, _ in seen)

    @pytest.mark.parametrize("share_prefix", [True, False])
    def test_rows_that_change_each_other_go_alone_without_padding_too(self, checkpoint, share_prefix):
        """HunYuan-VL of transformers numbers the images of a batch through, as if they were in one prompt."""
        path, documents = checkpoint("llava"), [(0, "dog"), (1, "dog"), (2, "dog"), (1, "cat"), (0, "cow")]
        expected = answers(load(path, documents), 1)
        vlm = load(path, documents, share_prefix=share_prefix)
        number_images(vlm.model)
        with log("WARNING") as lines:
            assert_equal(answers(vlm, 4), expected)
        assert any("In this run all questions are not answered together" in line for line in warnings_of(lines))

    def test_rows_that_take_each_others_images_are_seen_though_the_ends_share_one(self, checkpoint):
        """The shortest and the longest question are about one image, which such rows do not lose."""
        path, documents = checkpoint("llava"), [(0, "dog"), (1, "a cat"), (0, "a small grey cow")]
        expected = answers(load(path, documents), 1)
        vlm = load(path, documents, share_prefix=False)
        projector = vlm.model.model.multi_modal_projector
        projector.register_forward_hook(lambda module, args, images: images.roll(1, 0))
        with log("WARNING") as lines:
            assert_equal(answers(vlm, 4), expected)
        assert warnings_of(lines)

    def test_a_family_that_pads_well_is_compared_once_and_stays_in_batches(self, checkpoint):
        vlm = load(checkpoint("llava"), share_prefix=False)
        rows, original = [], vlm.responder.engine.decoder.generate

        def generate(inputs, *args, **kwargs):
            rows.append(len(inputs["input_ids"]))
            return original(inputs, *args, **kwargs)

        vlm.responder.engine.decoder.generate = generate
        with log("WARNING") as lines:
            answers(vlm, 4)
        assert list(vlm.responder.engine.runner.batched.values()) == [True]
        assert not warnings_of(lines)
        # Two rows alone, and then all eight questions.
        assert rows.count(1) == 2
        assert sum(rows) == 2 + 8
        rows.clear()
        answers(vlm, 4)
        assert 1 not in rows


def number_images(model):
    """Add to the encoding of an image its number in the batch."""
    projector = model.model.multi_modal_projector
    projector.register_forward_hook(lambda module, args, images: images + torch.arange(len(images))[:, None, None])


def test_an_encoder_decoder_answers_in_batches_as_alone(checkpoint):
    """Florence-2's encoder counts positions from the first column, so that its prompts are padded behind."""
    path = checkpoint("florence2")
    expected = answers(load(path), 1)
    vlm = load(path)
    with log("WARNING") as lines:
        found = answers(vlm, 4)
    assert not warnings_of(lines)
    assert list(vlm.responder.engine.runner.batched.values()) == [True]
    assert_equal(found, expected)
    responses = [Response.decode(answer) for answer in found]
    assert {response.dialect for response in responses} == {"florence2"}
    assert all(response.tokens and all(token.logprob < 0 for token in response.tokens) for response in responses)
    assert len({response.text for response in responses}) > 1


def test_florence_is_asked_in_the_words_of_its_task(checkpoint):
    chat = load(checkpoint("florence2")).chat
    parts = [{"type": "image", "image": Image.new("RGB", (56, 56), "red")}]
    parts += [{"type": "text", "text": DIALECTS["florence2"].ask("red car")}]
    inputs = chat.encode([Prompt("one", ({"role": "user", "content": parts},), raw=True)]).inputs
    read = chat.tokenizer.decode(inputs["input_ids"][0])
    assert read == "<image>" * 5 + "<s>Locate the phrases in the caption: red car</s>"


def test_a_generate_of_its_own_that_drops_processors_is_passed_by(checkpoint):
    """Janus's writes without the logits processors that it is given, which record probabilities here."""
    vlm = load(checkpoint("janus"))
    found = [Response.decode(answer) for answer in answers(vlm, 4)]
    assert vlm.responder.engine.runner.sharing.verified
    assert vlm.responder.engine.runner.sharing.off is None
    assert all(token.logprob < 0 for response in found for token in response.tokens)
    assert_equal(answers(load(checkpoint("janus"), share_prefix=False), 1), [response.encode() for response in found])


def test_fuyu_is_shown_the_image_by_its_own_processor(checkpoint):
    path = checkpoint("fuyu")
    vlm = load(path)
    expected = answers(vlm, 1)
    assert_equal(answers(load(path), 4), expected)
    found = [
        vlm.responder.engine.decoder.generate(
            vlm.chat.encode([about(colour)]).inputs, GenerationSettings(max_new_tokens=8)
        )[0].tokens
        for colour in ("red", "blue")
    ]
    assert found[0] != found[1]


def about(colour):
    parts = [{"type": "image", "image": Image.new("RGB", (56, 56), colour)}, {"type": "text", "text": "What is it?"}]
    return Prompt(colour, ({"role": "user", "content": parts},), raw=True)


def test_parts_that_draw_are_left_alone(checkpoint, tmp_path):
    report = tmp_path / "report.json"
    load(checkpoint("janus"), report=str(report))
    modules = json.loads(report.read_text())["modules"]
    unused = {module["name"].split(".")[1] for module in modules if module["component"] == "unused"}
    assert unused == {"vqmodel", "generation_embeddings", "generation_aligner", "generation_head"}


def test_a_diffusion_model_is_refused_in_one_line():
    from lmms_plugin.vlm.generation.decoding import Decoder

    tokenizer = byte_level_tokenizer(("</s>",), eos_token="</s>", pad_token="</s>")
    with torch.device("meta"):
        model = object.__new__(hf.DiffusionGemmaForBlockDiffusion)
        torch.nn.Module.__init__(model)
    with pytest.raises(ValueError, match=r"DiffusionGemmaForBlockDiffusion does not write token by token") as failure:
        Decoder.of(model, tokenizer)
    assert "\n" not in str(failure.value)


class TestProcessors:
    def test_fuyu_names_one_mean_for_all_channels(self):
        special = ("|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|", "<0x04>", "<s>")
        roles = {"bos_token": "<s>", "eos_token": "|ENDOFTEXT|", "pad_token": "|ENDOFTEXT|"}
        processor = hf.FuyuProcessor(hf.FuyuImageProcessor(), byte_level_tokenizer(special, **roles))
        assert processor.image_processor.image_mean == 0.5
        assert mean_colour(processor) == (127, 127, 127)
        # Its processor puts the image's token in front of a prompt itself and refuses a second one.
        assert placeholder(processor) == ""

    @pytest.mark.parametrize(("family", "expected"), [("paligemma", "<image>"), ("llava", "<image>")])
    def test_others_are_given_the_token(self, family, expected):
        assert placeholder(BUILDERS[family]()[1]) == expected


def test_a_router_that_is_a_linear_layer_and_more_is_left_alone():
    """Llama 4's returns scores and logits, which a packed layer in its place would not.

    Only the decoder is run: the whole model's forward pass of transformers 5.24 asks it for image outputs.
    """
    text = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    text |= {"num_local_experts": 4, "num_experts_per_tok": 1, "pad_token_id": 0}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "image_size": 56}
    torch.manual_seed(0)
    model = hf.Llama4ForConditionalGeneration(hf.Llama4Config(text_config=text, vision_config=vision)).eval()
    inputs = {"input_ids": torch.arange(1, 41)[None], "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    with torch.no_grad():
        expected = model.language_model(**inputs).logits
        quantized = copy.deepcopy(model)
        work = quantize(quantized, get("rtn"), QuantPlan.from_arguments(bits=8, group_size=32))
        found = quantized.language_model(**inputs).logits
    routers = [name for name in work.components if name.endswith(".router")]
    assert len(routers) == 2
    assert {work.reasons[name] for name in routers} == {"Llama4Router does more than multiply by its weight"}
    assert torch.isfinite(found).all()
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
