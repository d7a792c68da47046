"""`lmms-plugin quantize`: refused early, and read back by a process that cannot import this package."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from lmms_eval.api.instance import Instance

import lmms_plugin.vlm.wrapper as models
from lmms_plugin.cli.main import main
from lmms_plugin.demo import DATA
from lmms_plugin.export import checkpoint as serving
from lmms_plugin.quant_backends.checkpoints.saving import Saved
from lmms_plugin.tasks.grounding.comprehension import doc_to_messages
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs

ASKED = 8
READER = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lmms_plugin":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
folder, data, questions = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
rows = load_dataset(data, split="test")
for row, text in questions:
    content = [{"type": "image", "image": rows[row]["image"].convert("RGB")}, {"type": "text", "text": text}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    print("answer", json.dumps(processor.decode(written, skip_special_tokens=True).strip()))
assert "lmms_plugin" not in sys.modules
"""


def lmms_plugin(monkeypatch, *arguments, code):
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == code


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(models, "load_quantized", load)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["pretrained=demo,method=quanto,bits=8"], "quanto cannot be saved: optimum-quanto keeps weights in a form"),
        (["pretrained=demo,method=none"], "none cannot be saved: it quantizes nothing"),
        (["pretrained=demo,method=hqq", "--format", "compressed-tensors"], "its zero points are no integers"),
        (["pretrained=demo,method=awq", "--format", "compressed-tensors"], "fold=True avoids that"),
        (["pretrained=demo,method=mbq", "--format", "compressed-tensors"], "multiply their inputs by a scale"),
        (
            ["pretrained=demo,method=rtn,bits=8,act_bits=8", "--format", "compressed-tensors"],
            "it takes bits=8,group_size=-1,symmetric=True",
        ),
        (
            ["pretrained=demo,method=rtn,format=nf4", "--format", "compressed-tensors"],
            "cannot hold what rtn makes: it has no nf4",
        ),
        (
            ["pretrained=demo,method=rtn,format=nvfp4,activation_format=nvfp4", "--format", "compressed-tensors"],
            "it has no nvfp4 inputs, per-token global scale",
        ),
        (["pretrained=demo,method=rtn,group_size=96", "--format", "compressed-tensors"], "do not divide its width"),
        (["pretrained=demo,method=rtn,kv_bits=4"], "kv_bits has no effect here, where weights are quantized"),
        (["pretrained=demo,method=rtn,samples=4"], "samples has no effect here"),
        (["pretrained=demo,method=rtn,storage=dense"], "storage has no effect here"),
        (
            ["pretrained=demo,method=rtn", "--format", "GGUF"],
            "expected a format of auto, compressed-tensors, own, gguf",
        ),
        (["pretrained=demo,method=rtn", "--format", "gguf"], "method=rtn: GGUF has types of its own"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_written_is_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys, given, message):
    lmms_plugin(monkeypatch, "quantize", *given, "-o", tmp_path / "saved", code=2)
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_loads")
def test_so_it_is_for_the_model_argument(tmp_path):
    with pytest.raises(ValueError, match="quanto cannot be saved"):
        models.QuantQuanto(pretrained="demo", bits=8, save_quantized=str(tmp_path / "saved"))


def evaluated(bits):
    """Demo answers of the model that an evaluation quantizes."""
    vlm = models.QuantRtn(pretrained="demo", bits=bits, dtype="float32", device="cpu")
    docs = ExpressionDocs(datasets.load_dataset(str(DATA), split="test"))
    vlm.task_dict = {"toy": {"test": [docs[number] for number in range(ASKED)]}}
    options = {"max_new_tokens": 24, "do_sample": False, "until": []}

    def request(number):
        metadata = {"task": "toy", "doc_id": number, "repeats": 1}
        return Instance("generate_until", ("", doc_to_messages, options, number, "toy", "test"), 0, metadata=metadata)

    return [answer.partition("\n")[0] for answer in vlm.generate_until([request(number) for number in range(ASKED)])]


def asked():
    """Rows of the dataset and the demo model's own words for each expression, in the order of the documents."""
    rows = datasets.load_dataset(str(DATA), split="test").remove_columns("image")
    pairs = [(row, f"Locate {text}.") for row in range(ASKED) for text in rows[row]["answer"]]
    return pairs[:ASKED]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_alone_gives_the_evaluated_answers(tmp_path, monkeypatch, capsys, bits):
    pytest.importorskip("compressed_tensors")
    folder = tmp_path / "saved"
    given = f"pretrained=demo,method=rtn,bits={bits},dtype=float32,device=cpu"
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", "quantize", given, "-o", str(folder), "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["bits"], told["schemes"]) == ("compressed-tensors", [bits], 1)
    assert "transformers with compressed-tensors" in told["readers"][1]
    command = [sys.executable, "-I", "-c", READER, str(folder), str(DATA), json.dumps(asked())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.removeprefix("answer ") for line in done.stdout.splitlines() if line.startswith("answer ")]
    answers = [json.loads(line) for line in lines]
    assert answers == evaluated(bits)
    assert len(set(answers)) > 2, "answers must differ for this to show anything"


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (
            Saved("compressed-tensors", None, 1, (4,), (128,), 1),
            ["transformers with", "vLLM: by its format.*--dtype float16"],
        ),
        (Saved("compressed-tensors", None, 1, (3,), (128,), 1), ["transformers with", "vLLM: no, .* not 3 bits"]),
        (
            Saved("compressed-tensors", None, 1, (8,), (None,), 1),
            ["transformers with", "vLLM: by its format.*; not on a CPU"],
        ),
        (Saved("compressed-tensors", None, 1, (4,), (16,), 1), ["transformers with", "vLLM: no, .* not groups of 16"]),
        (
            Saved("compressed-tensors", None, 1, (4, 8), (128,), 2),
            ["not transformers", "vLLM: by its format.*; not on a CPU"],
        ),
        (Saved("lmms_plugin", "trits", 1, (3,), (128,), 1), ["nothing without this package: .*because trits"]),
    ],
    ids=["4 bits", "3 bits", "whole rows", "small groups", "two kinds", "own"],
)
def test_who_can_load_it_is_told(saved, expected):
    import re

    first, *lines = serving.readers(saved, Path("my $model"))
    assert first == "lmms-eval --model quant_prequantized --model_args 'pretrained=my $model'"
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), line


@pytest.mark.slow
def test_a_pipe_gets_no_bars_and_folders_above_are_made(tmp_path):
    folder = tmp_path / "not there" / "$saved"
    command = [str(Path(sys.executable).parent / "lmms-plugin"), "quantize", "pretrained=demo,method=rtn,bits=4"]
    done = subprocess.run([*command, "-o", str(folder)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "config.json").is_file()
    first, how, *_ = done.stdout.splitlines()
    assert first.startswith(f"{folder}: ")
    assert shlex.split(how.removeprefix("- "))[-1] == f"pretrained={folder}"
