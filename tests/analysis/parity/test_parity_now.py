"""Two engines run now, through the real commands: the demo loaded, and behind an imitated server."""

import json
import sys
from pathlib import Path

import pytest
from helpers.environments import run
from helpers.served import DemoModel, FakeServer

from lmms_plugin import side_by_side
from lmms_plugin.cli.main import main
from lmms_plugin.protocol.response import Response

COMMAND = [str(Path(sys.executable).parent / "lmms-plugin"), "parity"]


@pytest.mark.model
@pytest.mark.slow
def test_a_loaded_and_a_served_model_are_run_and_compared(tmp_path):
    with FakeServer(DemoModel()) as server:
        specs = ["quant_none:pretrained=demo,device=cpu", f"quant_served:base_url={server.url},pretrained=demo"]
        told = run([*COMMAND, *specs, "--tasks", "shapes_rec", "--limit", "6", "--output", "kept"], tmp_path)
    assert "Same: 6 of 6 answers are equal" in told
    (rows,) = (tmp_path / "kept" / "B").rglob("*_samples_shapes_rec.jsonl")
    answer = json.loads(rows.read_text().splitlines()[0])["filtered_resps"]
    response = Response.decode(answer)
    assert len(response.engine["trials"]) == 5
    assert response.engine["software"] == "vllm 0.32.0"
    # Ids of the prompt are kept for the comparison.
    assert len(response.trace.ids) == response.trace.tokens


def test_a_run_that_fails_is_told_in_one_line(tmp_path):
    script = "print('ValueError: no such thing'); raise SystemExit(3)"
    with pytest.raises(RuntimeError) as failed:
        side_by_side.run((sys.executable, "-c", script, "--model", "quant_none"), tmp_path / "A")
    told = "quant_none: lmms-eval ended with status 3; last error: ValueError: no such thing"
    assert str(failed.value) == told


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("quant_none:pretrained=demo", "pretrained=demo,parity=True"),
        ("quant_none:pretrained=demo,parity=False", "pretrained=demo,parity=False"),
        ("quant_served:base_url=http://h:1/v1", "base_url=http://h:1/v1,parity=True,mismatch=warn"),
        ("quant_served:mismatch=error", "mismatch=error,parity=True"),
        ("quant_awq", "parity=True"),
        ("quant_gguf:type=Q8_0", "type=Q8_0,parity=True,mismatch=warn"),
        ("openai:model=x", "model=x"),
    ],
)
def test_models_of_this_package_keep_evidence(text, arguments):
    assert side_by_side.ModelSpec.parse(text).with_evidence().arguments == arguments


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ("quant_awqq:pretrained=demo", "unknown model 'quant_awqq', did you mean 'quant_awq'?"),
        ("quant_none:pretrained=demo,kv_bits=1", "kv_bits must be an integer from 2 to 8"),
        ("quant_rtn:pretrained=demo,format=nvfp5", "unknown format 'nvfp5', did you mean 'nvfp4'?"),
    ],
)
def test_a_second_model_that_cannot_be_is_told_before_the_first_runs(second, told, monkeypatch, capsys):
    monkeypatch.setattr(side_by_side, "run", lambda *_: pytest.fail("a model was run"))
    monkeypatch.setattr(
        sys, "argv", ["lmms-plugin", "parity", "quant_none:pretrained=demo", second, "--tasks", "shapes_rec"]
    )
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
