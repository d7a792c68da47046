"""A served model beside the same model loaded here: over HTTP, in the ways of six engines, and when they fail."""

import json
import threading
import time

import pytest
from helpers.served import BLIND, ENGINES, SCORING, FakeServer, Reply

from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import Response
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.vlm import wrapper
from lmms_plugin.vlm.served.client import ServerError
from lmms_plugin.vlm.served.model import QuantServed

COUNT = 12


def plain(doc):
    return [{"role": "user", "content": [{"type": "image", "url": doc["image"]}, {"type": "text", "text": "What?"}]}]


@pytest.fixture(scope="module")
def local(documents):
    vlm = wrapper.QuantNone(pretrained="demo", device="cpu", verbalised=True)
    vlm.task_dict = documents
    return vlm


@pytest.fixture(scope="module")
def expected(local, instances):
    return list(map(Response.decode, local.generate_until(instances(comprehension.doc_to_messages, COUNT))))


@pytest.fixture
def serve(demo, documents):
    """A function that starts a server and returns it with the model behind it, as lmms-eval has it."""
    started = []

    def start(engine="vllm", *, options=None, **ways):
        server = FakeServer(demo, engine, **ways)
        started.append(server.__enter__())
        vlm = QuantServed(**{"pretrained": "demo", "base_url": server.url, "retries": 1, **(options or {})})
        vlm.task_dict = documents
        return server, vlm

    yield start
    for server in started:
        server.stop()


def close(alternatives, others):
    for name in alternatives.probabilities.keys() | others.probabilities.keys():
        assert alternatives.probabilities.get(name, 0) == pytest.approx(others.probabilities.get(name, 0), abs=1e-4)
    return True


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_are_those_of_the_model_loaded_here(engine, serve, instances, expected):
    _, vlm = serve(engine, options={"verbalised": True})
    found = list(map(Response.decode, vlm.generate_until(instances(comprehension.doc_to_messages, COUNT))))
    for mine, theirs in zip(expected, found, strict=True):
        assert (mine.text, mine.statement) == (theirs.text, theirs.statement)
        assert (mine.original_size, mine.dialect, mine.opened) == (theirs.original_size, theirs.dialect, theirs.opened)
        assert (theirs.tokens == ()) == (not theirs.records_digits) == (engine in BLIND)
        for token, other in zip(mine.tokens, theirs.tokens, strict=engine not in BLIND):
            assert token.text == other.text
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert (token.alternatives is None) == (other.alternatives is None)
            assert token.alternatives is None or close(token.alternatives, other.alternatives)
    assert vlm.figures()["served_prompts_compared"] == 2 * COUNT
    assert vlm.account()["prompts"] == ("ids" if engine == "vllm" else "number")


def test_plain_tasks_get_plain_text(local, serve, instances):
    asked = instances(plain, 4)
    for engine in ENGINES:
        assert serve(engine)[1].generate_until(asked) == local.generate_until(asked)


def test_what_the_server_tells_and_what_its_user_states_is_in_the_account(serve, tmp_path):
    place = tmp_path / "account.json"
    _, vlm = serve("sglang", options={"method": "awq", "bits": 4, "report": str(place)})
    account = json.loads(place.read_text())["served"]
    assert account["served"]["engine"], account["served"]["version"] == ("sglang", "0.5.23")
    assert account["served"]["told"]["quantization"] == "awq"
    assert (account["stated"], account["of_stated"]) == ({"method": "awq", "bits": 4}, "stated, not verified")
    assert account["digits"] == vlm.found.digits == "top_logprobs (20)"
    _, vlm = serve("vllm")
    assert vlm.account()["digits"] == "logprob_token_ids"
    assert vlm.account()["served"]["told"]["logprobs_mode"] == "raw_logprobs"


def test_nothing_of_sampling_is_left_to_the_server(serve, instances):
    server, vlm = serve(options={"samples": 2, "sample_temperature": 0.7})
    options = {"max_new_tokens": 9, "temperature": 0, "until": ["\n"], "repetition_penalty": 1.5}
    vlm.generate_until(instances(comprehension.doc_to_messages, 2, options))
    answers = [body for body in server.requests[1:] if body["temperature"] == 0]
    drawn = [body for body in server.requests[1:] if body["temperature"] == 0.7]
    assert (len(answers), len(drawn), len({body["seed"] for body in drawn})) == (2, 4, 4)
    for body in (*answers, *drawn):
        stated = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        stated |= {"repetition_penalty": 1.5, "max_tokens": 9, "stop": ["\n"], "n": 1, "stream": False}
        assert stated.items() <= body.items()


def test_samples_are_the_same_again(serve, instances):
    def sampled():
        _, vlm = serve(options={"samples": 3})
        texts = vlm.generate_until(instances(comprehension.doc_to_messages, 4))
        return [Response.decode(text).samples for text in texts]

    first = sampled()
    assert first == sampled()
    assert all(len(samples) == 3 for samples in first)


def test_a_task_that_wants_what_the_server_has_no_field_for_is_refused(serve, instances):
    _, vlm = serve("tensorrt_llm")
    with pytest.raises(RequestError, match="document 0: repetition_penalty: this server knows only OpenAI's fields"):
        vlm.generate_until(instances(plain, 1, {"max_new_tokens": 4, "temperature": 0, "repetition_penalty": 2.0}))


def picture_of(body):
    return next(part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url")


@pytest.mark.parametrize(
    ("engine", "version", "waits"),
    [("vllm", "0.32.0", False), ("vllm", "0.10.2", True), ("vllm", "main", True), ("sglang", "", True)],
)
def test_questions_about_one_image_wait_for_the_first_unless_the_server_shares_at_once(
    serve, instances, engine, version, waits
):
    """The server holds the first question about each image back until another one about it comes, or does not."""
    came, held = {}, []
    lock = threading.Lock()

    def hold(number, body):
        picture = picture_of(body)
        with lock:
            first = picture not in came
            another = came.setdefault(picture, threading.Event())
        if number and first:
            # Most images have several questions; where these wait, none can come.
            held.append(another.wait(0.2 if waits else 1.0))
        elif number:
            another.set()

    server, vlm = serve(engine, version=version, fault=hold, options={"concurrency": 4})
    vlm.generate_until(instances(comprehension.doc_to_messages, COUNT))
    pictures = [picture_of(body) for body in server.requests[1:]]
    assert len(pictures) == COUNT
    assert 1 < len(set(pictures)) == len(held) < COUNT
    assert any(held) is not waits
    assert 1 < server.in_flight[1] <= 4


FAULTS = {
    "a redirect": (Reply(b"", 307, {"Location": "http://elsewhere.example/v1"}), "redirects to http://elsewhere"),
    "HTML": (Reply(b"<!DOCTYPE html><p>Hello", type="text/html"), "answers with HTML, not JSON: base_url must be"),
    "half a response": (Reply(b'{"choices": [{"mess', cut=1000), "broke off in the middle of a response"),
    "half of the JSON": (Reply(b'{"choices": [{"mess'), "sent half a response or no JSON"),
    "an error inside": (Reply.of({"error": {"message": "out of memory"}}), "200 with an error inside: out of memory"),
    "no choices": (Reply.of({"object": "list"}), "expected choices in the response, got object"),
    "log-probabilities of another form": (
        Reply.of({"choices": [{"message": {"content": "<"}, "logprobs": {"content": [3]}, "finish_reason": "stop"}]}),
        "expected logprobs.content as in OpenAI's chat API, got 3",
    ),
    "a text in parts": (
        Reply.of({"choices": [{"message": {"content": [{"type": "text", "text": "<"}]}, "finish_reason": "stop"}]}),
        "expected content as in OpenAI's chat API, got .{'type': 'text'",
    ),
    "a refused key": (Reply.of({"error": "no such key"}, 401), "refuses a request without key .401.: no such key; set"),
    "too long": (
        Reply.of({"error": {"message": "This model's maximum context length is 512 tokens."}}, 400),
        "maximum context length is 512 tokens.; prompt and answer do not fit",
    ),
    "too large": (Reply.of({"error": {"message": "Payload Too Large"}}, 413), "the image is too large for the server"),
    "an engine that died": (Reply.of({"error": {"message": "EngineDeadError"}}, 500), "500: EngineDeadError"),
    "aborted": (
        Reply.of({"choices": [{"message": {"content": "<"}, "finish_reason": "abort"}]}),
        "the answer was broken off .finish_reason 'abort'",
    ),
}


@pytest.mark.parametrize(("reply", "said"), FAULTS.values(), ids=FAULTS)
def test_a_failure_names_document_and_words_and_is_no_answer(reply, said, serve, instances):
    _, vlm = serve(fault=lambda number, body: reply if number >= 4 else None)
    with pytest.raises(RequestError, match=rf"^task toy, document \d+: .*{said}") as error:
        vlm.generate_until(instances(comprehension.doc_to_messages, COUNT))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("reply", "said"), FAULTS.values(), ids=FAULTS)
def test_the_same_failures_are_told_before_the_run(reply, said, serve):
    with pytest.raises(ServerError, match=said):
        serve(fault=lambda number, body: reply)


def changed(response, **values):
    response["choices"][0].update(values)


def _masked(response):
    for entry in response["choices"][0]["logprobs"]["content"]:
        entry["logprob"] = -9999.0


def _unnormalised(response):
    for entry in response["choices"][0]["logprobs"]["content"]:
        entry["logprob"] = 7.5


def _speculative(response):
    del response["choices"][0]["logprobs"]["content"][1]


def _misspelt(response):
    response["choices"][0]["message"]["content"] = "quite another answer"


def _foreign(response):
    response["choices"][0]["token_ids"][0] = 151_643


def _none(response):
    response["choices"][0]["logprobs"] = None


STRANGE = {
    "placeholders": (_masked, "comes with -9999, which stands for no probability"),
    "logits": (_unnormalised, "comes with 7.5, above 0: this is no logarithm of a probability"),
    "tokens without probability": (_speculative, "tokens and log-probabilities of"),
    "tokens that do not spell the text": (_misspelt, "tokens spell .* and its text is 'quite another answer'"),
    "another tokenizer": (_foreign, "token 151643 is beyond the 396 tokens of the checkpoint"),
    "no log-probabilities any more": (_none, "log-probabilities of 0 of them"),
}


@pytest.mark.parametrize(("change", "said"), STRANGE.values(), ids=STRANGE)
def test_what_is_no_probability_is_never_taken_for_one(change, said, serve, instances):
    server, vlm = serve()
    server.change = change
    with pytest.raises(RequestError, match=rf"^task toy, document \d+: .*{said}"):
        vlm.generate_until(instances(comprehension.doc_to_messages, COUNT))


def _other_prompt(response):
    response["prompt_token_ids"] = [*response["prompt_token_ids"], 5, 6]
    response["usage"]["prompt_tokens"] += 2


def test_a_server_that_reads_another_prompt_is_told_before_the_run(serve):
    with pytest.raises(
        RequestError, match=r"the server read .* tokens, Idefics3Processor makes .*from token .*template"
    ):
        serve(change=_other_prompt)
    with pytest.raises(RequestError, match=r"the server read \d+ tokens, Idefics3Processor makes \d+: expected"):
        serve("sglang", change=lambda response: response["usage"].update(prompt_tokens=7))


def test_with_mismatch_warn_the_run_goes_on_and_its_results_say_so(serve, instances, expected):
    _, vlm = serve(change=_other_prompt, options={"mismatch": "warn"})
    found = vlm.generate_until(instances(comprehension.doc_to_messages, COUNT))
    assert [Response.decode(text).text for text in found] == [one.text for one in expected]
    assert vlm.figures()["served_prompts_different"] == COUNT


def test_a_busy_server_is_left_alone_as_long_as_it_asks(serve, instances, expected):
    came: list[float] = []
    lock = threading.Lock()

    def busy(number, body):
        with lock:
            came.append(time.monotonic())
            return Reply.of({"error": "too many"}, 429, Retry_After="0.3") if 3 <= len(came) < 7 else None

    _, vlm = serve(fault=busy, options={"retries": 8, "concurrency": 4})
    found = vlm.generate_until(instances(comprehension.doc_to_messages, COUNT))
    assert [Response.decode(text).text for text in found] == [one.text for one in expected]
    assert vlm.responder.engine.gate.lowest < 4


def test_a_server_that_dies_in_the_middle_ends_the_run_and_the_next_goes_on(serve, instances, expected, tmp_path):
    kept = {"resume_folder": str(tmp_path), "retries": 0, "concurrency": 2}
    asked = instances(comprehension.doc_to_messages, COUNT)
    died = Reply(b'{"choices": [{"mess', cut=1000)
    _, vlm = serve(options=kept, fault=lambda number, body: died if number >= 6 else None)
    with pytest.raises(RequestError, match=r"task toy, document \d+: .* broke off in the middle of a response"):
        vlm.generate_until(asked)
    (file,) = tmp_path.iterdir()
    answered = len(file.read_text().splitlines())
    assert 3 <= answered < COUNT
    # Killed while it wrote.
    file.write_text(file.read_text() + '{"key": "abc')
    again, vlm = serve(options=kept)
    found = vlm.generate_until(asked)
    assert len(again.requests) == 1 + COUNT - answered
    assert [Response.decode(text).text for text in found] == [one.text for one in expected]
    assert vlm.figures()["served_prompts_compared"] == COUNT
    vlm.clean()
    assert not list(tmp_path.iterdir())


def test_the_key_goes_to_the_server_and_nowhere_else(serve, instances, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LMMS_PLUGIN_API_KEY", "sk-secret")
    place = tmp_path / "account.json"
    server, vlm = serve(key="sk-secret", options={"report": str(place), "resume_folder": str(tmp_path / "kept")})
    vlm.generate_until(instances(comprehension.doc_to_messages, 2))
    assert set(server.keys) == {"Bearer sk-secret"}
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
    said = capsys.readouterr()
    assert "sk-secret" not in written + said.out + said.err + repr(vlm.responder)
    monkeypatch.setenv("LMMS_PLUGIN_API_KEY", "sk-other")
    with pytest.raises(ServerError, match=r"refuses the key in LMMS_PLUGIN_API_KEY .401.: Incorrect") as error:
        serve(key="sk-secret")
    assert "sk-other" not in str(error.value)


def test_which_model_is_asked(serve, demo):
    with pytest.raises(ServerError, match=r"serves 2 models .one, two.: name one with model="):
        serve(models=("one", "two"))
    _, vlm = serve(models=("one", "two"), options={"model": "two"})
    assert vlm.served.model == "two"
    with pytest.raises(ServerError, match=r"serves no 'dem', did you mean 'demo'\?"):
        serve(options={"model": "dem"})


def test_no_server_and_a_wrong_path_are_told_at_once(serve):
    server, _ = serve()
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"no server answers at http://127.0.0.1:9/v1 .*check host and port"):
        QuantServed(pretrained="demo", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ServerError, match="answers 404: Not Found; base_url must be the address of the API"):
        QuantServed(pretrained="demo", base_url=server.url.removesuffix("/v1"))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"base_url": None}, "base_url is missing"),
        ({"base_url": "127.0.0.1:8000"}, "base_url must be the address of an API"),
        ({"base_url": "http://me:sk-1@host/v1"}, "base_url must hold no key"),
        ({"pretrained": None}, "pretrained is missing"),
        ({"mismatch": "ignore"}, "mismatch must be one of error, warn"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"calibration": "noise"}, "calibration has no effect on a served model"),
        ({"selector": "file.pt"}, "selector has no effect on a served model"),
        ({"conc": 3}, "unknown model argument 'conc'"),
    ],
)
def test_arguments_that_say_nothing_are_refused(arguments, said):
    given = {"pretrained": "demo", "base_url": "http://127.0.0.1:9/v1"} | arguments
    with pytest.raises(ValueError, match=said):
        QuantServed(**{name: value for name, value in given.items() if value is not None})


def candidates(doc):
    return [{**plain(doc)[0], "candidates": ["a red circle", "two", "<0, 1, 2>"]}]


SCORED = {"candidates": True, "max_new_tokens": 1}


@pytest.mark.parametrize("engine", SCORING)
def test_likelihoods_are_those_of_the_model_loaded_here(engine, local, serve, instances, tmp_path):
    mine = [Response.decode(text).scores for text in local.generate_until(instances(candidates, 3, SCORED))]
    server, vlm = serve(engine, options={"resume_folder": str(tmp_path)})
    requests = []
    for _ in range(2):
        theirs = [Response.decode(text).scores for text in vlm.generate_until(instances(candidates, 3, SCORED))]
        for one, other in zip(mine, theirs, strict=True):
            assert other["tokens"] == one["tokens"]
            assert other["logprob"] == pytest.approx(one["logprob"], abs=1e-4)
        requests.append(len(server.requests))
    # The second time they come from the file.
    assert requests[0] == requests[1] > 3
    salts = [body["cache_salt"] for body in server.requests if "prompt_logprobs" in body]
    assert len(set(salts)) == len(salts) == (requests[0] - 1) * (engine == "vllm")


def rows_of(response):
    return response.get("prompt_logprobs") or response.get("meta_info", {}).get("input_token_logprobs")


def last_row(changed):
    def change(response):
        if rows := rows_of(response):
            rows[-1] = changed(rows[-1])

    return change


def without_best(response):
    response.get("meta_info", {}).pop("input_top_logprobs", None)


def without_rank(row):
    return {index: {"logprob": entry["logprob"]} for index, entry in row.items()}


@pytest.mark.parametrize(
    ("engine", "change", "said"),
    [
        ("vllm", last_row(lambda row: 5), "expected rows of prompt_logprobs to be a mapping of token ids each, got 5"),
        ("vllm", last_row(without_rank), "expected prompt_logprobs with a logprob and a rank for token"),
        ("vllm", last_row(lambda row: dict.fromkeys(row, -0.5)), r"with a logprob and a rank for token \d+, got -0.5"),
        (
            "sglang",
            last_row(lambda row: -0.5),
            "input_token_logprobs to be log-probability and token id each, got -0.5",
        ),
        ("sglang", last_row(lambda row: row[:1]), "input_token_logprobs to be log-probability and token id each, got"),
        ("sglang", last_row(lambda row: ["x", *row[1:]]), "input_token_logprobs to be log-probability and token id"),
        ("sglang", without_best, "expected input_top_logprobs of .* tokens in SGLang's response, got None"),
    ],
    ids=["number", "no rank", "no mapping", "number of SGLang", "no id", "no number", "no best"],
)
def test_likelihoods_in_another_shape_are_told(engine, change, said, serve, instances):
    server, vlm = serve(engine)
    server.change = change
    with pytest.raises(RequestError, match=said):
        vlm.generate_until(instances(candidates, 1, SCORED))


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine not in SCORING])
def test_likelihoods_are_refused_by_name_where_the_server_has_none(engine, serve, instances):
    _, vlm = serve(engine)
    with pytest.raises(RequestError, match=r"document 0: .* no log-probabilities of given texts .* vLLM and SGLang do"):
        vlm.generate_until(instances(candidates, 1, SCORED))
