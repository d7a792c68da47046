"""Records of Every Eval Ever, held against its own schema and validator, which are fetched for the tests alone."""

import copy
import json
import sys
from collections import Counter

import pytest
from helpers.submissions import (
    REJECTION_TASK,
    SETTINGS,
    SOURCE,
    TASK,
    VQA_TASK,
    answered,
    both_ways,
    questioned,
    write_run,
)
from jsonschema import Draft7Validator

from lmms_plugin.analysis.logs import read_one
from lmms_plugin.analysis.records import KINDS
from lmms_plugin.cli.main import main
from lmms_plugin.export import every_eval_ever as exporting
from lmms_plugin.export import record_types, validator
from lmms_plugin.export.measured import measured

RUNS = {
    "grounding": (lambda: answered(12), {}),
    "a shifted task": (lambda: answered(12), {"of": "shapes_shift_gaussian_noise_3"}),
    "rejection": (lambda: both_ways(12), {"task": REJECTION_TASK}),
    "questions": (lambda: questioned(120), {"task": VQA_TASK}),
    "a word of the user's on generation": (lambda: answered(12), {"gen_kwargs": "temperature=0.5"}),
}
MODELS = {"aggregate": record_types.RunRecord, "document": record_types.DocumentRecord}
SCHEMAS = {"aggregate": "eval.schema.json", "document": "instance_level_eval.schema.json"}
WRONG = (None, True, -1, 2.5, "text", [], {}, [None], {"a": 1})


@pytest.fixture(scope="module")
def schemas(every_eval_ever):
    """The published schemas, by what they are of."""
    folder = every_eval_ever / "every_eval_ever" / "schemas"
    found = {kind: json.loads((folder / name).read_text()) for kind, name in SCHEMAS.items()}
    for schema in found.values():
        assert schema["version"] == record_types.VERSION
        Draft7Validator.check_schema(schema)
    return {kind: Draft7Validator(schema) for kind, schema in found.items()}


@pytest.fixture
def published(every_eval_ever, monkeypatch):
    """Every Eval Ever's package, as though it were installed."""
    monkeypatch.syspath_prepend(every_eval_ever)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == validator.PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def unpublished(monkeypatch):
    """No such package, whatever is installed."""
    monkeypatch.setitem(sys.modules, validator.PACKAGE, None)


def written(folder, rows, of=None, **more):
    run = write_run(folder / "run", rows, **more)
    if of is not None:
        for file in run.iterdir():
            shifted = {"dataset_path": "/somewhere/data", "test_split": "test"}
            shifted["metadata"] = {"shift": "gaussian_noise", "severity": 3}
            content = file.read_text().replace(f'"{TASK}"', f'"{of}"')
            if file.suffix == ".json":
                content = json.dumps(json.loads(content) | {"configs": {of: shifted}})
            file.with_name(file.name.replace(TASK, of)).write_text(content)
            if file.suffix == ".jsonl":
                file.unlink()
    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Name of a run → both records of its export, as files hold them."""
    found = {}
    for name, (rows, more) in RUNS.items():
        folder = tmp_path_factory.mktemp("export")
        run = read_one(written(folder, rows(), **more))
        files = exporting.write(measured(run, SETTINGS), SOURCE, folder).files
        lines = (folder / files.instances).read_text().splitlines()
        found[name] = json.loads((folder / files.aggregate).read_text()), [json.loads(line) for line in lines]
    return found


def test_all_kinds_of_tasks_are_exported(exported):
    told = {result["metric_config"]["additional_details"]["confidence_estimator"] for result in results(exported)}
    assert told == {kind.estimator for kind in KINDS}
    assert {result["evaluation_name"] for result in results(exported)} >= {TASK, REJECTION_TASK, VQA_TASK}


def results(exported):
    return [result for whole, _ in exported.values() for result in whole["evaluation_results"]]


@pytest.mark.parametrize("run", RUNS)
def test_exports_are_valid_by_the_published_schema(exported, schemas, run):
    whole, documents = exported[run]
    schemas["aggregate"].validate(whole)
    for document in documents:
        schemas["document"].validate(document)


@pytest.mark.parametrize("run", RUNS)
def test_what_is_read_is_what_was_written(exported, run):
    whole, documents = exported[run]
    assert record_types.read(record_types.RunRecord, whole, "here").content() == whole
    assert [
        record_types.read(record_types.DocumentRecord, document, "here").content() for document in documents
    ] == documents


def example(exported, kind, run="grounding"):
    """One record: of the aggregate with its first two results, to keep the number of damaged ones small."""
    whole, documents = exported[run]
    if kind == "document":
        return documents[0]
    return whole | {"evaluation_results": whole["evaluation_results"][:2]}


def places(content, where=()):
    """All places in a record, the whole first."""
    yield where
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from places(value, (*where, key))


def damaged(content):
    """Copies of a record with one value taken out, or replaced by one of another type or out of range."""
    for *outer, last in filter(None, places(content)):
        for value in (..., *WRONG):
            changed = copy.deepcopy(content)
            place = changed
            for key in outer:
                place = place[key]
            if value is ...:
                del place[last]
            else:
                place[last] = value
            yield (*outer, last), value, changed


def accepted(model, content):
    try:
        record_types.read(model, content, "here")
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("run", ["grounding", "questions"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_the_schema_refuses_our_models_refuse(exported, schemas, kind, run):
    counts = Counter()
    for place, value, content in damaged(example(exported, kind, run)):
        valid, ours = schemas[kind].is_valid(content), accepted(MODELS[kind], content)
        assert valid or not ours, f"{place} as {value!r} is refused by the schema alone"
        counts[valid, ours] += 1
    # Neither refuses everything: text may be any text.
    assert counts[False, False] > 200
    assert counts[True, True] > 20


def changed(content, path, value):
    content = copy.deepcopy(content)
    *outer, last = path.split("/")
    place = content
    for key in outer:
        place = place[int(key) if isinstance(place, list) else key]
    place.pop(last) if value is ... else place.update({last: value})
    return content


RESULT = "evaluation_results/0"
UUID = "11111111-2222-4333-8444-555555555555"


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("aggregate", "quantization", "4 bits"),
        ("aggregate", "eval_library/version", ...),
        ("aggregate", "evaluation_timestamp", None),
        ("aggregate", "source_metadata/evaluator_relationship", "friend"),
        ("aggregate", "source_metadata/source_type", "rumour"),
        ("aggregate", "model_info/additional_details/deployment_type", "rented"),
        ("aggregate", "model_info/additional_details/model_availability", ...),
        ("aggregate", "model_info/additional_details/quantization_bits", 4),
        ("aggregate", f"{RESULT}/metric_config/score_type", "graded"),
        ("aggregate", f"{RESULT}/metric_config/max_score", ...),
        ("aggregate", f"{RESULT}/metric_config/max_score", "infinite"),
        ("aggregate", f"{RESULT}/metric_config/lower_is_better", "no"),
        ("aggregate", f"{RESULT}/source_data/source_type", "book"),
        ("aggregate", f"{RESULT}/source_data/dataset_name", ...),
        ("aggregate", f"{RESULT}/score_details/score", "0.5"),
        ("aggregate", f"{RESULT}/score_details/uncertainty/confidence_interval/confidence_level", 95),
        ("aggregate", f"{RESULT}/score_details/uncertainty/confidence_interval/upper", ...),
        ("aggregate", f"{RESULT}/score_details/uncertainty/num_samples", 1.5),
        ("aggregate", f"{RESULT}/generation_config/generation_args/max_tokens", 0),
        ("aggregate", "detailed_evaluation_results/format", "csv"),
        ("aggregate", "detailed_evaluation_results/hash_algorithm", "crc32"),
        ("aggregate", "detailed_evaluation_results/file_path", f"data/a/b/{UUID}_samples.jsonl"),
        ("aggregate", "detailed_evaluation_results/file_path", f"data/a/b/c/{UUID}.jsonl"),
        ("aggregate", "detailed_evaluation_results/file_path", f"data/a/b/c/{UUID.replace('-4', '-1')}_samples.jsonl"),
        ("aggregate", "detailed_evaluation_results/file_path", f"data/a//c/{UUID}_samples.jsonl"),
        ("document", "award", "best"),
        ("document", "sample_id", 7),
        ("document", "interaction_type", "chat"),
        # A single turn has an output and no messages.
        ("document", "output", ...),
        ("document", "output", None),
        ("document", "messages", []),
        # Several turns have no output.
        ("document", "interaction_type", "multi_turn"),
        ("document", "input/reference", "a text"),
        ("document", "answer_attribution/0/turn_idx", -1),
        ("document", "evaluation/is_correct", 1),
        ("document", "metadata/iou", 0.5),
    ],
)
def test_damaged_records_are_refused_by_both(exported, schemas, kind, path, value):
    content = changed(example(exported, kind), path, value)
    assert not schemas[kind].is_valid(content)
    with pytest.raises(ValueError, match=r"^here is not valid in Every Eval Ever 0\.3\.0: \S[^\n]*$"):
        record_types.read(MODELS[kind], content, "here")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", "0.2.2", "here is not valid .*: schema_version must be '0.3.0', got '0.2.2'"),
        (
            f"{RESULT}/score_details/score",
            1.5,
            r"evaluation_results\[0\]: expected a score from 0\.0 to 1\.0, got 1\.5",
        ),
        ("detailed_evaluation_results/file_path", f"data/a/b/c/{UUID.upper().replace('1', 'A')}_samples.jsonl", "UUID"),
        ("eval_library/version", ..., "here is not valid .*: eval_library: version is missing$"),
    ],
)
def test_refusals_say_what_was_expected_and_what_came(exported, path, value, message):
    with pytest.raises(ValueError, match=message):
        record_types.read(record_types.RunRecord, changed(example(exported, "aggregate"), path, value), "here")


def test_a_record_cannot_be_changed(exported):
    record = record_types.read(record_types.DocumentRecord, example(exported, "document"), "here")
    with pytest.raises(ValueError, match="frozen"):
        record.evaluation.score = 1.0


# --- The validator of Every Eval Ever --------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_the_validator_of_the_format_finds_nothing(published, tmp_path, run):
    rows, more = RUNS[run]
    found = measured(read_one(written(tmp_path, rows(), **more)), SETTINGS)
    checked = exporting.write(found, SOURCE, tmp_path / "out").checked
    assert checked == "records checked by the validator of Every Eval Ever 0.3.0, without a warning"


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029", "\x0b", "\x1c", "\r"])
def test_ends_of_lines_by_unicode_part_no_record(published, tmp_path, end):
    found = measured(
        read_one(write_run(tmp_path / "run", questioned(60, word=f"two{end}cups"), task=VQA_TASK)), SETTINGS
    )
    files, checked = exporting.write(found, SOURCE, tmp_path)
    assert checked.endswith("without a warning")
    lines = (tmp_path / files.instances).read_bytes().decode().splitlines()
    assert f"two{end}cups" in {text for line in lines for text in json.loads(line)["output"]["raw"]}


def one_more_row(content):
    content["detailed_evaluation_results"]["total_rows"] += 1


def other_model(content):
    content["model_info"]["id"] = "somebody/another"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_more_row, "validator refuses .*total_rows"),
        (other_model, "validator refuses .*model_id"),
    ],
)
def test_the_validator_of_the_format_is_really_asked(published, tmp_path, monkeypatch, change, message):
    """By records that are valid each by itself and do not belong together."""
    found = measured(read_one(write_run(tmp_path / "run", answered(12))), SETTINGS)
    content = exporting.RunRecord.content

    def edited(record):
        told = content(record)
        if isinstance(record, record_types.RunRecord):
            change(told)
        return told

    monkeypatch.setattr(record_types.RecordPart, "content", edited)
    with pytest.raises(ValueError, match=message):
        exporting.write(found, SOURCE, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("form", ["every-eval-ever", "submission"])
@pytest.mark.parametrize("there", ["published", "unpublished"])
def test_the_command_says_who_checked(request, tmp_path, monkeypatch, capsys, form, there):
    request.getfixturevalue(there)
    run = write_run(tmp_path / "run", answered(12))
    who = ["--model-id", "a/b", "--organization", "a laboratory", "--relationship", "other", "--resamples", "20"]
    monkeypatch.setattr(
        sys, "argv", ["lmms-plugin", "export", str(run), "--format", form, *who, "-o", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert left.value.code == 0, err
    assert "checked by" not in out
    (line,) = [line for line in err.splitlines() if "checked by" in line]
    if there == "published":
        assert line == "records checked by the validator of Every Eval Ever 0.3.0, without a warning"
    else:
        assert "checked by lmms-plugin's own models of Every Eval Ever 0.3.0" in line
        assert "pip install 'lmms-plugin[export]', in Python 3.12 or newer" in line


def test_a_validator_of_another_version_is_not_asked(published, tmp_path, monkeypatch):
    import every_eval_ever.validate

    monkeypatch.setattr(every_eval_ever.validate, "get_schema_version", lambda: "0.4.0")
    assert "is of 0.4.0 and was not asked" in validator.check(tmp_path)
