"""Features of finished runs, found by their model arguments; what is missing is told with run and remedy."""

import json

import numpy as np
import pytest
import torch
from helpers import planted_logs

from lmms_plugin.analysis.logs import read_one
from lmms_plugin.cli.main import main
from lmms_plugin.selector.features import FeatureOrigin, Features, FeatureWriter, key
from lmms_plugin.selector.kept_features import RunFeatures

TASKS = {"rec": {}, "dev": {"dataset_path": "other"}}
COUNT = 400


def run_with_features(folder, *, method="none", missing=0, seed=0, broken=0.0):
    """A run of two tasks and the features it kept; the first answers of a task may lack them."""
    random = np.random.default_rng(seed)
    writer = FeatureWriter(folder / "features", FeatureOrigin("a" * 64, {"method": method}))
    tasks = {}
    for name in TASKS:
        joint = np.round(random.uniform(0.2, 0.9, COUNT), 6)
        both = [{"joint": one, "coordinate_mean": one} for one in joint.tolist()]
        start = 0 if name == "rec" else 5000
        tasks[name] = [planted_logs.line(start + k, 0.8, told) for k, told in enumerate(both)]
        parts = torch.from_numpy(random.normal(size=(3, COUNT, 4)))
        parts[1, 7, 2] += broken
        found = Features(*parts, torch.from_numpy(np.log(joint)))
        kept = range(missing if name == "rec" else 0, COUNT)
        writer.add([key(name, tasks[name][k]["doc_id"]) for k in kept], found.rows(list(kept)))
    writer.flush()
    planted_logs.write(folder / "run", tasks, f"quant_{method}", **TASKS)
    (file,) = (folder / "run").glob("*_results.json")
    content = json.loads(file.read_text())
    content["config"]["model_args"] = f"pretrained=demo,features={folder / 'features'}"
    file.write_text(json.dumps(content))
    return read_one(folder / "run")


def test_features_are_found_where_the_run_says(tmp_path):
    run = run_with_features(tmp_path)
    features = RunFeatures()
    assert features.kept(run)
    found = features("unquantized", run, run.tasks["rec"])
    assert found.shape == (COUNT, 13)
    assert np.exp(found[:, -1]) == pytest.approx(run.tasks["rec"].confidence["joint"], abs=1e-6)


def test_a_run_that_kept_none_is_told(tmp_path):
    run = read_one(planted_logs.write(tmp_path / "run", {"rec": planted_logs.answers(0.5)}))
    features = RunFeatures()
    assert not features.kept(run)
    with pytest.raises(ValueError, match=r"unquantized .*kept none: run it again with features=DIR"):
        features("unquantized", run, run.tasks["rec"])


def test_a_folder_that_is_not_there_is_told(tmp_path):
    run = run_with_features(tmp_path)
    (tmp_path / "features").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"unquantized in .*no folder here: start this in the folder that the run"):
        RunFeatures()("unquantized", run, run.tasks["rec"])


def printed(capsys, monkeypatch, *arguments, status=0):
    monkeypatch.setattr("sys.argv", ["lmms-plugin", "guarantee", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    told = capsys.readouterr()
    return told.err if status else told.out


def test_the_command_weighs_by_features_and_names_answers_without(tmp_path, capsys, monkeypatch):
    run_with_features(tmp_path / "a")
    run_with_features(tmp_path / "b", method="rtn", missing=3, seed=1)
    own = (tmp_path / "a" / "run", "--calibrate", "dev", "--risk", "0.2")
    told = json.loads(printed(capsys, monkeypatch, *own, "--reweigh", "--json"))
    assert told["reweighing"] == {"by": "features", "lacking": ""}
    assert told["cells"][0]["reweighed"]["effective_images"] > 50
    both = (*own, "--on", tmp_path / "b" / "run")
    said = printed(capsys, monkeypatch, *both, "--reweigh", status=2)
    assert said.count("\n") == 1
    assert f"rtn 4 in {tmp_path / 'b' / 'features'}" in said
    assert "3 of 400 lack, e.g. rec/0" in said
    assert "run it again with features=DIR" in said
    told = json.loads(printed(capsys, monkeypatch, *both, "--reweigh-by", "confidences", "--json"))
    assert told["settings"]["reweigh"]
    assert told["reweighing"] == {"by": "confidences", "lacking": ""}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_told(tmp_path, value):
    run = run_with_features(tmp_path, broken=value)
    with pytest.raises(
        ValueError, match=r"finite features of unquantized in .* got others of 1 of 400 .*document 7: run"
    ):
        RunFeatures()("unquantized", run, run.tasks["rec"])


@pytest.mark.parametrize("damage", [b"", b"cut"], ids=["empty", "cut off"])
def test_a_damaged_file_of_features_is_told(tmp_path, damage):
    run = run_with_features(tmp_path)
    next((tmp_path / "features").glob("*.safetensors")).write_bytes(damage)
    with pytest.raises(ValueError, match=r"features of unquantized in .*: run it again with features=DIR"):
        RunFeatures()("unquantized", run, run.tasks["rec"])
