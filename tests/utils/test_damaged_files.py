"""Files that say what they cannot say: one line that names the file, whoever wrote them."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import study_folders
from rich.table import Table

from lmms_plugin import demo
from lmms_plugin.analysis import component_importance, logs
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.arguments import ModelArguments
from lmms_plugin.cli import terminal
from lmms_plugin.export import facts
from lmms_plugin.report.numbers import results_folder
from lmms_plugin.utils.reading.readable import readable

SETTINGS = MeasurementSettings(resamples=10)


@pytest.fixture
def cell(tmp_path):
    axes = {"method": "rtn", "bits": 4, "seed": 0}
    return study_folders.write_cell(tmp_path, "rtn", axes, study_folders.outcomes(8, 6, 5, 4))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def table_of(cell: Path) -> Path:
    return next(cell.glob("*_results.json"))


def log_of(cell: Path) -> Path:
    return next(cell.glob("*_samples_rec.jsonl"))


def edit_first(path: Path, change) -> None:
    first, _, rest = path.read_text().partition("\n")
    row = json.loads(first)
    change(row["mean_iou"], row)
    path.write_text(json.dumps(row) + "\n" + rest)


IN_TABLES = {
    "no results": lambda told: told.update(results=None),
    "results of a task": lambda told: told["results"].update(rec=None),
    "no counts": lambda told: told.update({"n-samples": None}),
    "counts of a task": lambda told: told["n-samples"].update(rec=None),
    "a count": lambda told: told["n-samples"]["rec"].update(effective="8"),
    "no configurations": lambda told: told.update(configs=[]),
    "a configuration": lambda told: told["configs"].update(rec=None),
    "a configuration is missing": lambda told: told["configs"].pop("rec"),
    "metadata": lambda told: told["configs"]["rec"].update(metadata="x"),
    "severity": lambda told: told["configs"]["rec"].update(metadata={"shift": "fog", "severity": None}),
    "settings": lambda told: told.update(config=[]),
    "a limit": lambda told: told["config"].update(limit="8"),
    "a number without end": lambda told: told["results"]["rec"].update({"mean_iou,none": 10**400}),
    "a long name": lambda told: told["results"].update({"x" * 5000: None}),
    "throughput": lambda told: told.update(throughput=[1]),
}


@pytest.mark.parametrize("change", IN_TABLES.values(), ids=IN_TABLES)
def test_a_results_file_with_something_else_than_a_mapping_is_named(cell, change):
    edit(table_of(cell), change)
    for read in (logs.read, lambda file: results_folder.read_run(file, cell, SETTINGS)):
        with pytest.raises(ValueError, match=r"damaged|expected") as refused:
            read(table_of(cell))
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 1000


def test_what_may_be_null_in_a_results_file_may_be(cell):
    edit(table_of(cell), lambda told: told.update(config=None, throughput=None))
    assert logs.read(table_of(cell)).limit is None
    assert results_folder.read_run(table_of(cell), cell, SETTINGS).model == ""


IN_LOGS = {
    "a confidence without end": lambda record, _: record["confidence"].update(coordinate_mean=10**400),
    "a whole number as confidence": lambda record, _: record["confidence"].update(coordinate_mean=-1),
    "a list of confidences": lambda record, _: record.update(confidence=[0.5]),
    "a number of confidences": lambda record, _: record.update(confidence=3),
    "a score without end": lambda record, _: record.update(score=10**400),
    "no score": lambda record, _: record.update(score=None),
    "a document's number": lambda _, row: row.update(doc_id="first"),
    "a document's number without end": lambda _, row: row.update(doc_id=10**30),
    "a record": lambda _, row: row.update(mean_iou=None),
}


@pytest.mark.parametrize("change", IN_LOGS.values(), ids=IN_LOGS)
def test_a_log_with_something_else_is_named(cell, change):
    edit_first(log_of(cell), change)
    with pytest.raises(ValueError, match=log_of(cell).name) as refused:
        logs.read(table_of(cell))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "", "\xff", "[]", "null"])
def test_what_no_json_parser_takes_is_named(cell, text):
    table_of(cell).write_text(text, encoding="latin-1")
    for read in (logs.read, lambda file: component_importance.read(file.parent)):
        with pytest.raises(ValueError, match=table_of(cell).name):
            read(table_of(cell))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cell.json", '{"axes": {"model": "m", "method": "rtn", "bits": "four"}}'),
        ("cell.json", '{"axes": {"model": "m", "method": "rtn", "seed": {}}}'),
        ("cell.json", '{"axes": []}'),
        ("cell.json", '{"axes": {}}'),
        ("cell.json", '{"axes": {"model": "m"}}'),
        ("cell.json", "[]"),
        ("quant_report.json", '{"modules": {"a": 1}}'),
        ("quant_report.json", '{"modules": [{"name": null}]}'),
        ("quant_report.json", '{"bits_per_weight": "4.25"}'),
    ],
)
def test_accounts_of_a_cell_with_nonsense_are_named(cell, name, text):
    (cell / name).write_text(text)
    with pytest.raises(ValueError, match=name) as refused:
        results_folder.read_run(table_of(cell), cell, SETTINGS)
    assert "\n" not in str(refused.value)
    assert "Error(" not in str(refused.value)
    # Other readers can do without axes.
    if name == "cell.json" and text not in ('{"axes": {}}', '{"axes": {"model": "m"}}'):
        with pytest.raises(ValueError, match=name):
            facts.cell(table_of(cell))


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(demo.CHECKPOINT, tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_damage_of_what_a_checkpoint_says_of_itself_is_found_before_it_is_loaded(checkpoint, name, text):
    (checkpoint / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"pretrained: .*{name}"):
        ModelArguments(pretrained=str(checkpoint)).find_checkpoint()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": ["model.safetensors"]}', "weight_map"),
        ('{"weight_map": {"a": null}}', "weight_map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"names gone\.safetensors"),
        ('{"weight_map": {"a": "../../x.safetensors"}}', "inside the folder"),
    ],
)
def test_a_damaged_index_of_weights_is_found_before_it_is_loaded(checkpoint, text, told):
    (checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        ModelArguments(pretrained=str(checkpoint)).find_checkpoint()


def test_a_tokenizer_that_only_its_library_finds_damaged_is_named(checkpoint):
    from lmms_plugin.vlm.setting_up import chat_of

    (checkpoint / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    path = ModelArguments(pretrained=str(checkpoint)).find_checkpoint()
    with pytest.raises(ValueError, match="checkpoint: its processor or tokenizer cannot be read") as refused:
        chat_of(path, ModelArguments(pretrained=path))
    assert "\n" not in str(refused.value)


def test_a_damaged_parquet_file_is_named(tmp_path):
    from lmms_plugin.study.file import tasks

    file = tmp_path / "test-1.parquet"
    file.write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(ValueError, match=r"test-1\.parquet cannot be read"):
        tasks.count_rows(str(file), expressions=False)


def test_errors_that_are_not_of_damage_pass():
    for kind in (MemoryError, RuntimeError, FileNotFoundError, ImportError):
        with pytest.raises(kind), readable("file"):
            raise kind("said already")


@pytest.mark.parametrize("name", ["[/x]", "[bold]", "[red]x", ":smile:", "\udcff.json"])
def test_names_in_tables_are_no_markup(name, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.write_anything()
    shown = Table(title=name, caption=name)
    shown.add_column(name)
    shown.add_row(name)
    terminal.console().print(shown)
    stream.flush()
    told = stream.buffer.getvalue().decode()
    assert told.count(name.replace("\udcff", "\\udcff")) == 4


@pytest.mark.parametrize("argument", ["pretrained", "reference"])
def test_a_missing_checkpoint_is_told_by_its_argument(argument, tmp_path):
    given = {"pretrained": "demo"} | {argument: str(tmp_path / "nothing")}
    arguments = ModelArguments(**given)
    find = arguments.find_checkpoint if argument == "pretrained" else arguments.find_reference
    with pytest.raises(FileNotFoundError, match=f"^{argument}: there is no folder"):
        find()
