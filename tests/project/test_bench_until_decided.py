"""The bench that follows the stages of a study on the answers of a finished run."""

import numpy as np
from helpers.study_folders import CLEAN, SHIFTED, write_cell

from bench.until_decided import followed, on_all_images, rows
from lmms_plugin.analysis.findings import SHOWN
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.asked import parse
from lmms_plugin.study.verdicts.arms import read_cells
from lmms_plugin.study.verdicts.boundaries import PLANNED
from lmms_plugin.study.verdicts.decisions import INTERACTION, UNDER_SHIFT

IMAGES = 200
ASKED = {
    "question": "Which keeps more?",
    "clean": CLEAN,
    "shifted": list(SHIFTED),
    "arms": {"awq": {"method": "awq"}, "rtn": {"method": "rtn"}},
    "contrasts": [["awq", "rtn"]],
    "resamples": 200,
}


def test_a_difference_on_every_image_is_decided_before_the_last_stage(tmp_path):
    """Both are right on clean images; under shift one always is, the other never."""
    every = np.ones(4 * IMAGES)
    for name, shifted in (("none", every), ("awq", every), ("rtn", 0.0 * every)):
        axes = {"method": name, "bits": 16 if name == "none" else 4}
        write_cell(tmp_path, name, axes, {CLEAN: every, **dict.fromkeys(SHIFTED, shifted)})
    question = parse(MethodByShift, ASKED)
    found = followed(read_cells(tmp_path), question, {f"image{k}": 4 for k in range(IMAGES)}, 10, PLANNED)
    assert found.schedule.images[-1] == IMAGES
    assert found.stages < len(found.schedule.images)
    last = found.schedule.images[found.stages - 1]
    # Three cells answered three tasks about all images of these stages.
    assert found.asked == 3 * 3 * 4 * last
    assert {one.asked: state.finding for one, state in found.decisions.found.items()} == {
        UNDER_SHIFT: SHOWN,
        INTERACTION: SHOWN,
    }
    table = list(rows(found, on_all_images(tmp_path, question)))
    assert [row[3:5] for row in table] == [(SHOWN, SHOWN)] * 2
    assert {int(row[6]) for row in table} <= {*found.schedule.images[: found.stages]}
