"""The `lmms-plugin` command as installed."""

import sys
from pathlib import Path

import pytest
from environments import run

COMMAND = str(Path(sys.executable).parent / "lmms-plugin")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--bits", "1"), "bits"), (("--bits", "7"), "7"), (("--limit", "0"), "limit must be at least 1")],
    ids=["bits out of range", "bits that hqq cannot do", "no limit"],
)
def test_bad_arguments_give_one_line_and_write_nothing(tmp_path, arguments, message):
    with pytest.raises(RuntimeError, match=r"exited with 2") as failure:
        run([COMMAND, "demo", "--output", str(tmp_path / "out"), *arguments], tmp_path)
    lines = str(failure.value).splitlines()[1:]
    assert len(lines) == 1
    assert lines[0].startswith("lmms-plugin: ")
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_demo_writes_table_report_and_pictures(tmp_path):
    printed = run([COMMAND, "demo", "--output", str(tmp_path), "--limit", "2", "--bits", "2"], tmp_path)
    report = (tmp_path / "report.md").read_text()
    for model in ("quant_none", "quant_rtn", "quant_hqq", "quant_awq"):
        assert model in printed
        assert f"| {model} |" in report
    assert "Only the first 2 expressions" in report
    for picture in tmp_path.glob("*.png"):
        assert picture.name in report
    assert len(list(tmp_path.glob("*.png"))) == 2
