import json
import time
from pathlib import Path

import pytest
import torch

from lmms_plugin.vlm.wrapper import QuantizedVLM


@pytest.fixture
def throughput(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from bench import throughput

    return throughput


def test_rows_measured_on_a_cpu_are_json_without_a_peak(throughput, checkpoint, tmp_path):
    vlm = QuantizedVLM(pretrained=str(checkpoint("smolvlm")), device="cpu")
    models = {"shared": vlm, "auto": vlm, "plain": vlm}
    rows = throughput.measure(models, {"shared": 1, "auto": 2, "plain": 1}, 2, 1, (160, 120))
    throughput.write(tmp_path / "rows.json", rows)

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    read = json.loads((tmp_path / "rows.json").read_text(), parse_constant=refuse)
    assert [row["case"] for row in read] == ["vs_plain@2", "auto_vs_plain@2", "floor@2"]
    # The first image's two expressions, of the packed way's four.
    assert [row["expressions"] for row in read[:2]] == [row["same"] for row in read[:2]] == [2, 2]
    assert read[0]["peak_bytes"] is None


def test_the_phases_make_up_the_time(checkpoint):
    from bench import throughput
    from bench.phases import phases

    vlm = QuantizedVLM(pretrained=str(checkpoint("qwen2_5_vl")), device="cpu")
    docs = throughput.documents(2, 3, (160, 120))
    # What the first batch is compared with is no part of answering.
    throughput.run(vlm, docs)
    rows = {row["case"]: row for row in phases(vlm, lambda: throughput.run(vlm, docs), 3, time.process_time, 1e-12)}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    # Two images in one batch: both encoded together, their prefixes too, then all six questions; the first token of an
    # answer comes from reading them.
    calls = {case: row["calls"] for case, row in rows.items() if "calls" in row}
    assert 1 <= calls.pop("decoding@3") < throughput.ANSWER_TOKENS
    assert calls == {"vision@3": 1, "prefix@3": 1, "questions@3": 1}
    assert all(row["ratio"] > 0 for row in rows.values() if "calls" in row)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_peak_of_a_model_leaves_out_the_others(throughput, checkpoint):
    docs = throughput.documents(1, 2, (160, 120))
    first = throughput.ours(checkpoint("smolvlm"), "cuda", "bfloat16")
    throughput.run(first, docs)
    _, alone, _ = throughput.run(first, docs)
    _others = [throughput.ours(checkpoint("qwen2_5_vl"), "cuda", "float32") for _ in range(3)]
    _, among_others, _ = throughput.run(first, docs)
    assert among_others == pytest.approx(alone, rel=0.1)
