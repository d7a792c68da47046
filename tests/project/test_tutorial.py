"""All code of docs/tutorial.md and docs/python.md runs, in order, on a folder of results."""

import re
from pathlib import Path

import pytest
from helpers import report_study

from lmms_plugin import data_frames

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page):
    return re.findall(
        r"^```python[^\n]*\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial")
    # Enough images for an exact test of the signs of their differences.
    docs = report_study.documents(160)
    report_study.write_run(folder / "results" / "none", docs, 0.9)
    for seed, (method, skill) in enumerate((("rtn", 0.3), ("hqq", 0.5)), start=1):
        report_study.write_run(
            folder / "results" / method, docs, skill, seed, f"quant_{method}", "pretrained=demo,bits=3"
        )
    return folder


def test_the_tutorial_runs(results, monkeypatch, capsys):
    monkeypatch.chdir(results)
    code = blocks("tutorial.md")
    assert len(code) == 6
    names = {}
    for block in code:
        exec(compile(block, "tutorial.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "On shapes_rec, the second run is less often right than the first" in shown
    assert {"rtn", "hqq", "none"} <= set(shown.split())
    assert (results / "accuracy_lost.pdf").read_bytes().startswith(b"%PDF")
    assert len(names["accuracy"]) == 4
    assert [text.get_text() for text in names["axis"].get_yticklabels()] == ["hqq 3", "rtn 3"]


def test_the_page_names_what_there_is(results, monkeypatch):
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    monkeypatch.chdir(results)
    names = {}
    for block in blocks("python.md"):
        exec(compile(block, "python.md", "exec"), names)
    for call in re.findall(r"`(?:runs\.)(\w+)\(", text):
        assert callable(getattr(names["runs"], call))
    (listed,) = re.findall(r"begin with the columns (.*?);", text, re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", listed)) == data_frames.RUN_COLUMNS
