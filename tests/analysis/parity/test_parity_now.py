"""Two engines run now, through the real commands: the demo loaded, and behind an imitated server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.environments import run
from helpers.served import DemoModel, FakeServer

pytestmark = [pytest.mark.model, pytest.mark.slow]
COMMAND = [str(Path(sys.executable).parent / "lmms-plugin"), "parity"]


def test_a_loaded_and_a_served_model_are_run_and_compared(tmp_path):
    with FakeServer(DemoModel()) as server:
        specs = ["quant_none:pretrained=demo,device=cpu", f"quant_served:base_url={server.url},pretrained=demo"]
        told = run([*COMMAND, *specs, "--tasks", "shapes_rec", "--limit", "6", "--output", "kept"], tmp_path)
    assert "Same: 6 of 6 answers are equal" in told
    (rows,) = (tmp_path / "kept" / "B").rglob("*_samples_shapes_rec.jsonl")
    trailer = json.loads(json.loads(rows.read_text().splitlines()[0])["filtered_resps"].rpartition("|>")[2])
    assert len(trailer["engine"]["trials"]) == 5
    assert trailer["engine"]["software"] == "vllm 0.32.0"
    # Ids of the prompt are kept for the comparison.
    assert len(trailer["trace"]) == 4 + trailer["trace"][0]


def test_a_run_that_fails_is_told_in_one_line(tmp_path):
    specs = ["quant_none:pretrained=demo,unheard=1", "quant_none:pretrained=demo"]
    done = subprocess.run([*COMMAND, *specs, "--tasks", "shapes_rec"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "quant_none: lmms-eval ended with status 2; last error: " in done.stderr.splitlines()[-1]
    assert "unheard" in done.stderr.splitlines()[-1]
