import pytest

from lmms_plugin.analysis import axes


@pytest.mark.parametrize(
    ("model", "arguments", "label", "is_dense"),
    [
        ("quant_none", "pretrained=demo", axes.UNQUANTIZED, True),
        ("quant_none", "pretrained=demo,kv_bits=16", axes.UNQUANTIZED, True),
        ("quant_none", "pretrained=demo,kv_bits=4", "KV int4", False),
        ("quant_none", "pretrained=demo,kv_bits=16,kv_image_bits=2,kv_part=keys", "KV 16, images int2 keys", False),
        ("quant_none", "pretrained=demo,kv_format=fp8_e4m3", "KV fp8_e4m3", False),
        ("quant_rtn", "pretrained=demo,bits=3,kv_bits=2", "rtn, KV int2 3", False),
    ],
)
def test_a_quantized_cache_is_part_of_the_method_and_never_the_reference(tmp_path, model, arguments, label, is_dense):
    results = {"config": {"model": model, "model_args": arguments}}
    config = axes.of(tmp_path / "x_results.json", tmp_path, results).config
    assert (config.label, config.dense) == (label, is_dense)


def test_other_settings_of_the_cache_tell_runs_apart(tmp_path):
    def config(arguments):
        results = {"config": {"model": "quant_none", "model_args": f"pretrained=demo,kv_bits=4{arguments}"}}
        return axes.of(tmp_path / "x_results.json", tmp_path, results).config

    found = {
        config(more) for more in ("", ",kv_keep=4+32", ",kv_group_size=64", ",kv_keys=token", ",kv_rotation=hadamard")
    }
    assert len(found) == 5
