"""Studies that stop when they know: no false claims at any stage, the same decisions however they were run."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.small_studies import CELL
from helpers.study_folders import CLEAN, SHIFTED, write_cell

from lmms_plugin.analysis.findings import EQUIVALENT, OPEN, SHOWN
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.asked import parse
from lmms_plugin.study.file.expansion import cells
from lmms_plugin.study.file.grid import CellAxes
from lmms_plugin.study.file.identity import keyed
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.run import until_decided
from lmms_plugin.study.run.attempt import about
from lmms_plugin.study.run.execution import Work
from lmms_plugin.study.verdicts import completeness, sequential_verdict
from lmms_plugin.study.verdicts.boundaries import ANY_TIME, PLANNED, RULES
from lmms_plugin.study.verdicts.decisions import (
    INTERACTION,
    UNDER_SHIFT,
    ArmComparison,
    Decisions,
    StageAnswers,
    differences,
    differences_by_seed,
    right_answers,
)
from lmms_plugin.study.verdicts.stages import ImageStages, follow
from lmms_plugin.utils.image_slices import ImageSlice

PLUGIN = Path(sys.executable).parent / "lmms-plugin"
MARGIN = 0.05
ASKED = {
    "question": "Which is right more often?",
    "clean": CLEAN,
    "shifted": list(SHIFTED),
    "margin": MARGIN,
    "arms": {"robust": {"method": ["awq"]}, "plain": {"method": ["rtn"]}},
    "contrasts": [["robust", "plain"]],
}


def axes(method, bits, seed=None):
    return CellAxes("demo", method, bits, None, None, None, seed)


def placed(*cells):
    return [SimpleNamespace(axes=one) for one in (axes("none", 16), *cells)]


def answers(random, images, right):
    """StageAnswers of every cell to the same images of 1 to 4 documents; `right` are axes → task → share."""
    sizes = random.integers(1, 5, size=images)
    luck = random.random((images, 4))
    asked = np.arange(4) < sizes[:, None]
    return {
        one: StageAnswers(
            sizes.astype(float), {task: ((luck < p) & asked).sum(axis=1).astype(float) for task, p in shares.items()}
        )
        for one, shares in right.items()
    }


def shares(clean, shifted):
    return {CLEAN: clean, SHIFTED[0]: shifted, SHIFTED[1]: shifted}


@pytest.mark.parametrize("boundaries", RULES)
def test_cells_stop_when_their_own_comparisons_are_decided(boundaries):
    """At 4 bits one arm is far better under shift, at 3 bits both are nearly the same, which takes more images."""
    right = {
        axes("none", 16): shares(0.9, 0.9),
        axes("awq", 4): shares(0.8, 0.8),
        axes("rtn", 4): shares(0.8, 0.3),
        axes("awq", 3): shares(0.8, 0.5),
        axes("rtn", 3): shares(0.8, 0.48),
    }
    cells = placed(*[one for one in right if one.method != "none"])
    stages = ImageStages(0, (100, 500, 900), (), 4, boundaries)
    found = Decisions.of(parse(MethodByShift, ASKED), cells, stages.rule)
    assert found.needed() == set(right)
    random = np.random.default_rng(2)
    found.add(answers(random, 100, right))
    four = [ArmComparison("demo", "robust", "plain", 4, asked) for asked in (UNDER_SHIFT, INTERACTION)]
    assert [found.found[one].finding for one in four] == [SHOWN, SHOWN]
    assert found.needed() == {one for one in right if one.bits != 4}
    decided = {one: found.found[one] for one in four}
    while found.open():
        found.add(answers(random, 400, {one: right[one] for one in found.needed()}))
    assert {one: found.found[one] for one in four} == decided
    three = found.found[four[0]._replace(bits=3)]
    assert three.finding == EQUIVALENT
    assert three.images > 100
    assert -MARGIN < three.interval.low < three.difference < three.interval.high < MARGIN


def test_arms_are_means_over_tasks_seeds_and_methods():
    """Two seeds of one method count as one method: (0.5 (a + b) + c) ÷ 2."""
    arms = {"robust": {"method": ["awq", "mbq"]}, "plain": {"method": "rtn"}}
    question = parse(MethodByShift, ASKED | {"arms": arms})
    cells = [axes("awq", 4, 0), axes("awq", 4, 1), axes("mbq", 4), axes("rtn", 4)]
    found = Decisions.of(question, placed(*cells), schedule(100).rule)
    right = {
        axes("none", 16): (6.0, 6.0, 6.0),
        cells[0]: (5.0, 4.0, 2.0),
        cells[1]: (5.0, 2.0, 0.0),
        cells[2]: (3.0, 1.0, 1.0),
        cells[3]: (4.0, 2.0, 1.0),
    }
    tasks = (CLEAN, *SHIFTED)
    sizes = np.array([10.0])
    given = {one: {t: np.array([v]) for t, v in zip(tasks, values, strict=True)} for one, values in right.items()}
    found.add({one: StageAnswers(sizes, by_task) for one, by_task in given.items()})
    under = found.found[ArmComparison("demo", "robust", "plain", 4, UNDER_SHIFT)]
    inter = found.found[ArmComparison("demo", "robust", "plain", 4, INTERACTION)]
    shifted = ((4 + 2 + 2 + 0) / 4 + 1) / 2 - 1.5
    assert under.difference == pytest.approx(shifted / 10)
    assert inter.difference == pytest.approx((shifted - (4.0 - 4.0)) / 10)
    assert under.broken == ()


def test_seeds_of_a_source_go_together_and_sources_apart():
    """Two methods of the first arm calibrate with the same data, the second arm with others; one has a single seed."""
    random = np.random.default_rng(4)
    own = {
        CellAxes("demo", method, 4, None, None, source, seed): StageAnswers(
            np.full(20, 3.0), {task: random.integers(0, 4, size=20) * 1.0 for task in (CLEAN, *SHIFTED)}
        )
        for method, source, seeds in (("awq", "self", 2), ("mbq", "self", 2), ("gptq", "demo", 3), ("rtn", None, 1))
        for seed in range(seeds)
    }
    groups = {name: tuple(one for one in own if one.method == name) for name in ("awq", "mbq", "gptq", "rtn")}
    first, second = (groups["awq"], groups["mbq"]), (groups["gptq"], groups["rtn"])
    question = parse(MethodByShift, ASKED)
    together, apart = differences_by_seed(UNDER_SHIFT, question, first, second, own)

    def shifted(one):
        return (own[one].right[SHIFTED[0]] + own[one].right[SHIFTED[1]]) / 2

    assert together == pytest.approx(
        np.stack([(shifted(a) + shifted(b)) / 2 for a, b in zip(groups["awq"], groups["mbq"], strict=True)])
    )
    assert apart == pytest.approx(np.stack([-shifted(one) / 2 for one in groups["gptq"]]))
    # What seeds add on average is the difference, less what arms without seeds add.
    whole = differences(UNDER_SHIFT, right_answers(question, first, second, own))
    assert together.mean(axis=0) + apart.mean(axis=0) - shifted(groups["rtn"][0]) / 2 == pytest.approx(whole)
    both = differences_by_seed(INTERACTION, question, first, second, own)
    assert both[1] == pytest.approx(apart - np.stack([-own[one].right[CLEAN] / 2 for one in groups["gptq"]]))


def test_robustness_of_a_broken_arm_is_not_waited_for():
    right = {axes("none", 16): shares(0.9, 0.9), axes("awq", 2): shares(0.2, 0.1), axes("rtn", 2): shares(0.8, 0.7)}
    found = Decisions.of(parse(MethodByShift, ASKED), placed(axes("awq", 2), axes("rtn", 2)), schedule(200, 100).rule)
    found.add(answers(np.random.default_rng(3), 100, right))
    one = found.found[ArmComparison("demo", "robust", "plain", 2, INTERACTION)]
    assert one.broken == ("robust",)
    assert one.finding == OPEN
    assert not found.needed()


def stage_cells():
    places = (axes("none", 16), axes("awq", 4), axes("rtn", 4))
    return [replace(CELL, axes=one, tasks=(CLEAN, *SHIFTED)) for one in places]


def planted(folder):
    """Return what gives a stage its cells: folders that are written when they are asked for first."""
    chances = {"none": (0.95, 0.9, 0.9), "awq": (0.9, 0.7, 0.7), "rtn": (0.9, 0.45, 0.45)}

    def obtain(cells):
        ids = []
        for cell in cells:
            name = f"{cell.axes.method}-{cell.images.replace(':', '-')}"
            ids.append(name)
            if (folder / "cells" / name).exists():
                continue
            _, start, stop = map(int, cell.images.split(":"))
            random = np.random.default_rng(start)
            luck = random.random(4 * (stop - start))
            right = {task: luck < chance for task, chance in zip(cell.tasks, chances[cell.axes.method], strict=True)}
            written = write_cell(folder, name, asdict(cell.axes), right)
            said = json.loads((written / "cell.json").read_text())
            (written / "cell.json").write_text(json.dumps(said | {"images": cell.images}))
        return ids

    return obtain


def schedule(count=200, first=10, boundaries=PLANNED):
    return ImageStages.of({f"image{number}": 4 for number in range(count)}, 0, first, boundaries)


def test_a_study_goes_on_where_it_was_with_the_same_verdict(tmp_path):
    question = parse(MethodByShift, ASKED)
    given = (tmp_path, question, stage_cells(), schedule())
    first = follow(*given, planted(tmp_path))
    assert 1 < first.stages < len(schedule().images)
    said = sequential_verdict.conclude(first)
    cells = sorted((tmp_path / "cells").iterdir())
    assert len(cells) == 3 * first.stages
    shutil.rmtree(cells[1])
    assert sequential_verdict.conclude(follow(*given, planted(tmp_path))) == said
    (found,) = said
    answer, scope = found.sentences
    assert answer.startswith("demo, robust against plain on shifted images: more often right at 4 bits (")
    assert "loses less at 4 bits" in answer
    asked = 3 * 3 * 4 * schedule().images[first.stages - 1]
    assert f"{asked:,} answers instead of 7,200" in scope
    assert "undecided" not in scope


def test_what_all_images_do_not_decide_stays_open(tmp_path):
    decided = follow(tmp_path, parse(MethodByShift, ASKED), stage_cells(), schedule(3, 1), planted(tmp_path))
    assert decided.stages == 3
    (found,) = sequential_verdict.conclude(decided)
    assert "2 of 2 comparisons undecided" in found.sentences[-1]
    assert "no difference shown at 4 bits (3 images)" in found.sentences[0]
    assert "0 % saved" in found.sentences[-1]


def test_a_missing_cell_ends_a_study_without_verdict(tmp_path):
    assert follow(tmp_path, parse(MethodByShift, ASKED), stage_cells(), schedule(), lambda _: None) is None


def test_cells_that_answered_other_images_are_refused(tmp_path):
    other = ImageStages.of({f"image{number}": 3 for number in range(200)}, 0, 10)
    with pytest.raises(ValueError, match="expected 30 documents of 10 images in awq-0-0-10, got 40 of 10"):
        follow(tmp_path, parse(MethodByShift, ASKED), stage_cells(), other, planted(tmp_path))


def test_a_part_of_the_images_is_a_cell_of_its_own():
    whole, part = (keyed(replace(CELL, images=images), cuda=False) for images in (None, "0:0:30"))
    assert whole.differences(part.parts) == ["images"]
    assert "images" not in whole.parts
    assert whole.cell.place != part.cell.place
    assert "images0-30" in part.id
    said = about(part, 0)
    assert said["images"] == "0:0:30"
    assert said["command"][:3] == ["env", "LMMS_PLUGIN_IMAGES=0:0:30", "lmms-eval"]
    assert about(whole, 0)["command"][0] == "lmms-eval"


STUDY = """
models: [demo]
tasks: [[shapes_rec, shapes_shift_gaussian_noise_3]]
batch_size: 64
resources: {gpus: 0}
grids:
  - {methods: [none]}
  - {methods: [rtn, hqq], bits: [4]}
"""
ANALYSIS = """
analysis:
  question: Does one keep more?
  clean: shapes_rec
  shifted: [shapes_shift_gaussian_noise_3]
  margin: 1.9
  arms: {hqq: {method: hqq}, rtn: {method: rtn}}
  contrasts: [[hqq, rtn]]
"""


def refused(folder, text, message):
    file = folder / "study.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        until_decided.run(file, Work.on(folder / "out", None))
    assert "\n" not in str(error.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STUDY, "expected an analysis for --until-decided, got none"),
        (STUDY + "limit: 8" + ANALYSIS, "expected no limit with --until-decided, got 8"),
        (
            STUDY + "analysis: {kind: components, question: Which, metrics: [ece]}",
            "expected method_by_shift for --until-decided, got 'components'",
        ),
        (
            (STUDY + ANALYSIS).replace("gaussian_noise_3", "synonyms_3"),
            "expected the same documents in every task",
        ),
    ],
)
def test_what_cannot_be_decided_in_stages_is_refused_before_anything_runs(tmp_path, text, message):
    refused(tmp_path, text, message)


def test_images_of_a_study_are_the_most_that_stages_ask_about(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY + ANALYSIS, encoding="utf-8")
    study = read(file)
    _, every = until_decided.asked_about(study, cells(study))
    file.write_text(STUDY + "images: 7" + ANALYSIS, encoding="utf-8")
    study = read(file)
    _, some = until_decided.asked_about(study, cells(study))
    assert some.items() <= every.items()
    assert some.keys() == ImageSlice(0, 0, 7).of(every)
    assert {cell.images for cell in cells(study)} == {"0:0:7"}


def test_an_unknown_rule_is_refused_before_anything_runs(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY + ANALYSIS, encoding="utf-8")
    with pytest.raises(
        ValueError, match="--boundaries: expected one of planned, any-time, got 'anytime', did you mean"
    ):
        until_decided.run(file, Work.on(tmp_path / "out", None), boundaries="anytime")
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_its_stages_and_its_rule(tmp_path):
    made = schedule(200, 10, ANY_TIME)
    made.write(tmp_path)
    assert ImageStages.read(tmp_path) == made
    (tmp_path / "stages.json").write_text((tmp_path / "stages.json").read_text().replace("any-time", "never"))
    with pytest.raises(ValueError, match=r"stages.json is damaged.*boundaries"):
        ImageStages.read(tmp_path)


@pytest.mark.parametrize(
    ("count", "boundaries", "expected"),
    [
        (130, PLANNED, (33, 66, 130)),
        (1500, PLANNED, (375, 750, 1500)),
        (50, PLANNED, (30, 50)),
        (130, ANY_TIME, (30, 60, 130)),
    ],
)
def test_the_first_stage_is_a_quarter_of_the_images_or_thirty(count, boundaries, expected):
    assert schedule(count, None, boundaries).images == expected


def test_images_of_the_environment_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_PLUGIN_IMAGES", "0:0:8")
    refused(tmp_path, STUDY + ANALYSIS, "expected LMMS_PLUGIN_IMAGES to be unset")


def command(*arguments):
    done = subprocess.run([str(PLUGIN), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_study_of_the_demo_stops_and_goes_on_after_the_loss_of_a_cell(tmp_path):
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(STUDY + ANALYSIS, encoding="utf-8")
    arguments = ("study", "run", file, "--output", out, "--until-decided", "--first-images", "2")
    printed = command(*arguments)
    assert "images, in random order (seed 0)" in printed
    assert printed.splitlines()[-1] == f"All cells on one page: lmms-plugin report {out} -o report.html"
    verdict = json.loads((out / "verdict.json").read_text())
    (details,) = verdict["details"]
    assert {one["finding"] for one in details["comparisons"]} == {EQUIVALENT}
    stages = details["stages"]
    cells = sorted(one.name for one in (out / "cells").iterdir())
    assert len(cells) == 3 * stages
    shutil.rmtree(out / "cells" / cells[0])
    command(*arguments, "--jobs", "2")
    assert sorted(one.name for one in (out / "cells").iterdir()) == cells
    assert json.loads((out / "verdict.json").read_text()) == verdict
    (out / "verdict.json").unlink()
    completeness.analyse(out)
    assert json.loads((out / "verdict.json").read_text()) == verdict
    command("report", out, "-o", tmp_path / "report.html")
    assert "hqq against rtn on shifted images: equally often right" in (tmp_path / "report.html").read_text()
