"""What a record says of a quantized key-value cache."""

import json

from helpers.submissions import answered, write_run

from lmms_plugin.analysis.logs import read_one
from lmms_plugin.export import facts


def told(folder, model_args, throughput):
    run = read_one(write_run(folder, answered(2), "quant_none", model_args))
    results = json.loads(run.file.read_text()) | {"throughput": throughput}
    return {name: value for name, value in facts.quantization(run, results).items() if "kv" in name}


def test_arguments_and_size_of_a_cache_are_told_as_text(tmp_path):
    size = {"avg_kv_bits_per_element": 6.4375, "avg_kv_bytes": 53568.0}
    assert told(tmp_path / "run", "pretrained=demo,kv_bits=4,kv_keep=4+32", size) == {
        "quantization_kv_bits": "4",
        "quantization_kv_keep": "4+32",
        "kv_cache_bits_per_element": "6.4375",
        "kv_cache_bytes_of_the_longest_prompt": "53568",
    }


def test_nothing_is_told_of_a_cache_as_the_model_has_it(tmp_path):
    assert told(tmp_path / "run", "pretrained=demo", {"avg_bytes_after": 1e5}) == {}
