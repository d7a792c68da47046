"""Every model family through lmms-eval's evaluator, in this process, on real photographs in RefCOCO+'s schema."""

import pytest
from helpers.families import FAMILIES
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.shifts.image.corruptions import SHIFTS
from lmms_plugin.tasks.grounding.comprehension import CALIBRATION

TASKS = ["refcocoplus_rec_testA", "refcocoplus_shift_testB"]
LIMIT = 2
TOKENS = 24
SCORES = ("acc@0.5", "acc@0.75", "acc@0.9", "mean_iou", "parse_rate", "boxes_per_answer")


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_defaults=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_answers_clean_and_under_every_corruption(family, checkpoint, local_copy, manager, monkeypatch):
    monkeypatch.setenv("LMMS_PLUGIN_REFCOCOPLUS", str(local_copy))
    # Gemma 3's connector is a bare parameter, which no quantizer of linear layers can reach: asking for it is refused.
    connector_bits = 16 if family == "gemma3" else 8
    arguments = f"pretrained={checkpoint(family)},bits=4,group_size=32,vision_bits=8,connector_bits={connector_bits}"
    outcome = simple_evaluate(
        model="quant_rtn",
        model_args=arguments,
        tasks=TASKS,
        batch_size=4,
        limit=LIMIT,
        # Random weights never end an answer.
        gen_kwargs=f"max_new_tokens={TOKENS}",
        bootstrap_iters=0,
        task_manager=manager,
    )
    assert len(outcome["samples"]) == 1 + len(SHIFTS)
    for task, samples in outcome["samples"].items():
        assert {f"{name},none" for name in SCORES} <= set(outcome["results"][task])
        assert len(samples) == LIMIT
        for sample in samples:
            record = sample["mean_iou"]
            assert 0 < record["confidence"]["joint"] < 1
            assert (record["confidence"]["coordinate_mean"] is None) == (record["boxes"] == 0)
            assert set(CALIBRATION) <= set(sample)
            trailer = sample["filtered_resps"][0]
            assert f'"dialect":"{dialect_for(family).name}"' in trailer
