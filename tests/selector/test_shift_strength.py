"""Strength of shifts from features and logs, as the command reads them; a run of the demo lends its files."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from lmms_plugin.analysis.logs import read_one
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.cli.main import main
from lmms_plugin.selector import shift_strength
from lmms_plugin.selector.features import read

TASKS = [f"shapes_shift_gaussian_noise_{severity}" for severity in (1, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, commands):
    folder = tmp_path_factory.mktemp("strength")
    arguments = f"pretrained=demo,features={folder / 'features'},feature_layer=0"
    command = ["lmms-eval", "--model", "quant_none", "--model_args", arguments]
    command += ["--tasks", ",".join(["shapes_rec", *TASKS]), "--limit", "40", "--batch_size", "64", "--log_samples"]
    commands.output(*command, "--output_path", folder / "results", cwd=folder)
    return folder


def measured(folder):
    run, store = read_one(folder / "results"), read(folder / "features")
    return {one.task: one for one in shift_strength.strengths(run, store, MeasurementSettings())}


@pytest.mark.slow
def test_stronger_noise_is_further_away_and_costs_more(folder):
    found = measured(folder)
    clean, weak, strong = (found[task] for task in ("shapes_rec", *TASKS))
    assert strong.mmd > max(weak.mmd, clean.mmd) + 0.1
    assert strong.scores["accuracy"] < clean.scores["accuracy"]
    # A dozen images say nothing of the covariance of 128 features.
    assert np.isnan(strong.frechet)
    assert weak.images == clean.images == len(set(read_one(folder / "results").tasks["shapes_rec"].images))


@pytest.mark.slow
def test_the_same_images_again_are_no_shift(folder):
    run, store = read_one(folder / "results"), read(folder / "features")
    clean, again = run.tasks["shapes_rec"], replace(run.tasks["shapes_rec"], place=run.tasks[TASKS[0]].place)
    two = replace(run, tasks={"shapes_rec": clean, "again": again})
    found = shift_strength.strengths(two, store, MeasurementSettings())
    assert found[1].mmd == pytest.approx(0.0, abs=1e-9)


@pytest.mark.slow
def test_other_images_are_refused(folder):
    run, store = read_one(folder / "results"), read(folder / "features")
    shifted = run.tasks[TASKS[0]]
    other = replace(run, tasks={**run.tasks, TASKS[0]: replace(shifted, names=np.char.add(shifted.names, "x"))})
    with pytest.raises(ValueError, match="the same images"):
        shift_strength.strengths(other, store, MeasurementSettings())


@pytest.mark.slow
def test_a_question_without_an_image_is_refused(folder):
    run, store = read_one(folder / "results"), read(folder / "features")
    blank = store.features._replace(image=torch.full_like(store.features.image, -torch.inf))
    with pytest.raises(ValueError, match="an image with every question"):
        shift_strength.strengths(run, store._replace(features=blank), MeasurementSettings())


@pytest.mark.slow
def test_the_command_prints_what_was_measured(folder, capsys, monkeypatch):
    arguments = ["strength", str(folder / "results"), "--features", str(folder / "features"), "--json"]
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", *arguments])
    with pytest.raises(SystemExit) as status:
        main()
    printed = capsys.readouterr()
    assert status.value.code == 0, printed.err
    by_task = {one["task"]: one for one in json.loads(printed.out)}
    assert by_task[TASKS[1]]["mmd"] == pytest.approx(measured(folder)[TASKS[1]].mmd)
