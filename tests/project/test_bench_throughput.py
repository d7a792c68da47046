import json
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
    rows = throughput.measure({"shared": vlm, "auto": vlm, "plain": vlm}, 1, 2, 1, (160, 120))
    throughput.write(tmp_path / "rows.json", rows)

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    read = json.loads((tmp_path / "rows.json").read_text(), parse_constant=refuse)
    assert [row["case"] for row in read] == ["vs_plain@2", "auto_vs_plain@2", "floor@2"]
    assert read[0]["same"] == read[0]["expressions"] == 2
    assert read[0]["peak_bytes"] is None


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
