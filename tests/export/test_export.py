"""Runs written for leaderboards: schema, hub formats, submissions, and what a leaderboard refuses."""

import csv
import hashlib
import json
import re
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.submissions import SETTINGS, SOURCE, TASK, answered, retold, scored_as, seal, submit, verify, write_run
from huggingface_hub import ModelCard, parse_eval_result_entries

from lmms_plugin.analysis.logs import read_one
from lmms_plugin.cli.main import main
from lmms_plugin.export import every_eval_ever, hub
from lmms_plugin.export.asked_documents import documents
from lmms_plugin.export.measured import measured
from lmms_plugin.leaderboard import board, submission, verification
from lmms_plugin.leaderboard.verification import Refused, Verified, agreeing
from lmms_plugin.utils.plain_json import plain

DOCUMENTS = 24


@pytest.fixture(scope="module")
def rows():
    return answered(DOCUMENTS)


@pytest.fixture(scope="module")
def honest(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest")
    return submit(write_run(folder / "run", rows), folder / "honest")


@pytest.fixture
def copy(honest, tmp_path):
    return Path(shutil.copytree(honest, tmp_path / "copy"))


def lmms_plugin(monkeypatch, *arguments, code):
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == code


# --- Every Eval Ever -------------------------------------------------------------------------------------------------


def records(folder):
    (whole,) = folder.glob("data/*/*/*/*[!s].json")
    (lines,) = folder.glob("data/*/*/*/*_samples.jsonl")
    return json.loads(whole.read_text()), [json.loads(line) for line in lines.read_text().splitlines()], lines


def test_records_belong_together(honest):
    whole, documents, lines = records(honest)
    details = whole["detailed_evaluation_results"]
    assert details["file_path"] == lines.relative_to(honest).as_posix()
    assert details["checksum"] == hashlib.sha256(lines.read_bytes()).hexdigest()
    assert details["total_rows"] == len(documents) == DOCUMENTS
    assert {document["evaluation_id"] for document in documents} == {whole["evaluation_id"]}
    ids = {result["evaluation_result_id"] for result in whole["evaluation_results"]}
    assert {document["evaluation_result_id"] for document in documents} == {f"{TASK}/acc@0.5"} <= ids


def test_scores_are_those_of_lmms_evals_table(honest):
    whole, documents, _ = records(honest)
    table = json.loads((honest / "results" / "run_results.json").read_text())["results"][TASK]
    scores = {result["metric_config"]["metric_id"]: result["score_details"] for result in whole["evaluation_results"]}
    assert {name: details["score"] for name, details in scores.items()} == {
        key.removesuffix(",none"): value for key, value in table.items() if "stderr" not in key and value != TASK
    }
    right = [document["evaluation"]["is_correct"] for document in documents]
    assert scores["acc@0.5"]["score"] == pytest.approx(sum(right) / DOCUMENTS)
    between = scores["acc@0.5"]["uncertainty"]["confidence_interval"]
    assert between["lower"] <= scores["acc@0.5"]["score"] <= between["upper"]


def test_quantization_and_confidence_are_told_as_text(honest, rows):
    whole, documents, _ = records(honest)
    told = whole["model_info"]["additional_details"]
    assert (told["quantization_method"], told["quantization_bits"]) == ("rtn", "4")
    for document, row in zip(documents, rows, strict=True):
        assert float(document["metadata"]["confidence"]) == row["mean_iou"]["confidence"]["coordinate_mean"]
        assert float(document["metadata"]["iou"]) == row["mean_iou"]["score"]


def test_a_path_of_this_machine_names_no_dataset(honest):
    whole, _, _ = records(honest)
    sources = [result["source_data"] for result in whole["evaluation_results"]]
    assert {(source["source_type"], source["dataset_name"]) for source in sources} == {("other", TASK)}


def test_bounds_hold_every_score(honest):
    whole, _, _ = records(honest)
    for result in whole["evaluation_results"]:
        config = result["metric_config"]
        assert float(config["min_score"]) <= result["score_details"]["score"] <= float(config["max_score"])
    assert every_eval_ever.metric_bounds("phi@10") == (-10.0, 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_id", "demo"),
        ("model_id", "../demo"),
        ("organization", " "),
        ("organization", "a laboratory\u202e"),
        ("organization", "x" * 201),
        ("timestamp", -1),
        ("timestamp", "now"),
        ("relationship", "friend"),
        ("collection", "a/b"),
        ("collection", "data"),
    ],
)
def test_sources_are_checked(field, value):
    with pytest.raises(ValueError, match="expected"):
        replace(SOURCE, **{field: value})


# --- The hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(honest):
    return measured(read_one(honest / "results"), SETTINGS)


def test_eval_results_are_what_the_hub_reads(found, tmp_path):
    entry = hub.BenchmarkEntry(
        "somebody/benchmark", "rec", None, "acc@0.5", scale=100.0, source_url="https://example.org"
    )
    file = hub.write_eval_results(found, entry, tmp_path)
    assert file.parent == tmp_path / ".eval_results"
    (read,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (read.dataset_id, read.task_id, read.source_url) == (*entry[:2], "https://example.org")
    assert read.value == pytest.approx(100 * found.scores[TASK]["acc@0.5"].value)
    assert "bits=4" in read.notes


def test_model_index_holds_every_metric(found, tmp_path):
    hub.write_model_index(found, "model-rtn-4", "somebody/benchmark", tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    read = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert read == pytest.approx({name: score.value for name, score in found.scores[TASK].items()})
    assert {result.dataset_type for result in card.data.eval_results} == {"somebody/benchmark"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "eval-results"], "--dataset-id is missing"),
        (["--format", "eval-results", "--dataset-id", "a/b"], "--task-id is missing"),
        (["--format", "eval-results", "--dataset-id", "a/b", "--task-id", "t"], "--metric is missing"),
        (["--format", "model-index", "--model-id", "a/b"], "names no dataset on the hub"),
        (["--format", "submission"], "--model-id is missing"),
        (["--format", "submission", "--model-id", "a/b"], "--organization is missing"),
        (["--format", "every-eval-ever", "--model-id", "a/b", "--organization", "x"], "--relationship is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nothing_is_invented(honest, tmp_path, monkeypatch, capsys, arguments, message):
    lmms_plugin(monkeypatch, "export", honest / "results", *arguments, "-o", tmp_path / "out", code=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- Runs of some documents only -------------------------------------------------------------------------------------


def by_config(folder, rows):
    return write_run(folder, rows, limit=12)


def by_share(folder, rows):
    return write_run(folder, rows, limit=0.5)


def by_offset(folder, rows):
    return write_run(folder, rows, offset=3)


def by_command_line(folder, rows):
    return write_run(folder, rows, resolved_cli_args={"limit": 12})


def by_cell(folder, rows):
    write_run(folder, rows)
    (folder / "cell.json").write_text(json.dumps({"limit": 12}))
    return folder


def by_count(folder, rows):
    write_run(folder, rows)
    edit(folder / "run_results.json", lambda content: content["n-samples"][TASK].update(original=48))
    return folder


def by_numbers(folder, rows):
    return write_run(folder, [row | {"doc_id": row["doc_id"] + 3} for row in rows])


@pytest.mark.parametrize("form", ["submission", "every-eval-ever", "eval-results", "model-index"])
@pytest.mark.parametrize(
    ("limited_by", "message"),
    [
        (by_config, "expected a run of all documents, got one with --limit 12"),
        (by_share, "expected a run of all documents, got one with --limit 0.5"),
        (by_offset, "expected a run of all documents, got one with --offset 3"),
        (by_command_line, "expected a run of all documents, got one with --limit 12"),
        (by_cell, "expected a run of all documents, got one with --limit 12"),
        (by_count, f"expected all 48 documents, got {DOCUMENTS} scored and {DOCUMENTS} logged"),
        (by_numbers, f"expected documents numbered 0 to {DOCUMENTS - 1}, each once"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_runs_of_some_documents_are_not_exported(rows, tmp_path, monkeypatch, capsys, form, limited_by, message):
    run = limited_by(tmp_path / "run", rows)
    ids = ["--dataset-id", "a/b", "--task-id", "t", "--metric", "acc@0.5", "--model-id", "a/b"]
    who = ["--organization", "a laboratory", "--relationship", "other"]
    lmms_plugin(monkeypatch, "export", run, "--format", form, *ids, *who, "-o", tmp_path / "out", code=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_limit_of_minus_one_is_none(rows, tmp_path):
    assert measured(read_one(write_run(tmp_path / "run", rows, limit=-1, offset=0)), SETTINGS).scores[TASK]


# --- Submissions -----------------------------------------------------------------------------------------------------


def test_an_honest_submission_holds_as_folder_and_as_zip(honest):
    packed = submission.pack(honest)
    again = packed.read_bytes()
    packed.unlink()
    assert submission.pack(honest).read_bytes() == again
    folder, archive = verify(honest), verify(packed)
    assert isinstance(folder, Verified)
    assert isinstance(archive, Verified)
    assert folder.digest == archive.digest
    assert archive.tasks.keys() == folder.tasks.keys()
    assert archive.tasks[TASK].documents == folder.tasks[TASK].documents
    assert archive.tasks[TASK].scores["acc@0.5"] == folder.tasks[TASK].scores["acc@0.5"]
    assert folder.tasks[TASK].count == DOCUMENTS


def why_refused(path):
    refused = verify(path)
    assert isinstance(refused, Refused)
    return refused.reason


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def table_of(folder):
    return folder / "results" / "run_results.json"


def log_of(folder):
    return folder / "results" / f"run_samples_{TASK}.jsonl"


def whole_of(folder):
    (file,) = folder.glob("data/*/*/*/*[!s].json")
    return file


def edit_lines(folder, change):
    rows = [json.loads(line) for line in log_of(folder).read_text().splitlines()]
    log_of(folder).write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def raise_score(content):
    for result in content["evaluation_results"]:
        if result["metric_config"]["metric_id"] == "acc@0.5":
            result["score_details"]["score"] = 0.99


def edited_aggregate(folder):
    edit(whole_of(folder), raise_score)


def edited_interval(folder):
    def widen(content):
        content["evaluation_results"][0]["score_details"]["uncertainty"]["confidence_interval"]["lower"] = 0.9

    edit(whole_of(folder), widen)


def edited_table(folder):
    edited_aggregate(folder)
    edit(table_of(folder), lambda content: content["results"][TASK].update({"acc@0.5,none": 0.99}))


def better_ece(folder):
    edit(table_of(folder), lambda content: content["results"][TASK].update({"ece,none": 0.001}))


def invented_metric(folder):
    edit(table_of(folder), lambda content: content["results"][TASK].update({"agi,none": 1.0}))


def truncated_log(folder):
    edit_lines(folder, lambda rows: rows[:-2])


def truncated_log_and_n(folder):
    edit_lines(folder, lambda rows: rows[:-2])
    smaller = {"original": DOCUMENTS, "effective": DOCUMENTS - 2}
    edit(table_of(folder), lambda content: content["n-samples"].update({TASK: smaller}))


def duplicated_line(folder):
    edit_lines(folder, lambda rows: [*rows[:-1], rows[0]])


def renumbered(folder):
    edit_lines(folder, lambda rows: [rows[0] | {"doc_id": 99}, *rows[1:]])


def flipped(folder):
    def flip(rows):
        return [row | {"acc@0.5": row["acc@0.5"] | {"score": 1.0}} for row in rows]

    edit_lines(folder, flip)


def in_record(name, value):
    def change(folder):
        edit_lines(folder, lambda rows: [rows[0] | {"mean_iou": rows[0]["mean_iou"] | {name: value}}, *rows[1:]])

    change.__name__ = f"record_{name}"
    return change


def surer(folder):
    def change(rows):
        record = rows[0]["mean_iou"]
        return [rows[0] | {"mean_iou": record | {"confidence": record["confidence"] | {"joint": 1.0}}}, *rows[1:]]

    edit_lines(folder, change)


def limited(folder):
    edit(table_of(folder), lambda content: content["config"].update(limit=DOCUMENTS))


def started_late(folder):
    edit(table_of(folder), lambda content: content["config"].update(offset=10))


def other_version(folder):
    edit(whole_of(folder), lambda content: content.update(schema_version="0.2.2"))


def unknown_field(folder):
    edit(whole_of(folder), lambda content: content.update(award="best"))


def missing_records(folder):
    whole_of(folder).unlink()


def missing_log(folder):
    log_of(folder).unlink()


def second_table(folder):
    (folder / "results" / "other_results.json").write_text("{}")


def edited_document(folder):
    (file,) = folder.glob("data/*/*/*/*.jsonl")
    file.write_text(file.read_text().replace('"is_correct": false', '"is_correct": true'))


def linked(folder):
    (folder / "results" / "more.txt").symlink_to("/etc/hostname")


def damaged_log(folder):
    log_of(folder).write_text(log_of(folder).read_text()[:-50])


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (edited_aggregate, "not what the answers give: .*score: expected .*, got 0.99"),
        (edited_interval, "not what the answers give.*lower"),
        (edited_document, "not what the answers give"),
        (edited_table, r"expected the log of the same run .* got acc@0\.5"),
        (better_ece, "expected the log of the same run .* got ece"),
        (invented_metric, "agi is unknown"),
        (truncated_log, f"expected {DOCUMENTS} documents in .*, got {DOCUMENTS - 2}"),
        (truncated_log_and_n, "log of the same run"),
        (duplicated_line, "every document once"),
        (renumbered, "documents numbered 0 to 23"),
        (flipped, "scored anew, is not what the log says: acc@0.5"),
        (in_record("score", 1.0), "log of the same run"),
        (in_record("box", [0.0, 0.0, 0.5, 0.5]), "scored anew, is not what the log says"),
        (in_record("target", [0.0, 0.0, 0.5, 0.5]), "scored anew, is not what the log says"),
        (in_record("id", "another"), "scored anew, is not what the log says"),
        (surer, "scored anew, is not what the log says: .*joint"),
        (limited, "got one with --limit 24"),
        (started_late, "got one with --offset 10"),
        (other_version, "schema_version must be '0.3.0', got '0.2.2'"),
        (
            unknown_field,
            "is not valid in Every Eval Ever 0.3.0: unknown key 'award' \\(known: schema_version, evaluation_id",
        ),
        (missing_records, "is missing"),
        (missing_log, "expected its log of samples, which is missing"),
        (second_table, "expected one results file"),
        (linked, "plain files only"),
        (damaged_log, "is damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_hold_is_refused_though_the_hashes_do(copy, tamper, message):
    tamper(copy)
    if tamper is not linked:
        seal(copy)
    assert re.search(message, reason := why_refused(copy)), reason


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (edited_aggregate, r"\.json was changed: expected SHA-256"),
        (missing_log, "is missing"),
        (second_table, "is not in manifest.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "expected manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "expected lmms-plugin submission 1"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"a":' * 100_000), "manifest.json is damaged"),
    ],
    ids=["changed", "missing", "added", "no manifest", "other manifest", "damaged manifest", "nested manifest"],
)
def test_files_are_those_of_the_manifest(copy, tamper, message):
    tamper(copy)
    assert re.search(message, reason := why_refused(copy)), reason


def test_what_nothing_reads_belongs_to_no_submission(copy):
    (copy / "results" / "setup.py").write_text("print('hello')")
    seal(copy)
    assert verify(copy).reason == f"results/setup.py belongs to no submission of {TASK}"


def test_a_zip_cannot_fill_the_disk(tmp_path):
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("manifest.json", bytes(10_000_000))
    assert re.match(r"expected at most 10000 files and \d+ bytes unpacked", verify(archive).reason)


@pytest.mark.parametrize(("name", "unit"), [("cell.json", "file"), (f"run_samples_{TASK}.jsonl", "line")])
def test_nothing_too_long_for_memory_is_read(copy, monkeypatch, name, unit):
    monkeypatch.setattr(submission, "LONGEST_JSON", 1_000_000)
    monkeypatch.setattr(submission, "LONGEST_LINE", 1_000_000)
    assert isinstance(verify(copy), Verified)
    (copy / "results" / name).write_text(" " * 1_000_001)
    seal(copy)
    assert verify(copy).reason == f"{name}: expected at most 1000000 bytes in a {unit}, got more"


def test_a_zip_cannot_write_elsewhere(tmp_path):
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("../outside.txt", "x")
    assert "inside the folder" in why_refused(archive)
    assert not (tmp_path.parent / "outside.txt").exists()


def damaged_zip(path):
    """Compressed data that cannot be unpacked, in a zip whose directory is whole."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("manifest.json", "{}" * 400)
    content = bytearray(path.read_bytes())
    start = 30 + len("manifest.json")
    content[start : start + 4] = b"\xff" * 4
    path.write_bytes(content)
    return path


def shapeless_config(folder):
    edit(table_of(folder), lambda content: content["configs"][TASK].update(metadata="x"))


def shapeless_samples(folder):
    edit(table_of(folder), lambda content: content.update({"n-samples": {TASK: None}}))


def shapeless_cell(folder):
    (folder / "results" / "cell.json").write_text("[]")


def nested_table(folder):
    table_of(folder).write_text("[" * 100_000)


@pytest.mark.parametrize(
    "value",
    ["\ud800", "x" * 1_000_000, "a\u202eb", "a\x1b[2Jb", "a\nb"],
    ids=["half", "long", "turned", "clears", "line"],
)
@pytest.mark.parametrize("where", ["method", "a new axis", "model_args"])
def test_facts_that_cannot_be_shown_are_refused_and_no_other_suffers(copy, honest, tmp_path, where, value, monkeypatch):
    about = copy / "results" / "cell.json"
    axes = {"model": "demo", "method": "rtn", "bits": 4}
    if where == "model_args":
        edit(table_of(copy), lambda content: content["config"].update(model_args=f"pretrained=demo,bits={value}"))
        about.write_text(json.dumps({"axes": axes}))
    else:
        about.write_text(json.dumps({"axes": axes | {"method" if where == "method" else value: value}}))
    seal(copy)
    reason = why_refused(copy)
    assert reason.isprintable()
    assert len(reason) <= verification.LONGEST_REASON + 2
    if where == "model_args":
        return
    assert "printable characters" in reason or "unicode string" in reason
    lmms_plugin(monkeypatch, "leaderboard", copy, honest, "-o", tmp_path / "board", "--resamples", 20, code=1)
    content = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    assert [row["submission"] for row in content["tasks"][0]["rows"]] == [honest.name]
    assert [one["submission"] for one in content["refused"]] == [copy.name]
    assert honest.name in (tmp_path / "board" / "leaderboard.html").read_text()


def test_a_name_that_is_no_utf8_is_refused_and_no_other_suffers(honest, tmp_path, monkeypatch):
    named = tmp_path / "caf\udce9"
    shutil.copytree(honest, named)
    assert "printable characters" in why_refused(named)
    lmms_plugin(monkeypatch, "leaderboard", named, honest, "-o", tmp_path / "board", "--resamples", 20, code=1)
    content = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    assert [one["submission"] for one in content["refused"]] == ["caf "]
    assert content["tasks"][0]["rows"][0]["submission"] == honest.name


def test_a_leaderboard_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    board.write([], [], SETTINGS, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(before) == ["leaderboard.csv", "leaderboard.html", "leaderboard.json"]
    monkeypatch.setattr(board, "page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        board.write([], [Refused("a", "b")], SETTINGS, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    (tmp_path / "leaderboard.html").unlink()
    (tmp_path / "leaderboard.html").mkdir()
    with pytest.raises(OSError, match="leaderboard"):
        board.write([], [Refused("a", "b")], SETTINGS, tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (shapeless_config, "expected a mapping as metadata of a task, got 'x'"),
        (shapeless_samples, f"n-samples: {TASK}: expected a mapping, got None"),
        (shapeless_cell, "expected a JSON object in "),
        (nested_table, "which is damaged: maximum recursion depth exceeded"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unexpected_shapes_are_refused(copy, tamper, reason):
    tamper(copy)
    seal(copy)
    assert reason in why_refused(copy)


def test_one_bad_submission_does_not_keep_the_others_from_the_page(honest, copy, tmp_path, monkeypatch, capsys):
    shapeless_config(copy)
    seal(copy)
    given = [damaged_zip(tmp_path / "bad.zip"), honest, copy]
    lmms_plugin(monkeypatch, "leaderboard", *given, "-o", tmp_path / "board", code=1)
    content = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    assert [row["submission"] for row in content["tasks"][0]["rows"]] == ["honest"]
    reasons = {one["submission"]: one["reason"] for one in content["refused"]}
    assert reasons.keys() == {"bad.zip", "copy"}
    assert reasons["bad.zip"].startswith("damaged: zlib.error: Error -3 while decompressing data")
    assert f"refused: bad.zip: {reasons['bad.zip']}" in capsys.readouterr().err


def test_reasons_are_short_and_print_on_one_line(copy):
    edit(copy / "manifest.json", lambda content: content.update(format="\x1b[2J\n\u202e" + "x" * 10_000))
    reason = why_refused(copy)
    assert reason.isprintable()
    assert len(reason) < 1_000


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"confidence": {"coordinate_mean": 1.0}}, "expected no confidence of an answer's own .* got coordinate_mean"),
        ({"dialect": "fractions"}, "expected answers in one dialect, got demo, fractions"),
        ({"original_size": [224, 112]}, "expected one size of image .* got .*224, 112"),
        ({"model_size": [56, 56]}, "expected one size of image .* got .*56, 56"),
        ({"original_size": [-112, 112]}, "expected sizes of at least 1 pixel"),
    ],
    ids=str,
)
def test_what_an_answer_says_of_itself_is_checked_though_scores_follow_from_it(rows, tmp_path, told, message):
    run = write_run(tmp_path / "run", [*rows[:-1], retold(rows[-1], **told)])
    with pytest.raises(ValueError, match=message):
        measured(read_one(run), SETTINGS)


def shifted_too(folder, **metadata):
    """Adds a task with shifted images to a run, with the answers to the images as they are."""
    other = "shapes_shift_gaussian_noise_3"
    shutil.copyfile(folder / f"run_samples_{TASK}.jsonl", folder / f"run_samples_{other}.jsonl")

    def add(content):
        for part in ("results", "configs", "n-samples"):
            content[part][other] = dict(content[part][TASK])
        content["configs"][other]["metadata"] = metadata

    edit(folder / "run_results.json", add)
    return folder


def test_answers_to_clean_images_are_none_to_shifted_ones(rows, tmp_path):
    run = shifted_too(write_run(tmp_path / "run", rows), shift="gaussian_noise", severity=3)
    with pytest.raises(ValueError, match=f"{TASK} and shapes_shift_gaussian_noise_3: .* the same"):
        measured(read_one(run), SETTINGS)


def test_a_shift_is_that_of_the_tasks_definition(rows, tmp_path):
    run = shifted_too(write_run(tmp_path / "run", rows), shift="fog", severity=1)
    with pytest.raises(ValueError, match=r"expected the shift, .* \('gaussian_noise', 3, 'image'\), got \('fog', 1"):
        measured(read_one(run), SETTINGS)


# --- Across submissions ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fewer(rows, tmp_path_factory):
    """Everything made anew from a log without its last two documents: by itself it holds."""
    folder = tmp_path_factory.mktemp("fewer")
    return verify(submit(write_run(folder / "run", rows[:-2]), folder / "fewer"))


@pytest.fixture(scope="module")
def kinder(rows, tmp_path_factory):
    """Everything made anew with a true box moved to where the answer is: by itself it holds."""
    folder = tmp_path_factory.mktemp("kinder")
    worst = min(range(DOCUMENTS), key=lambda k: rows[k]["mean_iou"]["score"] if rows[k]["mean_iou"]["box"] else 2.0)
    changed = [scored_as(row, target=row["mean_iou"]["box"]) if k == worst else row for k, row in enumerate(rows)]
    return verify(submit(write_run(folder / "run", changed), folder / "kinder"))


@pytest.fixture(scope="module")
def invented(rows, tmp_path_factory):
    """Answers that no model gave, with everything that follows from them."""
    folder = tmp_path_factory.mktemp("invented")
    perfect = [
        scored_as(row, answer="[{:.2f}, {:.2f}, {:.2f}, {:.2f}]".format(*row["mean_iou"]["target"])) for row in rows
    ]
    return verify(submit(write_run(folder / "run", perfect), folder / "invented"))


def test_other_documents_than_most_submissions_are_refused(honest, fewer, kinder):
    one, other = verify(honest), verify(honest)
    for odd in (fewer, kinder):
        assert isinstance(odd, Verified)
        kept, refused = agreeing([one, odd, other], {})
        assert kept == [one, other]
        assert [(r.name, r.reason) for r in refused] == [
            (odd.name, f"task {TASK}: expected the documents of most submissions, got others")
        ]


@pytest.mark.parametrize("told", [{"tags": {"clean": False}}, {"change": "colour"}, {"matches": 0}], ids=str)
def test_all_that_scores_depend_on_is_of_the_documents(rows, tmp_path, told):
    """A document called unclean would be left out of the metrics of clean ones."""
    record = rows[0]["mean_iou"]
    described = [rows[0] | {"mean_iou": record | told}, *rows[1:]]
    answers = [*rows[:-1], scored_as(rows[-1], answer=rows[0]["filtered_resps"])]
    usual, odd, other = (
        documents(read_one(write_run(tmp_path / name, given)), TASK)
        for name, given in (("usual", rows), ("odd", described), ("other", answers))
    )
    assert usual == other != odd


def test_without_a_majority_a_reference_decides(honest, fewer):
    one = verify(honest)
    kept, refused = agreeing([one, fewer], {})
    assert kept == []
    assert all("name a --reference" in r.reason for r in refused)
    kept, refused = agreeing([one, fewer], {TASK: one.tasks[TASK].documents})
    assert kept == [one]
    assert "documents of the reference" in refused[0].reason


def test_invented_answers_cannot_be_told_from_files(invented):
    """What the documentation says this cannot do."""
    assert isinstance(invented, Verified)
    assert invented.tasks[TASK].scores["acc@0.5"].value == 1.0


# --- The page --------------------------------------------------------------------------------------------------------


def test_same_answers_are_said_and_equal_scores_share_a_rank(honest, invented):
    one = verify(honest)
    (table,) = board.tables([one, replace(one, name="again"), invented])
    assert [(row.rank, row.submission) for row in table.rows] == [(1, "invented"), (2, "again"), (2, "honest")]
    assert [row.same_answers for row in table.rows] == [(), ("honest",), ("again",)]


def test_the_same_answers_are_found_in_a_log_written_otherwise(honest, rows, tmp_path):
    spaced = write_run(tmp_path / "run", [dict(reversed(row.items())) for row in reversed(rows)])
    one, other = verify(honest), verify(submit(spaced, tmp_path / "other"))
    assert isinstance(other, Verified)
    assert one.answers == other.answers


def test_page_needs_no_network_and_runs_nothing_it_is_given(honest):
    evil = "<script>alert(1)</script>"
    one = verify(honest)
    told = replace(one, name=evil, source=replace(one.source, organization=evil), facts={"quantization_method": evil})
    text = board.page(board.tables([told]), [Refused(evil, evil)], SETTINGS)
    assert evil not in text
    assert "&lt;script&gt;" in text
    assert "http://" not in text
    assert "https://" not in text
    assert text.count("<script>") == 1


@pytest.mark.parametrize("chosen", [{"level": 0.6}, {"resamples": 5}, {"seed": 3}], ids=str)
def test_all_intervals_of_a_board_are_made_in_its_own_way(honest, rows, tmp_path, chosen):
    """Whoever claims intervals at a level of 0.6 looks surer than the others."""
    submit(write_run(tmp_path / "run", rows), tmp_path / "other", settings=replace(SETTINGS, **chosen))
    usual, other = verify(honest), verify(tmp_path / "other")
    assert isinstance(other, Verified)
    assert usual.tasks[TASK].scores["acc@0.5"].low < usual.tasks[TASK].scores["acc@0.5"].high
    assert plain(other.tasks[TASK].scores) == plain(usual.tasks[TASK].scores)


def test_page_and_files_say_how_intervals_were_made(honest, tmp_path, monkeypatch):
    chosen = ["--level", 0.9, "--resamples", 30, "--seed", 7]
    lmms_plugin(monkeypatch, "leaderboard", honest, "-o", tmp_path, *chosen, code=0)
    made = {"level": 0.9, "resamples": 30, "seed": 7, "method": "bootstrap over images"}
    content = json.loads((tmp_path / "leaderboard.json").read_text())
    assert content["intervals"] == made
    page = " ".join((tmp_path / "leaderboard.html").read_text().split())
    assert "its 90 % interval by bootstrap over images (30 resamples, seed 7)" in page
    with (tmp_path / "leaderboard.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert {(line["level"], line["resamples"], line["seed"]) for line in lines} == {("0.9", "30", "7")}
    own = verify(honest, replace(SETTINGS, level=0.9, resamples=30, seed=7)).tasks[TASK].scores["mean_iou"]
    shown = next(line for line in lines if line["metric"] == "mean_iou")
    assert (float(shown["low"]), float(shown["high"])) == (own.low, own.high)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"resamples": 10**12}, "expected at most 1,000,000 resamples"),
        ({"resamples": 10**5}, "expected 1 to 10000 resamples"),
        ({"estimator": "joint"}, "expected the settings resamples, seed"),
        ({"level": 7}, r"confidence level in \(0.5, 1\)"),
    ],
    ids=str,
)
def test_settings_of_a_submission_are_checked(copy, chosen, message):
    edit(copy / "manifest.json", lambda content: content["settings"].update(chosen))
    assert re.search(message, reason := why_refused(copy)), reason


def test_too_many_resamples_make_no_submission(honest, tmp_path, monkeypatch, capsys):
    who = ["--model-id", "a/b", "--organization", "x", "--relationship", "other", "--resamples", 20_000]
    lmms_plugin(monkeypatch, "export", honest / "results", "--format", "submission", *who, "-o", tmp_path / "o", code=2)
    assert "expected 1 to 10000 resamples in a submission" in capsys.readouterr().err


def test_no_spreadsheet_takes_a_claim_for_a_formula(honest, tmp_path):
    one = verify(honest)
    told = replace(one, source=replace(one.source, organization='=HYPERLINK("x")'), facts={"quantization_bits": "@x"})
    board.write(board.tables([told]), [], SETTINGS, tmp_path)
    with (tmp_path / "leaderboard.csv").open() as stream:
        line = next(csv.DictReader(stream))
    assert (line["organization"], line["quantization_bits"]) == ('\'=HYPERLINK("x")', "'@x")


@pytest.mark.slow
def test_from_lmms_evals_run_to_the_page(local_copy, honest, commands, tmp_path, monkeypatch, capsys):
    """A whole task, small because its dataset is, checked against that dataset."""
    monkeypatch.setenv("LMMS_PLUGIN_REFCOCOPLUS", str(local_copy))
    task, given = "refcocoplus_rec_testA", {"LMMS_PLUGIN_REFCOCOPLUS": str(local_copy)}
    command = ["lmms-eval", "--model", "quant_rtn", "--model_args", "pretrained=demo,bits=3"]
    command += ["--tasks", task, "--batch_size", "11", "--log_samples", "--output_path", tmp_path / "out"]
    commands.output(*command, cwd=tmp_path, **given)
    real = read_one(tmp_path / "out")
    who = ["--model-id", "somebody/demo", "--organization", "a laboratory", "--relationship", "other"]
    export = ["export", real.file, "--format", "submission", *who, "--resamples", "20", "--zip"]
    lmms_plugin(monkeypatch, *export, "-o", tmp_path / "rtn-3", code=0)
    both = [tmp_path / "rtn-3.zip", honest]
    lmms_plugin(monkeypatch, "leaderboard", *both, "-o", tmp_path / "board", "--datasets", code=1)
    # Of the demo's 488 expressions the other submission answered 24.
    assert f"refused: honest: task {TASK}: expected the documents of the reference" in capsys.readouterr().err
    content = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    (row,) = content["tasks"][0]["rows"]
    assert (row["submission"], row["documents"], row["images"]) == ("rtn-3", 11, 4)
    claimed = {f"{name},none": score["value"] for name, score in row["scores"].items()}
    assert claimed == pytest.approx({name: real.results[task][name] for name in claimed})
    assert {"acc@0.5,none", "mean_iou,none", "ece,none"} <= claimed.keys()
    with (tmp_path / "board" / "leaderboard.csv").open() as stream:
        lines = {line["metric"]: line for line in csv.DictReader(stream)}
    assert float(lines["mean_iou"]["value"]) == claimed["mean_iou,none"]
    assert lines["mean_iou"]["quantization_bits"] == "3"
    assert "rtn-3" in (tmp_path / "board" / "leaderboard.html").read_text()
