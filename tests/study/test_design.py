"""Designs of studies: what images and seeds show, which of them a difference or a budget asks for, and pilots."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.study_folders import CLEAN, SHIFTED, write_cell

from lmms_plugin.cli.screens.plan_screen import plan_screen
from lmms_plugin.cli.screens.screen import HEIGHT, WIDTH
from lmms_plugin.metrics.power import smallest_difference
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.asked import parse
from lmms_plugin.study.file.expansion import cells
from lmms_plugin.study.file.grid import CellAxes
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.file.task_images import image_counts
from lmms_plugin.study.file.tasks import known
from lmms_plugin.study.run import cost, design, planning
from lmms_plugin.study.run.planning import Plan, PlannedCell, checked_cells
from lmms_plugin.study.run.weights import Size
from lmms_plugin.study.verdicts import pilot
from lmms_plugin.study.verdicts.decisions import INTERACTION, UNDER_SHIFT, comparisons

REFERENCE = Path(__file__).parents[2] / "studies" / "zero_shot_vs_ptq_refcocoplus.yaml"
BILLIONS = 8
SEEDS = """
models: [Qwen/Qwen3-VL-8B-Instruct]
tasks: [refcocoplus_rec_val, refcocoplus_shift_val_fog_3]
grids:
  - {methods: [none]}
  - {methods: [rtn], bits: [4, 3]}
  - {methods: [awq], bits: [4, 3], seeds: [2, 0, 1]}
analysis:
  question: Which keeps more?
  clean: refcocoplus_rec_val
  shifted: [refcocoplus_shift_val_fog_3]
  arms: {awq: {method: awq}, rtn: {method: rtn}}
  contrasts: [[awq, rtn]]
"""


def planned(file):
    """The plan of a study on a GPU, without reading code and checkpoints for keys and sizes."""
    study = read(file)
    return as_plan(study, cells(study))


def planned_as(found, made):
    return as_plan(found.study, design.cells_of(found, made))


def as_plan(study, of_study):
    found, shared = [], cost.SharedCosts()
    for cell in of_study:
        size = Size(BILLIONS * 10**9, None, "told")
        seconds = cost.seconds(cell, [], size.parameters, cuda=True, shared=shared)
        found.append(PlannedCell(SimpleNamespace(cell=cell, id=cell.slug), "missing", seconds, size, 1))
    return Plan(study, tuple(found), ())


def seconds_of(of_study):
    """Seconds of some cells, with what they share counted once."""
    shared = cost.SharedCosts()
    return [cost.seconds(cell, [], BILLIONS * 10**9, cuda=True, shared=shared).value for cell in of_study]


@pytest.fixture(scope="module")
def published():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LMMS_PLUGIN_REFCOCOPLUS", raising=False)
        yield


@pytest.fixture
def seeded(tmp_path, published):
    file = tmp_path / "study.yaml"
    file.write_text(SEEDS)
    return planned(file)


def test_all_images_of_refcocoplus_show_what_the_closed_form_says(seeded):
    """1,500 images of 7.2 expressions, variance 0.16 and a design effect of 1.31; 0.05 among two tests, z of 0.8."""
    made = design.as_planned(seeded)
    assert (made.images, made.documents, made.seeds) == (1500, 10758, 3)
    error = math.sqrt(0.16 * (1 + 0.05 * (10758 / 1500 - 1)) / 10758 + 0.002**2 / 3)
    assert made.smallest(INTERACTION) == pytest.approx((2.2414 + 0.8416) * error, rel=0.002)
    assert made.smallest(UNDER_SHIFT) < made.smallest(INTERACTION)
    assert len(made.shown) == 4


def test_the_images_for_a_difference_are_the_fewest(seeded):
    made = design.chosen(seeded, difference=0.03)
    assert max(map(made.smallest, (UNDER_SHIFT, INTERACTION))) <= 0.03
    fewer = made.assumed.shown(made.images - 1, made.seeds)
    assert max(one.smallest for one in fewer) > 0.03
    # More seeds would need fewer images, which is not worth the cells.
    assert made.seeds == 1
    assert made.assumed.needed(0.03, 3) < made.images


def test_a_budget_is_used_up_and_kept(seeded):
    made = design.chosen(seeded, budget=3600.0)
    assert made.seconds <= 3600.0
    assert sum(seconds_of(design.cells_of(seeded, made))) == pytest.approx(made.seconds)
    assert sum(seconds_of(design.cells_of(seeded, replace(made, images=made.images + 1)))) > 3600.0


def test_what_cannot_be_shown_or_paid_is_refused(seeded):
    with pytest.raises(ValueError, match=r"--power: expected a difference that all 1500 images with 3 seeds can show"):
        design.chosen(seeded, difference=0.001)
    with pytest.raises(ValueError, match=r"--budget: expected time for two images of every cell"):
        design.chosen(seeded, budget=60.0)
    with pytest.raises(ValueError, match=r"--budget: expected at least .* which find 3 points, got less"):
        design.chosen(seeded, difference=0.03, budget=600.0)
    unsized = seeded._replace(cells=tuple(one._replace(size=Size(None, None, "served")) for one in seeded.cells))
    with pytest.raises(
        ValueError, match=r"that of Qwen3-VL-8B.*none.* is unknown: .* the size of the model is not known"
    ):
        design.chosen(unsized, budget=3600.0)
    with pytest.raises(ValueError, match="a time such as 90m, 24h or 2d, got '3 weeks'"):
        design.parsed_budget("3 weeks")
    assert design.parsed_budget("1.5h") == 5400.0


def test_a_study_that_is_written_asks_what_was_chosen(seeded, tmp_path):
    made = replace(design.chosen(seeded, difference=0.05), seeds=2)
    file = tmp_path / "written.yaml"
    file.write_text(design.written(seeded.study, made))
    study = read(file)
    assert checked_cells(study) == tuple(design.cells_of(seeded, made))
    assert {cell.axes.seed for cell in cells(study)} == {None, 0, 1}
    assert {cell.images for cell in cells(study)} == {f"0:0:{made.images}"}
    assert study.analysis == seeded.study.analysis


def test_the_screen_of_a_design_answers_first(seeded):
    made = design.chosen(seeded, difference=0.03)
    found = planned_as(seeded, made)
    lines = plan_screen(found, made, chosen=True).splitlines()
    assert len(lines) <= HEIGHT
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].startswith("5 cells: 5 missing; time left")
    answer = " ".join(lines[: lines.index("")])
    assert f"With {made.images} of 1,500 images" in answer
    assert "and 3.0 of the interaction, in points, 80 times in 100 (2 tests by Holm" in answer
    assert f"in the study file: images: {made.images}; seeds: the first 1" in lines
    (row,) = (line.split() for line in lines if line.startswith("awq against rtn"))
    assert row[3:] == [
        "2.6",
        f"{100 * made.shown[0].equivalent:.0f}",
        "%",
        "3.0",
        f"{100 * made.shown[1].equivalent:.0f}",
        "%",
    ]
    few = replace(made, images=2, shown=tuple(made.assumed.shown(2, 1)))
    assert "differences of over 100 under shift and over 100 of" in " ".join(plan_screen(found, few).split())


def test_the_time_left_counts_what_is_known(seeded):
    five = seeded._replace(cells=seeded.cells[:5])

    def left(costs):
        found = [one._replace(seconds=known) for one, known in zip(five.cells, costs, strict=True)]
        return planning.summary(five._replace(cells=tuple(found))).partition("one at a time: ")[2]

    stated, unknown = cost.Seconds(7200.0, f"{cost.STATED}: told"), cost.Seconds(None, "unknown: told")
    measured = cost.Seconds(60.0, "measured")
    assert left([measured] * 5) == "5 min"
    assert left([measured] * 4 + [stated]) == "2 h 4 min (by parameters and documents, not measured)"
    assert left([unknown] * 2 + [stated] * 3) == (
        "6 h 0 min (by parameters and documents, not measured), and unknown for 2 cells"
    )
    assert left([unknown] * 5) == "unknown (no finished cell tells)"
    done = five._replace(cells=tuple(one._replace(state="done") for one in five.cells))
    assert planning.summary(done) == "5 cells: 5 done"
    assert planning.on_one_page(Path("a b")) == "All cells on one page: lmms-plugin report 'a b' -o report.html"


def test_members_of_a_group_of_lmms_eval_are_looked_up():
    assert set(known(["ok_vqa"])["ok_vqa"].tasks) == {"ok_vqa_val2014"}


def test_images_are_of_grounding_tasks(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("models: [demo]\nmethods: [none]\nimages: 5\ntasks: [coco_caption_val2017]")
    with pytest.raises(ValueError, match=r":4:.*expected grounding tasks of this package"):
        checked_cells(read(file))


def test_the_question_of_this_package_takes_a_day(published):
    """At most 8 hours for each of three models, and a margin of two points that is shown four times in five."""
    found = planned(REFERENCE)
    made = design.as_planned(found)
    assert len(found.cells) == 3 * 13
    assert made.seconds / 3 <= 8 * 3600
    assert made.assumed.question.margin == 0.02
    assert {one.comparison.bits for one in made.shown} == {4, 3}
    assert min(one.equivalent for one in made.shown) > 0.8


def test_what_has_no_design_says_why(tmp_path, published):
    file = tmp_path / "study.yaml"
    file.write_text(SEEDS.replace("grids:", "limit: 8\ngrids:"))
    assert "limit: 8, which takes the first documents" in design.told(planned(file))
    file.write_text(SEEDS.partition("analysis:")[0])
    assert design.told(planned(file)) is None


def test_later_stages_decide_smaller_differences(seeded):
    made = design.as_planned(seeded)
    assert made.stages == (375, 750, 1500)
    big, small = (made.stages_until_decided(UNDER_SHIFT, one) for one in (0.2, 0.02))
    assert big[1] < small[1] <= 1500
    assert made.stages_until_decided(INTERACTION, 0.005) is None
    assert made.stages_until_decided(UNDER_SHIFT, None)[1] <= 1500
    # The images of a design are the most that its stages ask about.
    assert replace(made, images=100).stages == (30, 60, 100)
    assert replace(made, images=100).stages_until_decided(UNDER_SHIFT, 0.02) is None


def test_images_of_the_demo_are_counted_and_those_of_the_hub_as_published(published):
    counts = image_counts(("shapes_rec", "shapes_shift_fog_3"))
    assert (counts.documents, sum(counts.sizes), max(counts.sizes)) == (488, 488, counts.largest)
    assert counts.images == len(counts.sizes)
    assert counts.documents_of(counts.images + 5) == 488
    told = image_counts(("refcocoplus_rec_testA",))
    assert (told.images, told.documents, told.sizes) == (750, 5726, ())
    with pytest.raises(ValueError, match="others than shapes_rec"):
        image_counts(("shapes_rec", "refcocoplus_rec_testA"))


ASKED = {
    "question": "Which is right more often?",
    "clean": CLEAN,
    "shifted": list(SHIFTED),
    "arms": {"robust": {"method": ["awq"]}, "plain": {"method": ["rtn"]}},
    "contrasts": [["robust", "plain"]],
}


def axes(method, bits, seed=None):
    return CellAxes("demo", method, bits, None, None, None, seed)


def test_finished_cells_are_a_pilot(tmp_path):
    """Of two planned seeds and of bits 4 and 3, what is finished at 4 bits tells variances; 3 bits stay as stated."""
    random = np.random.default_rng(0)
    right = {}
    for one in (axes("awq", 4, 0), axes("awq", 4, 1), axes("rtn", 4)):
        right[one] = {task: random.random(200) < 0.7 for task in (CLEAN, *SHIFTED)}
        write_cell(tmp_path, f"{one.method}{one.seed}", asdict(one), right[one])
    question = parse(MethodByShift, ASKED)
    every = [axes("none", 16), *(axes(m, b, s) for b in (4, 3) for m, s in (("awq", 0), ("awq", 1), ("rtn", None)))]
    found = pilot.measured(tmp_path, question, comparisons(question, [SimpleNamespace(axes=one) for one in every]))
    assert {one.bits for one in found} == {4}
    assert {one.asked for one in found} == {UNDER_SHIFT, INTERACTION}
    awq = {task: (right[every[1]][task] * 0.5 + right[every[2]][task] * 0.5) for task in (CLEAN, *SHIFTED)}
    each = {task: awq[task] - right[every[3]][task] for task in awq}
    shifted = (each[SHIFTED[0]] + each[SHIFTED[1]]) / 2
    for asked, documents in ((UNDER_SHIFT, shifted), (INTERACTION, shifted - each[CLEAN])):
        (one,) = (variance for key, variance in found.items() if key.asked == asked)
        # Four documents an image, so the error of the mean is that of the means of images.
        assert one.images == pytest.approx(documents.reshape(50, 4).mean(axis=1).var(ddof=1))
        assert one.basis == "measured on 200 documents of 50 images, 2 seeds"
        assert one.seeds < 0.03**2


def test_without_finished_cells_there_is_no_pilot(tmp_path):
    question = parse(MethodByShift, ASKED)
    every = [SimpleNamespace(axes=axes(*one)) for one in (("none", 16), ("awq", 4), ("rtn", 4))]
    planned = comparisons(question, every)
    assert pilot.measured(tmp_path / "none", question, planned) == {}
    write_cell(tmp_path, "awq", asdict(axes("awq", 4)), {task: np.ones(80) for task in (CLEAN, *SHIFTED)})
    assert pilot.measured(tmp_path, question, planned) == {}


def test_smallest_differences_of_a_design_are_those_of_its_variances(seeded):
    assumed = design.Assumptions.of(seeded)
    (one,) = (one for one in assumed.shown(200, 2) if one.comparison.asked == INTERACTION and one.comparison.bits == 3)
    error = math.sqrt(one.variance.images / 200 + one.variance.seeds / 2)
    assert one.smallest == pytest.approx(smallest_difference(error, level=0.975, images=200))
