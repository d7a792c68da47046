"""Analysis of studies: planted effects are found with their size, and nothing is claimed that was not shown."""

import json
from itertools import count

import numpy as np
import pytest
from helpers.study_folders import CLEAN, SHIFTED, outcomes, write_cell

from lmms_plugin.analysis import findings
from lmms_plugin.metrics.bootstrap import draw
from lmms_plugin.study.file import analyses
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.asked import parse
from lmms_plugin.study.verdicts import conclusions, contrasts, judging, published, verdict
from lmms_plugin.study.verdicts.arms import ResampledCells, read_cells

N = 400
ASKED = {
    "question": "Is the first arm more robust?",
    "clean": CLEAN,
    "shifted": list(SHIFTED),
    "margin": 0.05,
    "resamples": 300,
    "arms": {"robust": {"method": "awq", "calibration": ["noise", "self"]}, "plain": {"method": ["rtn"]}},
    "contrasts": [["robust", "plain"]],
}


def study(folder, cells):
    """Write cells given as (method, bits, calibration, seed, right answers of each task, of `N`)."""
    number = count()
    for method, bits, calibration, seed, right in [("none", 16, None, None, (380, 340, 300)), *cells]:
        axes = {"method": method, "bits": bits, "calibration": calibration, "seed": seed}
        write_cell(folder, f"{method}-{next(number)}", axes, outcomes(N, *right))
    return folder


def analysed(folder, **changed):
    (found,) = contrasts.analyse(folder, parse(MethodByShift, ASKED | changed))
    return found


def test_planted_interaction_is_found_with_its_size(tmp_path):
    robust = [("awq", 4, source, seed, (360, 340, 320)) for source in ("noise", "self") for seed in (0, 1, 2)]
    found = analysed(study(tmp_path, [*robust, ("rtn", 4, None, None, (360, 280, 200))]))
    (one,) = found.contrasts
    assert one.clean.value == 0.0
    assert one.under_shift.value == pytest.approx((330 - 240) / N)
    assert one.interaction.value == pytest.approx((330 - 240) / N)
    assert one.interaction.low < one.interaction.value < one.interaction.high
    assert {severity: d.value for severity, d in one.by_severity.items()} == pytest.approx({1: 60 / N, 3: 120 / N})
    assert one.retained.value == pytest.approx(330 / 360 - 240 / 360)
    assert findings.finding(one.interaction, one.p_interaction, 0.95) == findings.SHOWN
    first, scope = verdict.sentences(found)
    (told,) = verdict.findings(found)
    assert first == (
        "demo, robust against plain on shifted images: more often right at 4 bits."
        " From clean to shifted images it loses less at 4 bits."
    )
    assert "400 documents of 100 images" in scope
    assert "robust loses less than plain" in told
    assert not one.broken


def test_the_same_answers_are_equivalent_and_no_difference_is_claimed(tmp_path):
    cells = [("awq", 4, "noise", 0, (360, 300, 260)), ("rtn", 4, None, None, (360, 300, 260))]
    (one,) = analysed(study(tmp_path, cells)).contrasts
    assert (one.interaction.value, one.interaction.low, one.interaction.high) == (0.0, 0.0, 0.0)
    assert one.p_interaction == 1.0
    assert findings.finding(one.interaction, one.p_interaction, 0.95) == findings.EQUIVALENT


def test_a_small_sample_shows_neither_difference_nor_equivalence(tmp_path):
    rng = np.random.default_rng(2)
    for name, method in (("a", "none"), ("b", "awq"), ("c", "rtn")):
        axes = {"method": method, "bits": 4, "calibration": "noise" if method == "awq" else None}
        tasks = {task: rng.random(120) < 0.6 for task in (CLEAN, *SHIFTED)}
        write_cell(tmp_path, name, axes, tasks)
    found = analysed(tmp_path, margin=0.01)
    (one,) = found.contrasts
    assert findings.finding(one.interaction, one.p_interaction, 0.95) == findings.OPEN
    assert "was not shown" in verdict.findings(found)[0]


def test_a_broken_arm_is_never_more_robust(tmp_path):
    # It has little left to lose: the interaction is for it, and it is right less often on clean and shifted images.
    ruined = [("awq", 2, source, seed, (60, 55, 50)) for source in ("noise", "self") for seed in (0, 1, 2)]
    found = analysed(study(tmp_path, [*ruined, ("rtn", 2, None, None, (330, 200, 120))]))
    (one,) = found.contrasts
    assert findings.finding(one.interaction, one.p_interaction, 0.95) == findings.SHOWN
    first, _ = verdict.sentences(found)
    assert first == (
        "demo, robust against plain on shifted images: less often right at 2 bits. At 2 bits robust keeps less than"
        " half of the unquantized model's clean accuracy: robustness is not judged there."
    )
    (told,) = verdict.findings(found)
    assert "loses less" not in told
    assert "robustness is not judged (interaction +" in told
    assert verdict.tables(found)[0]["rows"][0][8] == "not judged (broken)"


def test_broken_arms_are_named(tmp_path):
    cells = [("awq", 2, "self", 0, (360, 300, 260)), ("rtn", 2, None, None, (100, 90, 80))]
    found = analysed(study(tmp_path, cells))
    assert found.contrasts[0].broken == ("plain",)
    assert "plain keeps less than half" in verdict.findings(found)[0]


def test_p_values_are_adjusted_for_all_contrasts_and_bits(tmp_path):
    rng = np.random.default_rng(1)
    write_cell(tmp_path, "none", {"method": "none", "bits": 16}, outcomes(N, 380, 340, 300))
    for bits in (8, 4, 3):
        for method in ("awq", "rtn"):
            axes = {"method": method, "bits": bits, "calibration": "self" if method == "awq" else None}
            tasks = {task: rng.random(N) < 0.6 for task in (CLEAN, *SHIFTED)}
            write_cell(tmp_path, f"{method}-{bits}", axes, tasks)
    found = analysed(tmp_path).contrasts
    assert [one.bits for one in found] == [8, 4, 3]
    raw = sorted(one.interaction.p for one in found)
    adjusted = sorted(one.p_interaction for one in found)
    assert adjusted[0] == pytest.approx(min(1.0, 3 * raw[0]))
    assert all(a >= p for a, p in zip(adjusted, raw, strict=True))


def test_rows_tell_flips_seeds_and_what_shift_costs_beyond_the_16_bit_model(tmp_path):
    cells = [("awq", 3, "noise", seed, (370 - 10 * seed, 320, 280 - 20 * seed)) for seed in range(3)]
    found = analysed(study(tmp_path, [*cells, ("rtn", 3, None, None, (390, 320, 280))]))
    rows = {row.method: row for row in found.rows}
    awq, rtn = rows["awq"], rows["rtn"]
    assert (awq.seeds, awq.bits, rtn.seeds, rows["none"].bits) == (3, 3, 1, 16)
    assert awq.clean == pytest.approx(360 / N)
    assert awq.spread == pytest.approx(np.std([300, 290, 280], ddof=1) / N)
    # (shifted − clean) of 290 − 360 against 320 − 380 of the unquantized model.
    assert awq.lost_more.value == pytest.approx((-70 + 60) / N)
    assert awq.flips_clean == pytest.approx((20 / N, 0.0))
    assert rtn.flips_clean == pytest.approx((0.0, 10 / N))
    assert rtn.parsed == 1.0


def test_differences_are_paired_and_a_single_seed_draws_images_alone(tmp_path):
    folder = study(tmp_path, [("rtn", 4, None, None, (300, 200, 100)), ("awq", 4, "self", 0, (320, 240, 160))])
    cells = read_cells(folder)
    drawn = ResampledCells(cells, (CLEAN,), resamples=50, seed=3)
    for cell in cells:
        right = np.arange(N) < {"none": 380, "rtn": 300, "awq": 320}[cell.axes.method]
        order = np.argsort([f"image{k}" for k in range(N // 4)])
        per_image = right.reshape(-1, 4).sum(axis=1)[order]
        expected = [draw(N // 4, 3, k) @ per_image / N for k in range(50)]
        assert np.allclose(drawn.over([cell], [CLEAN]).resampled, expected)


def test_seeds_widen_intervals_by_their_variance(tmp_path):
    """All images alike: every bit of spread comes from the seeds, with the variance of a mean of three."""
    right = {0: 0.6, 1: 0.7, 2: 0.8}
    for seed, share in right.items():
        # The same share of every image's four documents would need fractions: twenty images of one kind each instead.
        pattern = np.tile(np.arange(10) < 10 * share, N // 10)
        tasks = dict.fromkeys((CLEAN, *SHIFTED), pattern)
        axes = {"method": "awq", "bits": 4, "calibration": "self", "seed": seed}
        write_cell(tmp_path, f"awq-{seed}", axes, tasks)
    cells = read_cells(tmp_path)
    drawn = ResampledCells(cells, (CLEAN,), resamples=4000)
    both = drawn.over(cells, [CLEAN])
    each = [drawn.over([cell], [CLEAN]).resampled for cell in cells]
    images = np.mean(each, axis=0).var()
    seeds = np.var(list(right.values()), ddof=1) / 3
    assert both.value == pytest.approx(0.7)
    assert both.resampled.var() == pytest.approx(images + seeds, rel=0.1)
    assert seeds > images


def test_the_verdict_is_written_for_people_and_programs(tmp_path):
    folder = study(tmp_path, [("rtn", 4, None, None, (360, 300, 260)), ("awq", 4, "self", 0, (360, 300, 260))])
    (found,) = judging.conclude(folder, ASKED)
    words = (folder / "verdict.md").read_text()
    assert words == conclusions.markdown(found)
    assert found.sentences[0] in words
    said = json.loads((folder / "verdict.json").read_text())
    assert said["sentences"] == found.sentences
    assert said["findings"] == found.findings
    for table in said["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        assert all(isinstance(cell, str) for row in table["rows"] for cell in row)
    assert said["details"][0]["contrasts"][0]["interaction"]["value"] == 0.0


def test_every_cell_against_the_unquantized_model(tmp_path):
    folder = study(tmp_path, [("hqq", 4, None, None, (300, 240, 200)), ("awq", 4, "self", 0, (380, 340, 300))])
    asked = {"kind": "against_reference", "question": "What does it cost?", "metrics": ["acc@0.5", "ece"]}
    (found,) = judging.conclude(folder, asked | {"resamples": 200, "tasks": [CLEAN]})
    assert len(found.tables) == 1
    same, _, hurt, _ = found.tables[0]["rows"]
    assert hurt[:4] == ["hqq 4 bits", "acc@0.5", "0.9500", "0.7500"]
    assert hurt[4].startswith("-0.2000 [-")
    assert same[:5] == ["awq 4 bits self", "acc@0.5", "0.9500", "0.9500", "+0.0000 [+0.0000, +0.0000]"]
    assert found.sentences[0] == (
        "rec, acc@0.5: changed by hqq 4 bits -0.2000; no change was shown for awq 4 bits self."
    )


def test_published_numbers_stand_beside_ours_where_the_model_is_the_same():
    found = published.score("Qwen/Qwen2-VL-7B-Instruct", "reliable_vqav2", "mbq", 3, "coverage@0.01")
    assert found.value == pytest.approx(0.377)
    assert "2602.13289" in found.source
    assert published.score("Qwen/Qwen2-VL-7B-Instruct", "reliable_vqav2", "none", None, "accuracy").value == 0.83
    for other in (("demo", "reliable_vqav2"), ("Qwen/Qwen2-VL-7B-Instruct", "reliable_advqa")):
        assert published.score(*other, "mbq", 3, "accuracy") is None
    asked = "Salesforce/blip2-opt-2.7b", "coco_caption_val2017", "awq", 4, "CIDEr"
    assert published.score(*asked, "all").value == 1.1819
    assert published.score(*asked, "language") is None
    shares = published.importances("llava-hf/llava-1.5-7b-hf", "gqa", "awq").shares
    assert shares == {"vision": 5.38, "language": 94.62}


def test_cells_that_are_missing_are_told(tmp_path):
    folder = study(tmp_path, [("rtn", 4, None, None, (360, 300, 260)), ("awq", 3, "self", 0, (360, 300, 260))])
    with pytest.raises(ValueError, match="same bits in 'robust' and 'plain', got 3 and 4: are cells missing"):
        analysed(folder)


def test_arms_without_a_number_of_bits_are_refused(tmp_path):
    folder = study(tmp_path, [("rtn", None, None, None, (360, 300, 260)), ("awq", None, "self", 0, (360, 300, 260))])
    with pytest.raises(ValueError, match="one number of bits in arm 'robust', got awq: checkpoints that"):
        analysed(folder)


def test_what_is_quantized_without_a_number_of_bits_is_not_called_16_bit(tmp_path):
    cells = [("rtn", 4, None, None, (360, 300, 260)), ("awq", 4, "self", 0, (360, 300, 260))]
    folder = study(tmp_path, [*cells, ("prequantized", None, None, None, (350, 290, 250))])
    found = analysed(folder, arms=ASKED["arms"] | {"shipped": {"method": "prequantized"}})
    table = verdict.tables(found)[1]
    assert {row[1]: row[0] for row in table["rows"]} == {"none": "", "rtn": "4", "awq": "4", "prequantized": ""}


def test_without_the_unquantized_model_there_is_no_verdict(tmp_path):
    write_cell(tmp_path, "rtn", {"method": "rtn", "bits": 4}, outcomes(N, 3, 2, 1))
    with pytest.raises(ValueError, match=r"one cell with the unquantized model \(method none\) for demo, got 0"):
        analysed(tmp_path)


def test_cells_with_other_documents_are_refused(tmp_path):
    write_cell(tmp_path, "none", {"method": "none"}, outcomes(N, 3, 2, 1))
    write_cell(tmp_path, "awq", {"method": "awq", "bits": 4, "calibration": "self"}, outcomes(N, 3, 2, 1))
    write_cell(tmp_path, "rtn", {"method": "rtn", "bits": 4}, outcomes(N - 8, 3, 2, 1))
    with pytest.raises(ValueError, match="the same documents in both runs, but the second lacks 8 of 400"):
        analysed(tmp_path)


def test_cells_of_an_earlier_version_do_not_count(tmp_path):
    folder = study(tmp_path, [("rtn", 4, None, None, (360, 300, 260)), ("awq", 4, "self", 0, (360, 300, 260))])
    write_cell(folder, "rtn-old", {"method": "rtn", "bits": 4}, outcomes(N, 1, 1, 1))
    with pytest.raises(ValueError, match="one cell for each place of the study, got rtn-1 and rtn-old"):
        analysed(folder)
    question = parse(MethodByShift, ASKED)
    (found,) = contrasts.analyse(folder, question, only=("none-0", "rtn-1", "awq-2"))
    assert found.contrasts[0].interaction.value == 0.0


def test_half_a_cell_does_not_count(tmp_path):
    for name, method in (("a", "none"), ("b", "rtn")):
        write_cell(tmp_path, name, {"method": method}, outcomes(N, 3, 2, 1))
    (tmp_path / "cells" / "b" / "done.json").unlink()
    assert [cell.name for cell in read_cells(tmp_path)] == ["a"]


def test_a_folder_without_cells_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"finished cells below .*, got none"):
        read_cells(tmp_path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kind": "methods_by_shift"}, "kind: expected one of method_by_shift, against_reference, components, got"),
        ({"kind": ["a"]}, r"kind: expected one of .*, got \['a'\]"),
        ({"kind": "components", "question": "?"}, "metrics is missing"),
        ({"kind": "components", "question": "?", "metrics": ["ece"], "metric": 1}, "did you mean 'metrics'"),
        (
            {"kind": "components", "question": "?", "metrics": ["ece"], "resamples": 0},
            "a whole number from 1 to 1000000, got 0",
        ),
        ({"kind": "against_reference", "question": "?", "metrics": "ece"}, "a list of names, got 'ece'"),
        ({"kind": "against_reference", "question": "?", "metrics": ["cider"]}, "metrics that are compared .*'cider'"),
        ({"kind": "against_reference", "question": "?", "metrics": ["ece"], "level": 2}, "level must be a number in"),
    ],
)
def test_bad_analyses_are_refused_before_anything_runs(asked, message):
    with pytest.raises(ValueError, match=message):
        analyses.question(asked)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"margins": 1}, "unknown setting 'margins', did you mean 'margin'.*known: question, clean"),
        ({"question": 7}, "question must be a text, got 7"),
        ({"clean": ["rec"]}, r"clean must be the name of a task, got \['rec'\]"),
        ({"shifted": []}, "a list of at least one task"),
        ({"shifted": "rec_fog_1"}, "a list of at least one task, got 'rec_fog_1'"),
        ({"arms": {"a": ["awq"]}}, r"arms: a: expected a mapping, got \['awq'\]"),
        ({"arms": {"a": {"methd": "awq"}}}, r"unknown axis 'methd', did you mean 'method'\? \(known: model, method"),
        ({"contrasts": [["robust", "simple"]]}, "contrasts: expected two of robust, plain, got"),
        ({"contrasts": ["robust"]}, "contrasts must be a list of pairs of arms"),
        ({"contrasts": [["robust", ["plain"]]]}, "contrasts must be a list of pairs of arms"),
        ({"margin": 0}, "margin must be a number above 0, got 0"),
        ({"margin": "a lot"}, "margin must be a number above 0, got 'a lot'"),
        ({"margin": None}, "margin must be a number above 0, got None"),
        ({"level": 95}, r"level must be a number in \(0.5, 1\), got 95"),
        ({"level": 0}, r"level must be a number in \(0.5, 1\), got 0"),
        ({"resamples": 0}, "resamples must be a whole number from 1 to 1000000, got 0"),
        ({"resamples": 2.5}, "resamples must be a whole number from 1 to 1000000, got 2.5"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"estimator": "join"}, "estimator must be .* got 'join', did you mean 'joint'"),
        ({"estimator": ["joint"]}, r"estimator must be an estimator of .*, got \['joint'\]"),
    ],
)
def test_bad_questions_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        parse(MethodByShift, ASKED | changed)


def test_a_question_needs_its_parts():
    with pytest.raises(ValueError, match="clean is missing"):
        parse(MethodByShift, {key: value for key, value in ASKED.items() if key != "clean"})
