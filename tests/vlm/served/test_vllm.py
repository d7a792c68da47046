"""The embedded demo in the real vLLM on the CPU, beside the same model loaded here (`make test-served`)."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.environments import run
from helpers.vllm_server import interpreter, serving
from lmms_eval.api.instance import Instance

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import Response
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.vlm import wrapper
from lmms_plugin.vlm.served.client import ServerError
from lmms_plugin.vlm.served.model import QuantServed

pytestmark = [pytest.mark.served, pytest.mark.slow]
BIN = Path(sys.executable).parent
COUNT = 60
KILLS = 5
QUESTION = "What is in this picture?"
TEXTS = ["a red circle", "two", "<10, 20, 30, 40>", "the small green square left of the circle"]


@pytest.fixture(scope="session")
def url(tmp_path_factory):
    """Address of a server that has answered a question about an image."""
    if interpreter() is None:
        pytest.skip("VLLM_ENV names no environment with vLLM; make test-served makes one")
    with serving(CHECKPOINT, "float32", tmp_path_factory.mktemp("vllm") / "log") as (address, _):
        yield address


def test_tokens_and_probabilities_are_those_of_the_model_loaded_here(url, documents, instances):
    asked = instances(comprehension.doc_to_messages, len(documents["toy"]["test"]))
    local, served = wrapper.QuantNone(pretrained="demo", device="cpu"), QuantServed(pretrained="demo", base_url=url)
    for vlm in (local, served):
        vlm.task_dict = documents
    pairs = zip(local.generate_until(asked), served.generate_until(asked), strict=True)
    for mine, theirs in ((Response.decode(one), Response.decode(other)) for one, other in pairs):
        assert [token.text for token in mine.tokens] == [token.text for token in theirs.tokens]
        for token, other in zip(mine.tokens, theirs.tokens, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
            listed = [one.alternatives.probabilities if one.alternatives else {} for one in (token, other)]
            for digits in listed[0].keys() | listed[1].keys():
                assert listed[0].get(digits, 0) == pytest.approx(listed[1].get(digits, 0), abs=1e-4)
    account = served.account()
    assert (account["prompts"], account["digits"], account["token_ids"]) == ("ids", "logprob_token_ids", True)
    assert account["served"]["told"]["dtype"] == "torch.float32"


def test_samples_are_the_same_again_and_the_answer_is_the_greedy_one(url, documents, instances):
    asked = instances(comprehension.doc_to_messages, 3)
    drawn, texts = [], []
    for _ in range(2):
        vlm = QuantServed(pretrained="demo", base_url=url, samples=4, sample_temperature=1.5)
        vlm.task_dict = documents
        found = [Response.decode(text) for text in vlm.generate_until(asked)]
        drawn.append([one.samples for one in found])
        texts.append([one.text for one in found])
    assert drawn[0] == drawn[1]
    assert len({sample for samples in drawn[0] for sample in samples}) > 3
    local = wrapper.QuantNone(pretrained="demo", device="cpu")
    local.task_dict = documents
    greedy = [Response.decode(text).text for text in local.generate_until(asked)]
    assert texts == [greedy, greedy]


def test_a_task_that_samples_gets_the_same_again_and_another_seed_something_else(url, documents, instances):
    options = {"max_new_tokens": 24, "temperature": 1.5, "do_sample": True, "top_p": 0.9, "top_k": 40}
    asked = instances(comprehension.doc_to_messages, 6, options)
    found = []
    for seed in (1, 1, 2):
        vlm = QuantServed(pretrained="demo", base_url=url, seed=seed)
        vlm.task_dict = documents
        found.append([Response.decode(text).text for text in vlm.generate_until(asked)])
    assert found[0] == found[1] != found[2]


def candidates(doc):
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content, "candidates": TEXTS}]


def test_likelihoods_are_those_of_the_model_loaded_here_whatever_is_in_the_cache(url, documents, instances):
    asked = instances(candidates, len(documents["toy"]["test"]), {"candidates": True, "max_new_tokens": 1})
    found = []
    for vlm in (wrapper.QuantNone(pretrained="demo", device="cpu"), *(_served(url) for _ in range(2))):
        vlm.task_dict = documents
        found.append([Response.decode(text).scores for text in vlm.generate_until(asked)])
        # What is asked first fills the cache for what comes later.
        asked = asked[::-1]
    local, first, again = found[0], found[1][::-1], found[2]
    for mine, *theirs in zip(local, first, again, strict=True):
        for other in theirs:
            assert other["tokens"] == mine["tokens"]
            assert other["logprob"] == pytest.approx(mine["logprob"], abs=1e-4)


def test_what_greedy_decoding_would_write_is_known_as_such(url, documents, instances):
    """By `loglikelihood`, whose second value tells it."""
    local, served = wrapper.QuantNone(pretrained="demo", device="cpu"), _served(url)
    for vlm in (local, served):
        vlm.task_dict = documents
    written = local.generate_until(instances(_plain, 1))[0]
    asked = [_likelihood(text) for text in (written, "two")]
    mine, theirs = local.scores(asked), served.scores(asked)
    assert [one.is_greedy for one in mine] == [one.is_greedy for one in theirs] == [True, False]
    for one, other in zip(mine, theirs, strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)


def _served(url):
    return QuantServed(pretrained="demo", base_url=url)


def _plain(doc):
    return [{key: value for key, value in candidates(doc)[0].items() if key != "candidates"}]


def _likelihood(text):
    arguments = (QUESTION, text, lambda doc: [doc["image"]], 0, "toy", "test")
    return Instance("loglikelihood", arguments, 0, metadata={"task": "toy", "doc_id": 0, "repeats": 1})


def test_what_vllm_refuses_is_told(url, documents, instances):
    with pytest.raises(ServerError, match="serves no 'dem', did you mean 'demo'"):
        QuantServed(pretrained="demo", base_url=url, model="dem")
    vlm = QuantServed(pretrained="demo", base_url=url)
    vlm.task_dict = documents
    with pytest.raises(RequestError, match=r"document 0: .*max_model_len=512.*prompt and answer do not fit"):
        vlm.generate_until(instances(comprehension.doc_to_messages, 1, {"max_new_tokens": 600, "temperature": 0}))


def command_of(model, arguments, output):
    command = [str(BIN / "lmms-eval"), "--model", model, "--model_args", f"pretrained=demo{arguments}"]
    return [*command, "--tasks", "shapes_rec", "--limit", str(COUNT), "--log_samples", "--output_path", str(output)]


def results_of(folder):
    (file,) = folder.rglob("*_results.json")
    return json.loads(file.read_text())["results"]["shapes_rec"]


def answers_of(folder):
    (file,) = folder.rglob("*_samples_shapes_rec.jsonl")
    return [json.loads(line)["mean_iou"] for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    run(command_of("quant_none", ",verbalised=True", folder), folder)
    return folder


@pytest.fixture(scope="module")
def there(url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("there")
    run(command_of("quant_served", f",base_url={url},verbalised=True", folder), folder)
    return folder


def test_the_whole_command_gives_the_same_metrics_and_confidence(here, there):
    mine, theirs = results_of(here), results_of(there)
    assert mine.keys() == theirs.keys()
    numbers = {name: value for name, value in mine.items() if isinstance(value, float)}
    assert len(numbers) > 20
    for name, value in numbers.items():
        assert theirs[name] == pytest.approx(value, abs=1e-4, nan_ok=True), name
    for one, other in zip(answers_of(here), answers_of(there), strict=True):
        assert one["statement"] == other["statement"]
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-4, nan_ok=True)


def test_a_run_killed_at_five_moments_comes_to_the_same_results(url, there, tmp_path):
    kept, output = tmp_path / "kept", tmp_path / "output"
    arguments = f",base_url={url},verbalised=True,concurrency=2,resume_folder={kept}"
    command = command_of("quant_served", arguments, output)
    drawn = random.Random(5)
    answered = 0
    for part in range(1, KILLS + 1):
        # Somewhere in the next fifth of the answers, and of the time that one takes.
        goal = drawn.randint(2 * COUNT * (part - 1) // KILLS + 1, 2 * COUNT * part // KILLS - 1)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
            while killed.poll() is None and _lines(kept) < goal:
                time.sleep(0.005)
            time.sleep(drawn.uniform(0, 0.05))
            killed.kill()
        assert killed.returncode == -signal.SIGKILL, "the run had ended before it was killed"
        assert answered < _lines(kept)
        answered = _lines(kept)
    assert f"going on with {answered} answers" in run(command, tmp_path)
    assert results_of(output) == pytest.approx(results_of(there), abs=1e-4, nan_ok=True)
    for one, other in zip(answers_of(output), answers_of(there), strict=True):
        assert one["statement"] == other["statement"]
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-4, nan_ok=True)
    assert not list(kept.iterdir())


def _lines(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))
