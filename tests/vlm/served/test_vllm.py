"""The embedded demo in the real vLLM on the CPU, beside the same model loaded here (`make test-served`)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.environments import run
from helpers.vllm_server import SETTINGS, vllm_server

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


@pytest.fixture(scope="session")
def url(tmp_path_factory):
    """Address of a server that has answered a question about an image."""
    with vllm_server(CHECKPOINT, tmp_path_factory.mktemp("vllm") / "log") as address:
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


def test_samples_are_the_same_again(url, documents, instances):
    asked = instances(comprehension.doc_to_messages, 3)
    drawn = []
    for _ in range(2):
        vlm = QuantServed(pretrained="demo", base_url=url, samples=4, sample_temperature=1.5)
        vlm.task_dict = documents
        drawn.append([Response.decode(text).samples for text in vlm.generate_until(asked)])
    assert drawn[0] == drawn[1]
    assert len({sample for samples in drawn[0] for sample in samples}) > 3


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


def test_the_whole_command_gives_the_same_metrics_and_confidence(url, here, tmp_path):
    run(command_of("quant_served", f",base_url={url},verbalised=True", tmp_path), tmp_path)
    mine, theirs = results_of(here), results_of(tmp_path)
    assert mine.keys() == theirs.keys()
    numbers = {name: value for name, value in mine.items() if isinstance(value, float)}
    assert len(numbers) > 20
    for name, value in numbers.items():
        assert theirs[name] == pytest.approx(value, abs=1e-4, nan_ok=True), name
    for one, other in zip(answers_of(here), answers_of(tmp_path), strict=True):
        assert one["statement"] == other["statement"]
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-4, nan_ok=True)


def test_a_killed_run_goes_on_to_the_same_results(url, here, tmp_path):
    kept, output = tmp_path / "kept", tmp_path / "output"
    arguments = f",base_url={url},verbalised=True,concurrency=1,resume_folder={kept}"
    command = command_of("quant_served", arguments, output)
    killed = subprocess.Popen(
        command, env={**os.environ, **SETTINGS}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while killed.poll() is None and not _lines(kept):
        time.sleep(0.02)
    time.sleep(0.5)
    killed.kill()
    killed.wait()
    answered = _lines(kept)
    assert 0 < answered < 2 * COUNT
    assert f"going on with {answered} answers" in run(command, tmp_path)
    assert results_of(output) == pytest.approx(results_of(here), abs=1e-4, nan_ok=True)
    assert not list(kept.iterdir())


def _lines(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))
