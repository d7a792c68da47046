"""A run joined with its features: what is trained on, what is refused, and the log with a selector's confidence."""

import json

import numpy as np
import pytest
import torch

from lmms_plugin import metrics
from lmms_plugin.analysis.logs import read_one
from lmms_plugin.cli.main import main
from lmms_plugin.selector import training
from lmms_plugin.selector.features import FeatureOrigin, Features, FeatureWriter, key, read
from lmms_plugin.selector.network import Selector, SelectorSettings

ORIGIN = FeatureOrigin("a" * 64, {"method": "rtn", "plan": {"language": {"bits": 3}}}, -1)
SETTINGS = SelectorSettings(hidden=16, lr=5e-3, epochs=25)
METRICS = {"mean_iou": [{"metric": "mean_iou"}, {"metric": "ece"}], "accuracy": [{"metric": "accuracy"}]}


def answers(kind, name, n=240, seed=0, parts=("",)):
    """Rows of a log, and features that know how good each answer is; ids run against the documents' numbers."""
    random = np.random.default_rng(seed)
    skill, logprob = random.normal(size=n), -random.random(n)
    rows = []
    for k in range(n):
        record = {"image": f"{name}{k // 4}", "id": f"{n - k:04d}", "question": f"q{k}", "part": parts[k % len(parts)]}
        record["confidence"] = {"joint": float(np.exp(logprob[k])), "coordinate_mean": 0.5}
        if kind == "mean_iou":
            record |= {"score": 0.5 if skill[k] > 0 else 0.49, "expression": record.pop("question"), "box": None}
            record["target"], _ = [0, 0, 1, 1], record.pop("part")
        else:
            record |= {"accuracy": round(float(1 / (1 + np.exp(-3 * skill[k]))), 1), "answers": ["yes\u2028", "no"]}
        rows.append({"doc_id": k, kind: record})
    image = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    image[:, 2] = torch.from_numpy(skill)
    return rows, Features(image, torch.zeros(n, 5), torch.ones(n, 5), torch.from_numpy(logprob).float())


def written(folder, tasks, origin=ORIGIN):
    """A results folder and its features; `tasks`: name → (kind, rows, features)."""
    (folder / "run").mkdir(parents=True)
    writer = FeatureWriter(folder / "features", origin)
    for name, (_, rows, features) in tasks.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / "run" / f"20260101_000000_samples_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        writer.add([key(name, row["doc_id"]) for row in rows], features)
    writer.flush()
    content = {
        "results": {name: {} for name in tasks},
        "configs": {name: {"metric_list": METRICS[kind], "test_split": "dev"} for name, (kind, _, _) in tasks.items()},
        "n-samples": {name: {"effective": len(rows)} for name, (_, rows, _) in tasks.items()},
        "config": {"model": "quant_rtn", "model_args": "bits=3"},
    }
    (folder / "run" / "20260101_000000_results.json").write_text(json.dumps(content), encoding="utf-8")
    return read_one(folder / "run"), read(folder / "features")


def one(folder, kind="mean_iou", name="rec", origin=ORIGIN, **options):
    return written(folder, {name: (kind, *answers(kind, name, **options))}, origin)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return training.train(*one(tmp_path_factory.mktemp("dev"), name="dev"), SETTINGS)


def test_boxes_are_right_from_half_an_iou_and_rows_find_their_features(tmp_path, trained):
    run, store = one(tmp_path, seed=1)
    assert trained.record.target == "mean_iou >= 0.5"
    assert trained.record.data["tasks"] == ["dev"]
    assert trained.record.data["run"] == "quant_rtn bits=3"
    assert trained.record.data["mean_target"] == pytest.approx(0.5, abs=0.1)
    confidence = trained.confidence(training.features_of(run.tasks["rec"], store))
    assert metrics.auroc(confidence, run.tasks["rec"].outcome) > 0.9


def test_questions_are_judged_by_soft_accuracy_of_the_part_for_training(tmp_path):
    run, store = one(tmp_path, "accuracy", n=400, parts=("dev", "val", "test"))
    selector = training.train(run, store, SETTINGS)
    assert selector.record.target == "accuracy"
    assert selector.record.data["answers"] == 134
    records = run.tasks["rec"]
    confidence = selector.confidence(training.features_of(records, store))
    assert np.corrcoef(confidence, records.score)[0, 1] > 0.85
    assert selector.seen_among(records.images.tolist()) == sorted(set(records.images[records.parts == "dev"].tolist()))


def test_parts_that_results_are_reported_on_are_never_trained_on(tmp_path):
    with pytest.raises(ValueError, match="a part 'dev' of task rec to train on, got test, val"):
        training.train(*one(tmp_path, "accuracy", parts=("val", "test")), SETTINGS)


def test_tasks_can_be_chosen_and_kinds_are_not_mixed(tmp_path):
    both = {"rec": ("mean_iou", *answers("mean_iou", "rec")), "vqa": ("accuracy", *answers("accuracy", "vqa"))}
    run, store = written(tmp_path, both)
    with pytest.raises(ValueError, match="tasks of one kind, got rec, vqa"):
        training.train(run, store, SETTINGS)
    with pytest.raises(ValueError, match=r"expected tasks of .* \(rec, vqa\), got shapes"):
        training.train(run, store, SETTINGS, ["shapes"])
    assert training.train(run, store, SelectorSettings(hidden=2, epochs=1), ["rec"]).record.data["answers"] == 240


def test_features_of_other_answers_are_refused(tmp_path):
    rows, features = answers("mean_iou", "rec")
    changed = features._replace(logprob=features.logprob.clone().index_fill(0, torch.tensor([7]), -3.0))
    with pytest.raises(ValueError, match=r"1 of 240 have another probability, e.g. rec/7: 0.049787 with its features"):
        training.train(*written(tmp_path / "changed", {"rec": ("mean_iou", rows, changed)}), SETTINGS)
    run, _ = written(tmp_path / "whole", {"rec": ("mean_iou", rows, features)})
    _, fewer = written(tmp_path / "fewer", {"rec": ("mean_iou", rows[:200], features.rows(range(200)))})
    with pytest.raises(ValueError, match="40 of 240 lack"):
        training.train(run, fewer, SETTINGS)


def test_a_log_gets_the_confidence_and_keeps_everything_else(tmp_path, trained, capsys, monkeypatch):
    run, store = one(tmp_path, seed=1)
    trained.save(tmp_path / "s")
    command = ["lmms-plugin", "selector", "apply", str(tmp_path / "run"), "--features", str(tmp_path / "features")]
    command += ["--selector", str(tmp_path / "s"), "--output", str(tmp_path / "new")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "--estimator selector" in capsys.readouterr().out
    again = read_one(tmp_path / "new").tasks["rec"]
    expected = trained.confidence(training.features_of(run.tasks["rec"], store))
    np.testing.assert_allclose(again.confidence_by("selector"), expected, atol=1e-6)
    before, after = ([json.loads(line) for line in path.open()] for path in (run.log("rec"), again_log(tmp_path)))
    for row in after:
        row["mean_iou"]["confidence"].pop("selector")
    assert before == after
    with pytest.raises(FileExistsError, match="holds files"):
        training.apply(run, store, trained, tmp_path / "new")


def again_log(folder):
    return read_one(folder / "new").log("rec")


def test_answers_with_line_separators_of_unicode_keep_their_rows(tmp_path):
    run, store = one(tmp_path, "accuracy", n=40, parts=("dev",))
    selector = training.train(run, store, SelectorSettings(hidden=2, epochs=1))
    other = {"vqa": ("accuracy", *answers("accuracy", "other", n=40, seed=1))}
    run, store = written(tmp_path / "other", other)
    assert training.apply(run, store, selector, tmp_path / "new") == "selector"
    assert read_one(tmp_path / "new").tasks["vqa"].ids.size == 40


def test_images_that_were_trained_on_get_no_confidence(tmp_path, trained):
    run, store = one(tmp_path, name="dev")
    with pytest.raises(ValueError, match="dev holds 60 such"):
        training.apply(run, store, trained, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_quantization_is_refused_and_marked_when_taken(tmp_path, trained):
    run, store = one(tmp_path, origin=FeatureOrigin("a" * 64, {**ORIGIN.quantization, "method": "hqq"}, -1))
    with pytest.raises(ValueError, match="method rtn and hqq; --transfer takes it"):
        training.apply(run, store, trained, tmp_path / "new")
    assert training.apply(run, store, trained, tmp_path / "new", transfer=True) == "selector_transferred"
    assert set(read_one(tmp_path / "new").tasks["rec"].confidence) >= {"selector_transferred", "joint"}


def test_the_command_trains_and_says_what_it_did(tmp_path, capsys, monkeypatch):
    one(tmp_path, name="dev")
    command = ["lmms-plugin", "selector", "fit", str(tmp_path / "run"), "--features", str(tmp_path / "features")]
    command += ["--output", str(tmp_path / "s"), "--hidden", "4", "--epochs", "2", "--seed", "3"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="0"):
        main()
    printed = capsys.readouterr().out
    record = Selector.load(tmp_path / "s").record
    assert record.settings == SelectorSettings(hidden=4, epochs=2, seed=3)
    assert record.origin == ORIGIN
    assert set(record.versions) == {"lmms-plugin", "torch"}
    assert "answers: 240" in printed
    assert f"documents: {record.data['documents']}" in printed
    assert len(record.data["documents"]) == 64
