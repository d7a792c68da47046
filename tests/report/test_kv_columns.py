"""Columns of the report for quantized key-value caches."""

import json

from helpers import report_study

from lmms_plugin.analysis import measure
from lmms_plugin.report.numbers import contents, results_folder
from lmms_plugin.report.numbers.summary import summarise

SETTINGS = measure.MeasurementSettings(resamples=20)
COLUMNS = ["Bits/KV", "KV kB"]


def write(folder, arguments="", **told):
    """A run whose results hold these numbers of its cache."""
    docs = report_study.documents(20)
    file = report_study.write_run(
        folder, docs, 0.8, model_args=f"pretrained=demo{arguments}", tasks={"shapes_rec": None}
    )
    content = json.loads(file.read_text())
    content["throughput"] |= told
    file.write_text(json.dumps(content))


def table_of(folder):
    summary = summarise(results_folder.read_folder(folder, SETTINGS), SETTINGS.level)
    table = contents.leader(summary)
    names = [column.title for column in table.columns]
    return names, {row[0].text: dict(zip(names, row, strict=True)) for row in table.rows}


def test_bits_and_size_of_a_cache_stand_beside_those_of_the_weights(tmp_path):
    write(tmp_path / "plain")
    write(tmp_path / "cache", ",kv_bits=4", avg_kv_bits_per_element=6.4375, avg_kv_bytes=53568.0)
    names, rows = table_of(tmp_path)
    place = names.index("Bits/KV")
    assert names[place : place + 2] == COLUMNS
    assert [rows["KV int4"][name].text for name in COLUMNS] == ["6.44", "53.6"]
    (plain,) = (row for label, row in rows.items() if label != "KV int4")
    assert [plain[name].value for name in COLUMNS] == [None, None]


def test_there_are_no_columns_without_a_quantized_cache(tmp_path):
    write(tmp_path / "plain")
    names, _ = table_of(tmp_path)
    assert not set(COLUMNS) & set(names)
