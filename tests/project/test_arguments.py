"""The text after `--model_args`: read once, by whoever needs it."""

import subprocess
import sys

import pytest
from hypothesis import given, strategies
from lmms_eval.utils import simple_parse_args_string

from lmms_plugin.analysis import axes
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.arguments import arguments_of, read_arguments, shown
from lmms_plugin.export import facts

NAMES = strategies.sampled_from(["pretrained", "bits", "group_size", "system_prompt", "template_args", "lr"])
VALUES = strategies.sampled_from(
    ["demo", "4", "-1", "1e-4", "true", "False", "None", "", "a=b", "it's", "'a, b'", '"x=1, y"', "inf", "0.5", "007"]
) | strategies.sampled_from(['{"a": [1, 2], "b": "c, d"}', "[1, 2]", "{1: {2: 3, 4: 5}}", "'say \\'a, b\\' now'"])


@given(strategies.dictionaries(NAMES, VALUES, max_size=4), strategies.sampled_from([",", ", ", ",,"]))
def test_a_text_is_read_as_lmms_eval_reads_it(arguments, separator):
    text = separator.join(f"{name}={value}" for name, value in arguments.items())
    expected = simple_parse_args_string(text)
    found = arguments_of(text)
    assert found == expected
    assert all(isinstance(found[name], bool) == isinstance(value, bool) for name, value in expected.items())


@pytest.mark.parametrize(
    ("logged", "expected"),
    [
        ({"bits": 4}, {"bits": 4}),
        (None, {}),
        ("", {}),
        (
            "pretrained=demo,calibration=dataset:a,b,bits=4",
            {"pretrained": "demo", "calibration": "dataset:a,b", "bits": 4},
        ),
        ("bits=4,bits=8", {"bits": 8}),
        ("four", {}),
    ],
    ids=["a mapping", "nothing", "no text", "a comma", "twice", "no name"],
)
def test_arguments_of_a_finished_run_are_taken_as_they_came(logged, expected):
    assert arguments_of(logged) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits=4,bits=8", "bits is given 2 times"),
        ("bits=4,four", "expected name=value,name=value,..., got 'four'"),
        ("system_prompt='be brief,bits=4", "expected quotes and brackets that are closed before the next argument"),
        ('template_args={"a": 1,bits=4', "expected quotes and brackets that are closed"),
    ],
    ids=["twice", "no name", "an open quote", "an open bracket"],
)
def test_what_a_user_cannot_have_meant_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_arguments(text)


def test_an_apostrophe_that_swallows_nothing_is_one():
    assert read_arguments("bits=4,system_prompt=Don't guess.") == {"bits": 4, "system_prompt": "Don't guess."}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-1.0, "-1"), (-1, "-1"), (0.5, "0.5"), (True, "True"), ("a,b", "a,b"), (float("inf"), "inf")],
)
def test_values_are_shown_as_one_writes_them(value, expected):
    assert shown(value) == expected


def test_reading_arguments_does_not_wait_for_torch(tmp_path):
    script = "import sys, lmms_plugin.arguments; print(sorted({'torch', 'lmms_eval', 'transformers'} & {*sys.modules}))"
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout == "[]\n"


def test_exports_and_reports_read_values_with_commas_whole(tmp_path):
    text = 'pretrained=org/model,calibration=\'dataset:a,b\',template_args={"x": 1, "y": 2},group_size=-1,bits=3'
    run = LoggedRun(tmp_path / "1_results.json", "quant_awq", text, None, {}, (), {})
    assert facts.checkpoint(run) == "org/model"
    told = facts.quantization(run, {})
    assert (told["quantization_bits"], told["quantization_group_size"]) == ("3", "-1")
    assert told["quantization_calibration"] == "'dataset:a,b'"
    found = axes.of(run.file, tmp_path, {"config": {"model": "quant_awq", "model_args": text}}).config
    assert (found.model, found.method, found.bits, found.group_size) == ("org/model", "awq", 3, -1)
    assert found.options == ('template_args={"x": 1, "y": 2}',)
