"""Importances of components on planted grids, and from results files as lmms-eval writes them."""

import itertools
import json
import shutil
import sys

import numpy as np
import pytest

from lmms_plugin.analysis.component_importance import ComponentGrid, analyse, draw, grids, read
from lmms_plugin.cli.main import main

BITS = (2, 3, 4, 8, 16)
RANK = {bits: rank for rank, bits in enumerate(BITS)}
COMPONENTS = ("vision", "connector", "language")
FULL = np.array(list(itertools.product(BITS, repeat=3)))


def planted(vision, connector, language, bits=FULL):
    ranks = np.vectorize(RANK.get)(bits)
    return ComponentGrid("planted", COMPONENTS, bits, ranks @ np.array([vision, connector, language], dtype=float))


@pytest.fixture(scope="module")
def found():
    return analyse(planted(3.0, 0.0, 1.0), resamples=8)


def test_every_measure_sums_to_100(found):
    for measure in ("forest", "permutation", "shap", "consensus"):
        assert sum(getattr(one, measure) for one in found.importances) == pytest.approx(100)


def test_additive_effects_are_recovered(found):
    # Effects of 3 and 1 per step: variances 9:1 for impurity and permutation, mean magnitudes 3:1 for SHAP.
    vision, connector, language = found.importances
    assert [vision.forest, language.forest] == pytest.approx([90, 10], abs=1)
    assert [vision.permutation, language.permutation] == pytest.approx([90, 10], abs=2)
    assert [vision.shap, language.shap] == pytest.approx([75, 25], abs=1)
    assert vision.consensus == pytest.approx((vision.forest + vision.permutation + vision.shap) / 3)
    assert connector.consensus < 0.1
    assert found.r2 > 0.99


def test_intervals_hold_the_consensus_and_tell_components_apart(found):
    vision, connector, language = found.importances
    assert all(one.low <= one.consensus <= one.high for one in found.importances)
    assert vision.low > language.high > language.low > connector.high


@pytest.mark.slow
def test_the_number_of_threads_changes_nothing():
    grid = planted(1.0, 2.0, 0.5, FULL[::4])
    assert analyse(grid, resamples=6, workers=2) == analyse(grid, resamples=6)
    assert analyse(grid, resamples=6, seed=1).importances != analyse(grid, resamples=6).importances


def test_noise_is_reported_as_unpredictable():
    scores = np.random.default_rng(0).normal(size=len(FULL))
    assert analyse(ComponentGrid("noise", COMPONENTS, FULL, scores), resamples=2).r2 < 0.2


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (planted(1.0, 0.0, 0.0, FULL[:5]), "at least 8 runs"),
        (planted(0.0, 0.0, 0.0), "every run scores 0"),
        (ComponentGrid("nan", COMPONENTS, FULL, np.where(FULL[:, 0] == 2, np.nan, 1.0)), "finite"),
        (ComponentGrid("nothing", (), np.empty((9, 0), np.int64), np.arange(9.0)), "differ in bits"),
    ],
    ids=["too few", "constant", "NaN", "nothing varies"],
)
def test_what_cannot_be_analysed_is_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        analyse(grid, resamples=2)


def write(folder, model, arguments, score, name):
    folder.mkdir(exist_ok=True)
    content = {
        "configs": {},
        "n-samples": {},
        "results": {"gqa": {"alias": "gqa", "exact_match,none": score, "exact_match_stderr,none": 0.1}},
        "config": {"model": model, "model_args": arguments},
    }
    (folder / f"{name}_results.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    """A grid of vision and language bits by rtn with scores 10 log2(language) + log2(vision), and other runs."""
    for vision, language in itertools.product((3, 4, 8), repeat=2):
        arguments = f"pretrained=demo,vision_bits={vision},bits={language},batch_size=4"
        write(tmp_path, "quant_rtn", arguments, 10 * np.log2(language) + np.log2(vision), f"{vision}{language}")
    write(tmp_path, "quant_none", "pretrained=demo", 44.0, "none")
    write(tmp_path, "quant_rtn", "pretrained=demo,bits=4,group_size=32", 20.0, "other")
    write(tmp_path, "qwen2_5_vl", "pretrained=demo", 50.0, "theirs")
    write(tmp_path, "quant_rtn", "pretrained=demo,plan=rules.yaml", 50.0, "plan")
    return tmp_path


def test_runs_are_read_from_lmms_evals_files(folder):
    cells, left_out = read(folder)
    by_method = {grid.name: grid for grid in grids(cells, ["exact_match"])}
    grid = by_method["rtn pretrained=demo, gqa exact_match"]
    assert grid.components == ("vision", "language")
    assert grid.levels == {"vision": [3, 4, 8, 16], "language": [3, 4, 8, 16]}
    # The run without quantization is a corner of the grid.
    assert len(grid.scores) == 10
    assert grid.scores[(grid.bits == [4, 8]).all(1)] == pytest.approx([32])
    assert "10 of 16 combinations in 10 runs" in grid.described()
    assert "rtn group_size=32 pretrained=demo, gqa exact_match" in by_method
    assert sorted(line.rpartition("/")[2].partition(":")[0] for line in left_out) == [
        "plan_results.json",
        "theirs_results.json",
    ]


def test_names_of_files_and_folders_change_nothing(folder, tmp_path_factory):
    renamed = tmp_path_factory.mktemp("renamed")
    for k, file in enumerate(sorted(folder.glob("*_results.json"), reverse=True)):
        (renamed / f"run{k}").mkdir()
        shutil.copy(file, renamed / f"run{k}" / f"{k:02d}_results.json")
    one, other = (list(grids(read(where)[0], ["exact_match"])) for where in (folder, renamed))
    assert [grid.name for grid in one] == [grid.name for grid in other]
    first, second = (next(grid for grid in found if "group_size" not in grid.name) for found in (one, other))
    assert first.bits.tolist() == second.bits.tolist()
    assert first.scores.tolist() == second.scores.tolist()
    shares = [analyse(grid, resamples=2).to_dict() for grid in (first, second)]
    assert shares[0] == shares[1]


def test_the_command_prints_the_grid_and_draws(folder, capsys, monkeypatch):
    (folder / "other_results.json").unlink()
    pictures = folder / "pictures"
    arguments = [str(folder), "--metric", "exact_match", "--resamples", "4", "--figure", str(pictures)]
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", "sensitivity", *arguments])
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 0
    printed = capsys.readouterr()
    assert "consensus" in printed.out
    assert "vision {3, 4, 8, 16}" in " ".join(printed.out.split())
    assert "theirs_results.json" in printed.err
    assert [file.read_bytes()[:4] for file in pictures.iterdir()] == [b"\x89PNG"]


def test_json_holds_every_run(folder, capsys, monkeypatch):
    (folder / "other_results.json").unlink()
    arguments = [str(folder), "--metric", "exact_match", "--resamples", "2", "--json"]
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", "sensitivity", *arguments])
    with pytest.raises(SystemExit) as status:
        main()
    printed = capsys.readouterr()
    assert status.value.code == 0, printed.err
    (one,) = json.loads(printed.out)
    assert len(one["runs"]) == 10
    assert {"bits": {"vision": 16, "language": 16}, "score": 44.0} in one["runs"]


def test_another_metric_is_an_error(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", "sensitivity", str(folder)])
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 2
    assert "acc@0.5" in capsys.readouterr().err


def test_drawing_needs_no_display(found, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    draw(found, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()
