"""What goes wrong behind each engine's way of the API: one clear line that names the document, and never an answer.

One model per engine is asked again and again; only the server changes.
"""

import json
import math
import threading
import time

import pytest
from helpers.served import BLIND, ENGINES, FakeServer, Reply

from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import Response
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.vlm.served.client import ServerError
from lmms_plugin.vlm.served.model import QuantServed

TELLING = [engine for engine in ENGINES if engine not in BLIND]
WITHOUT_IDS = [engine for engine in TELLING if engine not in ("vllm", "llamacpp")]
KEY = "sk-secret"


@pytest.fixture(scope="module", params=ENGINES)
def behind(request, demo, documents):
    """A server and the model behind it, one request at a time, no second tries."""
    with pytest.MonkeyPatch.context() as patch, FakeServer(demo, request.param, key=KEY) as server:
        patch.setenv("LMMS_PLUGIN_API_KEY", KEY)
        vlm = QuantServed(pretrained="demo", base_url=server.url, retries=0, concurrency=1)
        vlm.task_dict = documents
        yield server, vlm


@pytest.fixture
def asked(behind, instances):
    """A function that asks one question while the server fails in a way."""
    server, vlm = behind

    def ask(fault=None, change=None):
        server.fault = fault or (lambda number, body: None)
        server.change = change or (lambda response: None)
        try:
            return Response.decode(vlm.generate_until(instances(comprehension.doc_to_messages, 1))[0])
        finally:
            server.fault, server.change = (lambda number, body: None), (lambda response: None)

    return ask


def told(asked, said, **ways):
    with pytest.raises(RequestError, match=rf"^task toy, document 0: .*{said}") as error:
        asked(**ways)
    assert "\n" not in str(error.value)
    assert KEY not in str(error.value)


def _error(message, **more):
    return {"error": {"message": message, **more}}


def _flat(message, **more):
    return {"object": "error", "message": message, **more}


TOO_LONG = {
    "vllm": _error("This model's maximum context length is 512 tokens. However, you requested 600.", code=400),
    "sglang": _flat("The input is longer than the model's context length (512 tokens).", code=400),
    "lmdeploy": _flat("The maximum context length of the model is 512 tokens", code=400),
    "llamacpp": _error("the request exceeds the available context size", type="exceed_context_size_error"),
    "tensorrt_llm": _flat("The prompt is too long: prompt length and max_tokens exceed max_num_tokens (512)"),
    "ollama": _error("input exceeds maximum context length", type="invalid_request_error"),
    "ollama_cloud": _error("prompt too long; exceeded max context length by 88 tokens"),
}
"""Words in which engines refuse what does not fit, as far as their sources and users' reports show them."""
FLAT = ("sglang", "lmdeploy", "tensorrt_llm")


def test_a_context_that_is_too_short(behind, asked):
    told(asked, "prompt and answer do not fit", fault=lambda *_: Reply.of(TOO_LONG[behind[0].engine], 400))


@pytest.mark.parametrize("html", [False, True], ids=["JSON", "the HTML of a proxy"])
def test_an_image_that_is_too_large(behind, asked, html):
    words = "Request Entity Too Large"
    shape = _flat if behind[0].engine in FLAT else _error
    reply = Reply(f"<html>{words}</html>".encode(), 413, type="text/html") if html else Reply.of(shape(words), 413)
    told(asked, "the image is too large for the server: max_pixels=", fault=lambda *_: reply)


def test_a_key_that_is_refused(behind, asked, monkeypatch):
    monkeypatch.setattr(behind[0], "key", "another")
    told(asked, r"refuses the key in LMMS_PLUGIN_API_KEY .401.: .*\*\*\*")


def test_a_model_that_is_gone(behind, asked, monkeypatch):
    monkeypatch.setattr(behind[0], "models", ("another",))
    told(asked, "answers 404: .*model= a name that it serves")


def test_a_wrong_name_and_a_wrong_path(behind):
    server, _ = behind
    with pytest.raises(ServerError, match="serves no 'dem', did you mean 'demo'"):
        QuantServed(pretrained="demo", base_url=server.url, model="dem")
    with pytest.raises(ServerError, match="base_url must be the address of the API"):
        QuantServed(pretrained="demo", base_url=server.url.removesuffix("/v1"))


@pytest.mark.parametrize("inside", ["error", "object"])
def test_200_with_an_error_inside(asked, inside):
    value = _error("CUDA out of memory") if inside == "error" else _flat("CUDA out of memory")
    told(asked, "answers 200 with an error inside: CUDA out of memory", fault=lambda *_: Reply.of(value))


def test_html_in_the_place_of_json(asked):
    told(asked, "answers with HTML, not JSON", fault=lambda *_: Reply(b"<html>Sign in</html>", type="text/html"))


def test_half_a_response(asked):
    told(asked, "broke off in the middle of a response", fault=lambda *_: Reply(b'{"choices": [{"me', cut=99))
    told(asked, "half a response or no JSON", fault=lambda *_: Reply(b'{"choices": [{"me'))


def test_an_answer_that_was_aborted(asked):
    told(asked, "broken off .finish_reason 'abort'", change=lambda one: one["choices"][0].update(finish_reason="abort"))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_another_host_never_gets_the_key(asked, demo, status):
    with FakeServer(demo) as other:
        place = other.url.replace("127.0.0.1", "localhost") + "/chat/completions"
        told(
            asked,
            "redirects to http://localhost:.* not followed",
            fault=lambda *_: Reply(b"", status, {"Location": place}),
        )
        assert other.keys == other.requests == []


def test_another_checkpoint_or_template(asked):
    def longer(response):
        response["usage"]["prompt_tokens"] += 2
        if "prompt_token_ids" in response:
            response["prompt_token_ids"] += [5, 6]

    told(asked, r"the server read \d+ tokens, Idefics3Processor makes \d+", change=longer)


def test_after_all_that_it_answers(behind, asked):
    answer = asked()
    assert answer.text
    assert (answer.tokens == ()) == (behind[0].engine in BLIND)


def entries(response):
    return response["choices"][0]["logprobs"]["content"]


@pytest.fixture
def telling(behind, asked):
    if behind[0].engine in BLIND:
        pytest.skip("gives no log-probabilities")
    return asked


def test_log_probabilities_that_stop_coming(telling):
    told(
        telling,
        "(were asked for and none came|of 0 of them)",
        change=lambda one: one["choices"][0].update(logprobs=None),
    )


def test_tokens_without_probability(telling):
    """Speculative decoding, and partial characters in llama.cpp, leave tokens out."""
    told(telling, "(tokens and log-probabilities of|tokens spell)", change=lambda one: entries(one).pop(1))


def test_tokens_that_come_as_one(telling):
    """SGLang, issue 28456: the text of several tokens with the log-probability of one."""

    def grouped(response):
        second = entries(response).pop(2)
        first = entries(response)[1]
        first["token"] += second["token"]
        first["bytes"] += second["bytes"]

    told(telling, "(tokens that are|tokens and log-probabilities of|tokens spell)", change=grouped)


def test_tokens_that_do_not_spell_the_text(telling):
    told(
        telling,
        "tokens spell .* and its text is 'another'",
        change=lambda one: one["choices"][0]["message"].update(content="another"),
    )


@pytest.mark.parametrize("value", [-9999.0, -math.inf, math.nan, 3.0])
def test_numbers_that_are_no_log_probabilities(telling, value):
    def put(response):
        for entry in entries(response):
            entry["logprob"] = value

    told(telling, "(stands for no probability|no logarithm of a probability)", change=put)


def test_alternatives_that_a_mask_has_taken_away(telling, instances, behind):
    """After a mask the token that is left has probability 1, and all others none."""

    def masked(response):
        for entry in entries(response):
            entry["logprob"] = 0.0
            for other in entry["top_logprobs"]:
                other["logprob"] = -9999.0

    told(telling, "stands for no probability: was the answer forced", change=masked)


def test_alternatives_of_another_distribution(telling):
    def hot(response):
        for entry in entries(response):
            for other in entry["top_logprobs"]:
                other["logprob"] = -0.01

    told(telling, "add up to .* no log-probabilities of one distribution", change=hot)


def test_an_id_beyond_the_vocabulary(telling, behind):
    if behind[0].engine in WITHOUT_IDS:
        pytest.skip("tells no ids")

    def foreign(response):
        for one in (entries(response)[0], *entries(response)[0]["top_logprobs"]):
            one.update(id=151_643, token="token_id:151643")
        if "token_ids" in response["choices"][0]:
            response["choices"][0]["token_ids"][0] = 151_643

    told(telling, "token 151643 is beyond the 396 tokens of the checkpoint", change=foreign)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_without_log_probabilities_is_told_before_the_run(engine, demo, documents, instances, monkeypatch):
    """LMDeploy, issue 3243: `logprobs` is null for some quantized models."""
    said = []
    monkeypatch.setattr("lmms_plugin.vlm.served.probing.logger.warning", lambda text, *values: said.append(text))

    def none(response):
        response["choices"][0]["logprobs"] = None

    with FakeServer(demo, engine, change=none) as server:
        vlm = QuantServed(pretrained="demo", base_url=server.url)
        vlm.task_dict = documents
        answer = Response.decode(vlm.generate_until(instances(comprehension.doc_to_messages, 1))[0])
    assert len(said) == 1
    assert "no log-probabilities" in said[0]
    assert answer.tokens == ()
    assert answer.text
    assert not vlm.figures()["served_with_log_probabilities"]


def test_a_server_that_is_gone_ends_the_run_at_once(demo, documents, instances):
    """A request that hangs while another one fails is broken off, too."""
    released = threading.Event()

    def hang_or_die(number, body):
        if number == 2:
            released.wait(30)
        return Reply.of(_error("EngineDeadError"), 500) if number == 3 else None

    with FakeServer(demo, fault=hang_or_die) as server:
        vlm = QuantServed(pretrained="demo", base_url=server.url, retries=0, concurrency=2)
        vlm.task_dict = documents
        with pytest.raises(RequestError, match="EngineDeadError"):
            vlm.generate_until(instances(comprehension.doc_to_messages, 10))
        ends = time.monotonic() + 10
        while _asking() and time.monotonic() < ends:
            time.sleep(0.01)
        assert not _asking()
        released.set()
    with pytest.raises(ServerError, match=r"no server answers at .* start it, or check host and port"):
        QuantServed(pretrained="demo", base_url=server.url)


def _asking():
    return [thread for thread in threading.enumerate() if thread.name.startswith("lmms-plugin-ask")]


def test_bodies_with_images_by_name_are_what_json_would_write(demo, documents, instances):
    """An image is encoded once for all its questions; what arrives is plain JSON."""
    with FakeServer(demo) as server:
        vlm = QuantServed(pretrained="demo", base_url=server.url)
        vlm.task_dict = documents
        vlm.generate_until(instances(comprehension.doc_to_messages, 4))
    for body in server.requests:
        urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
        assert len(urls) == 1
        assert urls[0].startswith("data:image/png;base64,")
        assert "image:" not in json.dumps(body).replace("data:image", "")
