"""The demo as GGUF in llama.cpp's server, which each model starts for itself, beside the same model loaded here."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.demo import CHECKPOINT, DATA
from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import Response
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_export import TEXT_FILE, VISION_FILE, export
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_file import matrices
from lmms_plugin.quant_backends.checkpoints.gguf.tensor_types import TypeChoice
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.vlm import wrapper
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.served.client import ServerError
from lmms_plugin.vlm.served.llamacpp.completion import RenderedAsking, as_chat, expect_effect
from lmms_plugin.vlm.served.llamacpp.gguf_model import QuantGguf, files_of
from lmms_plugin.vlm.served.llamacpp.gguf_options import GgufOptions
from lmms_plugin.vlm.served.llamacpp.image_places import ImagePlace, places
from lmms_plugin.vlm.served.model import QuantServed

pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")
pytestmark = [pytest.mark.model, pytest.mark.slow]

EXACT = {"threads": 1, "context": 1024, "kv_type": "f32", "flash_attention": "off"}
COUNT = 120
SCORED = {"candidates": True, "max_new_tokens": 1}
HEADS = 4
SHORT = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
SHORT |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
SHORT |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


@pytest.fixture(scope="module")
def documents():
    return {"toy": {"test": ExpressionDocs(datasets.load_dataset(DATA, split="test").select(range(75)))}}


@pytest.fixture(scope="module")
def local(documents):
    vlm = wrapper.QuantNone(pretrained="demo", device="cpu")
    vlm.task_dict = documents
    return vlm


@pytest.fixture(scope="module")
def served(documents, tmp_path_factory):
    """A function from a type to the demo in it, in a server that is started once."""
    started = {}
    cache = tmp_path_factory.mktemp("cache")

    def of(kind):
        if kind not in started:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LMMS_PLUGIN_CACHE", str(cache))
                report = str(cache / f"{kind}.json")
                started[kind] = QuantGguf(pretrained="demo", type=kind, report=report, **EXACT)
                started[kind].make_ready()
            started[kind].task_dict = documents
        return started[kind]

    yield of
    for vlm in started.values():
        vlm.clean()


def answers(vlm, asked):
    return list(map(Response.decode, vlm.generate_until(asked)))


def equal(some, others):
    return sum(one.text == other.text for one, other in zip(some, others, strict=True))


@pytest.fixture(scope="module")
def asked(instances):
    return instances(comprehension.doc_to_messages, COUNT)


@pytest.fixture(scope="module")
def expected(local, asked):
    return answers(local, asked)


def test_f32_answers_as_the_model_loaded_here(served, asked, expected):
    vlm = served("F32")
    found = answers(vlm, asked)
    assert equal(expected, found) == COUNT
    for mine, theirs in zip(expected, found, strict=True):
        assert (mine.original_size, mine.dialect, mine.records_digits) == (
            theirs.original_size,
            theirs.dialect,
            theirs.records_digits,
        )
        for token, other in zip(mine.tokens, theirs.tokens, strict=True):
            assert token.text == other.text
            assert token.logprob == pytest.approx(other.logprob, abs=0.01)
            for digits in token.alternatives.probabilities if token.alternatives else ():
                found_one = other.alternatives.probabilities.get(digits, 0)
                assert token.alternatives.probabilities[digits] == pytest.approx(found_one, abs=0.01)
    figures, account = vlm.figures(), vlm.account()
    assert figures["served_prompts_compared"] == COUNT
    assert figures["served_prompts_different"] == 0
    assert figures["bits_per_weight"] == 32
    assert (account["prompts"], account["digits"]) == ("ids", "top_logprobs (64)")
    assert account["written"] == "rendered by the checkpoint's processor"


def test_8_bits_answer_nearly_as_32(served, asked, expected):
    vlm = served("Q8_0")
    assert equal(expected, answers(vlm, asked)) >= 0.9 * COUNT
    report = json.loads(Path(vlm.arguments.report).read_text())["served"]["gguf"]
    assert report["bits_per_weight"] == vlm.figures()["bits_per_weight"] == 8.5
    assert {row["type"] for row in report["files"][0]["types"]} == {"Q8_0", "F32"}


def test_4_bits_answer_as_torch_with_the_same_weights(served, asked, documents):
    vlm = served("Q4_0")
    dense = wrapper.QuantNone(pretrained="demo", device="cpu")
    dense.task_dict = documents
    state = dense.model.state_dict()
    names = {"token_embd": "model.text_model.embed_tokens", "output_norm": "model.text_model.norm"}
    for name, values in matrices(vlm.gguf.text.path):
        short = name.removesuffix(".weight")
        if short.startswith("blk."):
            _, layer, kind = short.split(".")
            short = f"model.text_model.layers.{layer}.{SHORT[kind]}"
            if kind in ("attn_q", "attn_k"):
                values = values.reshape(HEADS, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        full = f"{names.get(short, 'lm_head' if short == 'output' else short)}.weight"
        state[full].copy_(torch.from_numpy(values.copy()))
    # What differs are activations, which llama.cpp rounds to 8 bits.
    assert equal(answers(dense, asked), answers(vlm, asked)) >= 0.95 * COUNT


def test_likelihoods_of_given_texts_are_those_of_the_model_loaded_here(served, local, instances):
    def candidates(doc):
        content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": "Where?"}]
        return [{"role": "user", "content": content, "candidates": ["a red circle", "[12,34,56,78]", "7"]}]

    asked = instances(candidates, 3, SCORED)
    found = [[Response.decode(text).scores for text in vlm.generate_until(asked)] for vlm in (local, served("F32"))]
    for mine, theirs in zip(*found, strict=True):
        assert mine.keys() == theirs.keys()
        for name, score in mine.items():
            assert score == pytest.approx(theirs[name], abs=0.01)


def test_a_stop_within_a_token_and_samples_keep_their_probabilities(served, local, instances):
    options = {"max_new_tokens": 24, "temperature": 0, "until": [","]}
    asked = instances(comprehension.doc_to_messages, 6, options)
    for mine, theirs in zip(answers(local, asked), answers(served("F32"), asked), strict=True):
        assert [token.text for token in mine.tokens] == [token.text for token in theirs.tokens]
        assert [token.logprob for token in mine.tokens] == pytest.approx(
            [one.logprob for one in theirs.tokens], abs=0.01
        )
    vlm = served("F32")
    drawn = {"max_new_tokens": 24, "temperature": 1.0, "until": []}
    twice = [answers(vlm, instances(comprehension.doc_to_messages, 4, drawn)) for _ in range(2)]
    assert twice[0] == twice[1]


def test_a_server_that_runs_already_is_asked_with_rendered_prompts(served, asked, expected, documents):
    running = served("F32")
    vlm = QuantServed(pretrained="demo", base_url=running.account()["base_url"], concurrency=1)
    vlm.task_dict = documents
    assert equal(expected[:10], answers(vlm, asked[:10])) == 10
    assert vlm.found.rendered
    # The chat API's template leaves out the tokens that Idefics3's processor writes around an image.
    with pytest.raises(RequestError, match="the server read 66 tokens, Idefics3Processor makes 69"):
        QuantServed(pretrained="demo", base_url=running.account()["base_url"], prompts="chat")


def test_a_prompt_that_does_not_fit_and_other_failures_name_the_document(served, instances):
    vlm = served("F32")
    options = {"max_new_tokens": 2000, "temperature": 1.0, "until": []}

    def long(doc):
        return [{"role": "user", "content": [{"type": "text", "text": "Where? " * 600}]}]

    def forged(doc):
        return [{"role": "user", "content": [{"type": "text", "text": "What is <image>?"}]}]

    with pytest.raises(RequestError, match=r"document 0: .*prompt and answer do not fit"):
        vlm.generate_until(instances(long, 1, options))
    with pytest.raises(RequestError, match=r"document 0: expected the placeholder '<image>' .* for each of 0 images"):
        vlm.generate_until(instances(forged, 1, options))


def test_files_that_are_missing_or_do_not_belong_together_are_told(tmp_path):
    folder = tmp_path / "model"
    export(CHECKPOINT, folder, TypeChoice("Q8_0"))
    for arguments, said in (
        ({"type": "Q4_0"}, "type has no effect on files that are GGUF already"),
        ({"bits": 4}, "bits has no effect on a GGUF model: type= chooses"),
        ({"mmproj": TEXT_FILE, "gguf": VISION_FILE}, r"expected a language model as gguf= .* got mmproj.gguf \(clip\)"),
        ({"gguf": "other.gguf"}, "expected a GGUF file, and there is none at"),
        ({"kv_type": "f64"}, "kv_type must be one of f32"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"gpu_layers": -2}, "gpu_layers must be at least -1"),
        ({"thread": 2}, "unknown model argument 'thread', did you mean 'threads'"),
    ):
        with pytest.raises(ValueError, match=said):
            QuantGguf(pretrained=str(folder), **arguments)
    with pytest.raises(ValueError, match="holds GGUF files and no other weights: quant_gguf evaluates these"):
        wrapper.QuantNone(pretrained=str(folder))
    shutil.copy(folder / TEXT_FILE, folder / "more.gguf")
    with pytest.raises(ValueError, match=r"expected one GGUF file with a language model .* got model.gguf, more.gguf"):
        QuantGguf(pretrained=str(folder))
    (folder / VISION_FILE).unlink()
    (folder / "more.gguf").unlink()
    with pytest.raises(
        ValueError, match=r"a vision tower with its connector \(mmproj\) .* got none; name it with mmproj="
    ):
        QuantGguf(pretrained=str(folder))
    (folder / "config.json").unlink()
    export(CHECKPOINT, tmp_path / "whole", TypeChoice("Q8_0"))
    shutil.copy(tmp_path / "whole" / VISION_FILE, folder)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        QuantGguf(pretrained=str(folder))


def test_a_damaged_file_in_the_cache_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_PLUGIN_CACHE", str(tmp_path))
    arguments, options = ModelArguments(pretrained="demo"), GgufOptions(type="Q8_0")
    files = files_of(arguments, options)
    assert not files.text.exists(), "nothing is written before the first request"
    file = files.read().vision.path
    assert file == files.vision
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"may be damaged: .*: remove {file.parent}, which is then written again"):
        files_of(arguments, options)


def test_a_processor_of_another_checkpoint_is_noticed(tmp_path):
    folder, other = tmp_path / "model", tmp_path / "other"
    export(CHECKPOINT, folder, TypeChoice("Q8_0"))
    shutil.copytree(CHECKPOINT, other, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RequestError, match=r"the server read \d+ tokens, Idefics3Processor makes \d+; from token"):
        QuantGguf(pretrained=str(folder), processor=str(other), **EXACT).make_ready()


def test_where_images_stand_is_read_from_the_tokens():
    image = 9
    special = {1, 2, 5, 6}

    def decode(ids):
        return "".join(f"<{index}>" for index in ids)

    def found(shown, read):
        return list(places(shown, read, image, decode, special))

    # The processor writes nothing around an image.
    assert found([1, 9, 3], [1, 9, 9, 9, 3]) == [ImagePlace("<9>")]
    # It writes special tokens around it, which the server may write as well.
    assert found([1, 9, 3], [1, 5, 9, 9, 6, 3]) == [
        ImagePlace("<9>", "<5>", "<6>"),
        ImagePlace("<9>", "", "", "<5>", "<6>"),
    ]
    # The template writes them itself.
    assert found([1, 5, 9, 6, 3], [1, 5, 9, 9, 6, 3]) == [
        ImagePlace("<9>"),
        ImagePlace("<5><9><6>", "", "", "<5>", "<6>"),
    ]
    # Text around special tokens stays (Gemma 3).
    assert found([1, 5, 3], [1, 4, 5, 9, 9, 6, 4, 3])[1] == ImagePlace("<5>", "<4>", "<4>", "<5>", "<6>")
    # Tiles with separators, and an image without tokens, have no place.
    assert found([1, 9, 3], [1, 9, 5, 9, 3]) == found([1, 3], [1, 3]) == []


def test_an_answer_is_read_whole_or_not_at_all():
    whole = {"tokens": [4, 1, 7], "content": "ab", "stop_type": "limit", "tokens_evaluated": 3, "truncated": False}
    whole["completion_probabilities"] = [{"id": index, "logprob": -1.0} for index in whole["tokens"]]
    # The checkpoint ends at 1, and the server does not.
    choice = as_chat(whole, {1})["choices"][0]
    assert (choice["token_ids"], choice["finish_reason"]) == ([4, 1], "stop")
    assert [entry["id"] for entry in choice["logprobs"]["content"]] == [4, 1]
    assert as_chat(whole, {2})["choices"][0]["finish_reason"] == "length"
    with pytest.raises(ServerError, match="cut off after 3 tokens because prompt and answer do not fit"):
        as_chat(whole | {"truncated": True}, {2})
    with pytest.raises(ServerError, match="expected the ids of an answer's tokens"):
        as_chat({"content": "ab"}, {2})
    expect_effect({"generation_settings": {"temperature": 0.699999988}}, {"temperature": 0.7})
    with pytest.raises(ServerError, match=r"top_k: the server was sent 0 and took 40"):
        expect_effect({"generation_settings": {"top_k": 40}}, {"top_k": 0})


class ScriptedClient:
    """Answers `/completion` with what it is given, in order."""

    root = "http://127.0.0.1:9"

    def __init__(self, *responses):
        self.responses, self.bodies = list(responses), []

    def post(self, url, body, images=None, *, patient=True):
        if url.endswith("/tokenize"):
            return {"tokens": [6]}
        self.bodies.append(body)
        return self.responses.pop(0)


def test_a_token_in_which_a_stop_begins_gets_its_probability_by_a_second_request(local):
    tokenizer = local.chat.tokenizer
    index = next(index for index in range(8, 396) if len(tokenizer.decode([index]).strip()) > 1)
    stop = tokenizer.decode([index])[1:]
    told = {"tokens": [index], "content": "", "stop_type": "word", "tokens_evaluated": 1, "truncated": False}
    whole = told | {"stop_type": "limit", "completion_probabilities": [{"id": index, "token": "", "logprob": -2.0}]}
    client = ScriptedClient(told, whole)
    asking = RenderedAsking("demo", "<marker>", ImagePlace("<image>"), "", local.chat, frozenset({1}))
    body = asking.body({"prompt_string": "<|user|>", "multimodal_data": []}, GenerationSettings(9, until=(stop,)))
    (choice,) = asking.ask(client, body)["choices"]
    assert [one["n_predict"] for one in client.bodies] == [9, 1]
    assert (client.bodies[0]["stop"], "stop" in client.bodies[1]) == ([stop], False)
    assert (choice["finish_reason"], choice["logprobs"]["content"][0]["logprob"]) == ("stop", -2.0)


def test_parts_of_a_character_have_no_probability_and_their_answer_no_confidence(local):
    from lmms_plugin.vlm.generation.special_tokens import special_tokens
    from lmms_plugin.vlm.served.tokens import BY_CHARACTERS, Vocabulary

    tokenizer = local.chat.tokenizer
    vocabulary = Vocabulary(tokenizer, frozenset({1}), special_tokens(tokenizer, frozenset({1})))
    ids = tokenizer.encode("7é8", add_special_tokens=False)
    assert len(ids) == 4
    told = [{"id": index, "token": "", "logprob": -1.0, "top_logprobs": []} for index in (ids[0], *ids[2:])]
    choice = {"message": {"content": "7é8"}, "finish_reason": "length", "token_ids": ids, "logprobs": {"content": told}}
    with pytest.raises(ServerError, match="4 tokens and log-probabilities of 3 of them"):
        vocabulary.read(choice, (), probabilities=True, digits=True)
    generated = vocabulary.read(choice | {BY_CHARACTERS: True}, (), probabilities=True, digits=True)
    assert "".join(token.text for token in generated.tokens) == "7é8"
    assert [np.isnan(token.logprob) for token in generated.tokens] == [False, True, False, False]
    lost = choice | {BY_CHARACTERS: True, "logprobs": {"content": told[1:]}}
    with pytest.raises(ServerError, match="none of '7'"):
        vocabulary.read(lost, (), probabilities=True, digits=True)
