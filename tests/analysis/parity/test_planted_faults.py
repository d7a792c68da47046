"""Faults put in on purpose, each between the embedded demo and itself: the verdict names every one."""

import json
import shutil

import pytest
import safetensors.torch
from helpers.runs import evaluate
from helpers.served import DemoModel, FakeServer

from lmms_plugin.analysis import logs
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.analysis.parity.judging_parity import judge
from lmms_plugin.cli.printed_parity import lines
from lmms_plugin.demo import CHECKPOINT

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.usefixtures("registered")]
LIMIT = 16
SETTINGS = MeasurementSettings(resamples=100)
DEMO = "pretrained=demo,device=cpu,parity=True"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def here(folder):
    """The demo in float32, loaded here."""
    return logs.read_one(evaluate(folder / "here", "quant_none", DEMO, LIMIT))


def local(folder, name, arguments, **options):
    return logs.read_one(evaluate(folder / name, "quant_none", arguments, LIMIT, **options))


def served(folder, name, *, engine="vllm", change=lambda response: None, edit=lambda model: None, **faults):
    model = DemoModel(**faults)
    edit(model)
    with FakeServer(model, engine, change=change) as server:
        arguments = f"base_url={server.url},pretrained=demo,parity=True,mismatch=warn"
        return logs.read_one(evaluate(folder / name, "quant_served", arguments, LIMIT))


def copied(folder, name):
    """A copy of the demo's checkpoint, to be changed."""
    return shutil.copytree(CHECKPOINT, folder / f"checkpoint_{name}")


def verdict(first, second):
    found = judge(first, second, SETTINGS)
    shown = lines(found, 0.95)
    assert len(shown) <= 40
    assert max(map(len, shown)) <= 80
    assert " ".join(shown).startswith("Same" if found.same else "Different")
    return found


def names(found):
    return [cause.name for cause in found.causes]


@pytest.mark.parametrize("engine", ["vllm", "lmdeploy"])
def test_without_a_fault_both_are_the_same(here, folder, engine):
    found = verdict(here, served(folder, engine, engine=engine))
    assert found.same
    assert found.causes == []
    assert found.whole.logprobs.largest < 1e-4
    assert found.whole.written.texts == (LIMIT, 0, "")
    assert found.whole.boxes.moved == 0
    assert {change.difference.value for change in found.changes if change.metric == "acc@0.5"} == {0.0}
    # Without ids of the prompt, its number of tokens is compared.
    assert found.whole.read.prompts.known == (LIMIT if engine == "vllm" else 0)
    assert found.whole.read.prompt_lengths.same


def test_images_resized_twice(here, folder):
    found = verdict(here, served(folder, "twice", seen=lambda image: image.resize((56, 56))))
    assert names(found) == ["images resized twice"]
    assert found.whole.read.prompts.same
    assert found.whole.boxes.mean_shift > 0


def system_first(model):
    template = model.chat.processor.chat_template
    model.chat.processor.chat_template = "{{ '<|system|>You see pictures.<end_of_utterance>' }}" + template


def spaced(model):
    template = model.chat.processor.chat_template
    model.chat.processor.chat_template = template.replace("'|>' }}", "'|> ' }}").replace(
        "<|assistant|>", "<|assistant|> "
    )


def test_another_template_on_the_server(here, folder):
    found = verdict(here, served(folder, "template", edit=spaced))
    assert names(found)[0] == "other chat template"
    assert found.whole.read.prompts.different == LIMIT
    assert found.whole.read.image_tokens.same


def test_another_template_on_a_server_that_tells_lengths_alone(here, folder):
    assert names(verdict(here, served(folder, "lengths", engine="lmdeploy", edit=spaced)))[0] == "other chat template"


def test_another_template_in_the_checkpoint(here, folder):
    changed = copied(folder, "template")
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|assistant|>", "<|assistant|> "))
    assert names(verdict(here, local(folder, "own_template", f"pretrained={changed},device=cpu"))) == [
        "other chat template"
    ]


@pytest.mark.parametrize(
    "fault", [{"system": "You see pictures."}, {"edit": system_first}], ids=["message", "template"]
)
def test_a_system_prompt_of_the_server(here, folder, fault):
    found = verdict(here, served(folder, f"system_{next(iter(fault))}", **fault))
    assert names(found)[0] == "other system prompt"
    assert found.prompt.at == 0
    assert not found.prompt.first
    assert len(found.prompt.second) > 2
    assert "only the second has '<|system|>You see pictures.<end_of_utterance>'" in found.causes[0].evidence


def test_a_system_prompt_of_the_user(here, folder):
    found = verdict(here, local(folder, "own_system", "pretrained=demo,device=cpu,system_prompt=You see pictures."))
    assert names(found) == ["other system prompt"]


def test_bfloat16_beside_float32(here, folder):
    found = verdict(here, local(folder, "bfloat16", f"{DEMO},dtype=bfloat16"))
    assert names(found) == ["other dtype"]
    assert 1e-3 < found.whole.logprobs.largest < 0.3


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
def test_penalties_of_the_server(here, folder, processed):
    found = verdict(here, served(folder, f"penalty_{processed}", repetition_penalty=1.5, processed=processed))
    assert names(found)[0] == "penalties leaking in"


def with_spaces(response):
    choice = response["choices"][0]
    choice["message"]["content"] = choice["message"]["content"].replace(",", ", ")
    for entry in choice["logprobs"]["content"]:
        entry["token"] = entry["token"].replace(",", ", ")
        entry["bytes"] = list(entry["token"].encode())


def test_broken_detokenization(here, folder):
    found = verdict(here, served(folder, "spaces", engine="lmdeploy", change=with_spaces))
    assert names(found) == ["detokenization"]
    assert found.whole.written.texts.different == LIMIT
    assert found.whole.boxes.moved == 0


def test_another_checkpoint(here, folder):
    changed = copied(folder, "weights")
    weights = safetensors.torch.load_file(changed / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name] = weights[name] * 1.3
    safetensors.torch.save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert names(verdict(here, local(folder, "weights", f"pretrained={changed},device=cpu")))[0] == "another checkpoint"


def test_answers_cut_off_by_the_server(here, folder):
    found = verdict(here, served(folder, "cut", longest=6))
    assert names(found)[0] == "answers cut off (max_tokens)"
    assert "after 6 tokens" in found.causes[0].evidence
    assert found.whole.logprobs.largest < 1e-4


def test_answers_cut_off_by_the_user(here, folder):
    found = verdict(here, local(folder, "own_cut", DEMO, gen_kwargs="max_new_tokens=6"))
    assert names(found) == ["answers cut off (max_tokens)"]
    assert "max_new_tokens 6" in found.causes[0].evidence


def test_answers_drawn_at_random(here, folder):
    found = verdict(here, local(folder, "drawn", DEMO, gen_kwargs="temperature=2.0,do_sample=True"))
    assert names(found)[0] == "other generation settings"


def test_other_pixel_limits(folder, checkpoint):
    path = checkpoint("qwen2_5_vl")
    first, second = (
        local(folder, f"pixels_{limit}", f"pretrained={path},device=cpu,parity=True,max_pixels={limit}")
        for limit in (112 * 112, 56 * 56)
    )
    found = verdict(first, second)
    assert names(found)[0] == "other pixel limits"
    assert found.whole.read.image_sizes.different == LIMIT


def test_the_trailer_stays_small(here, folder):
    """Without parity=True an answer has 50 bytes more, and one answer of each task the facts."""
    plain = local(folder, "plain", "pretrained=demo,device=cpu")
    rows = [[json.loads(line) for line in run.log("shapes_rec").read_text().splitlines()] for run in (plain, here)]
    trailers = [json.loads(row["filtered_resps"].rpartition("|>")[2]) for row in rows[0]]
    assert max(len(json.dumps(trailer["trace"], separators=(",", ":"))) for trailer in trailers) < 45
    assert sum("engine" in trailer for trailer in trailers) == 1
    assert len(json.dumps(next(trailer["engine"] for trailer in trailers if "engine" in trailer))) < 400
    found = verdict(plain, here)
    assert found.same
    assert found.whole.read.prompts.same
