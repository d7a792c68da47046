"""What a run is called on a screen."""

from pathlib import Path

import pytest

from lmms_plugin.analysis.logs import LoggedRun


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        ("", "quant_awq"),
        ("pretrained=demo,bits=3", "quant_awq pretrained=demo,bits=3"),
        ("pretrained=demo,report=quant_report.json,bits=3,shared_folder=../x", "quant_awq pretrained=demo,bits=3"),
        ("features=seen,pretrained=demo,images=[1,2]", "quant_awq pretrained=demo,images=[1,2]"),
    ],
)
def test_places_of_files_are_left_out_of_a_title_and_kept_in_the_label(arguments, title):
    run = LoggedRun(Path("x_results.json"), "quant_awq", arguments, None, {}, (), {})
    assert run.title == title
    assert run.label == f"quant_awq {arguments}".strip()
