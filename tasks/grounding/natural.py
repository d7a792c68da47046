"""Natural shifts: datasets whose photographs, categories or expressions differ from RefCOCO+.

A task's YAML names a dataset twice, as `!function lmms_plugin.tasks.grounding.natural.ref_l4_test`: `dataset_path` is
the place of its rows, found when the task is loaded, and `process_docs` makes documents of them.

No file of these datasets was available when this was written. The source of the column names and box conventions is
stated with each; a copy that differs is an error that names the column and what was found.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from lmms_plugin.tasks.grounding import strata
from lmms_plugin.tasks.grounding.expressions import REFCOCOPLUS
from lmms_plugin.tasks.grounding.referring import ReferringSet
from lmms_plugin.tasks.sources.conventions import Convention

# Same repository layout as RefCOCO+'s. The split `val` of RefCOCO and of RefCOCOg also holds the Google partition,
# which no column distinguishes (8811 = 3811 + 5000 rows; 7573 = 2573 + 5000): no task reads it.
_REFCOCO = replace(REFCOCOPLUS, name="refcoco", title="RefCOCO", hub_id="lmms-lab-encoder/RefCOCO")
refcocog_test = replace(
    REFCOCOPLUS, name="refcocog", title="RefCOCOg", hub_id="lmms-lab-encoder/RefCOCOg", split="test"
)
refcoco_testA = replace(_REFCOCO, split="testA")
refcoco_testB = replace(_REFCOCO, split="testB")

# The dataset card's features; boxes are COCO's by the card ("structured in COCO format") and by code that reads them.
refcoco_m = ReferringSet(
    name="refcoco_m",
    title="RefCOCO-M",
    hub_id="moondream/refcoco-m",
    split="validation",
    expression="samples.sentences",
    box="samples.bbox",
    convention=Convention("xywh"),
    per="sample",
    identity="image_id",
    photograph="file_name",
    tags=("samples.category", "samples.supercategory"),
)

# The dataset card's table of columns; boxes as the authors' evaluation reads them.
ref_l4_test = ReferringSet(
    name="ref_l4",
    title="Ref-L4",
    hub_id=None,
    split="test",
    expression="caption",
    box="bbox",
    convention=Convention("xywh"),
    identity="id",
    photograph="file_name",
    size=("width", "height"),
    tags=("is_rewrite", "ori_category_id", "bbox_area"),
    published=True,
)
ref_l4_val = replace(ref_l4_test, split="val")

# Columns and boxes as the authors' evaluation reads them, and the number of distractors with its strata, too.
ref_adv = ReferringSet(
    name="ref_adv",
    title="Ref-Adv-s",
    hub_id="dddraxxx/ref-adv-s",
    split="train",
    expression="normal_caption",
    box="solution",
    convention=Convention("xyxy"),
    photograph="file_name",
    size=("width", "height"),
    tags=("image_source", "human_authored", "use_negation", "distractors"),
    strata=strata.REF_ADV,
)

# The repository's table of fields (TG0110/RefBench-PRO, README); boxes as its get_prediction_Acc.py reads them.
refbench_pro = ReferringSet(
    name="refbench_pro",
    title="RefBench-PRO",
    hub_id=None,
    split="test",
    expression="expression",
    box="bbox",
    convention=Convention("xyxy"),
    nothing=("task_type", "reject"),
    photograph="image_path",
    size=("width", "height"),
    tags=("task_type",),
    published=True,
)
refbench_pro_rejection = replace(refbench_pro, rejection=True)

# The published annotations (MDETR's form of COCO's), with the boxes of an expression gathered in one row.
refdrone = ReferringSet(
    name="refdrone",
    title="RefDrone",
    hub_id=None,
    split="test",
    expression="caption",
    box="bboxes",
    convention=Convention("xywh"),
    boxes=True,
    identity="id",
    photograph="file_name",
    size=("width", "height"),
    published=True,
)
refdrone_rejection = replace(refdrone, rejection=True)

# Columns and boxes as the authors' evaluation and lmms-eval's own task read them.
groundingme = ReferringSet(
    name="groundingme",
    title="GroundingME",
    hub_id="lirang04/GroundingME",
    split="test",
    files=None,
    expression="description",
    box="bbox",
    convention=Convention("xyxy"),
    nothing=("subtask_l1", "Rejection"),
    identity="id",
    size=("width", "height"),
    tags=("subtask_l1", "subtask_l2"),
)
groundingme_rejection = replace(groundingme, rejection=True)

# The dataset card's table of columns; boxes as lmms-eval's own task reads them.
screenspot = ReferringSet(
    name="screenspot",
    title="ScreenSpot",
    hub_id="rootsautomation/ScreenSpot",
    split="test",
    expression="instruction",
    box="bbox",
    convention=Convention("xyxy", 1.0),
    photograph="file_name",
    tags=("data_type", "data_source"),
)

# Unverified: columns are those lmms-eval's own task reads, which takes boxes of any order and scale.
screenspot_v2 = replace(
    screenspot, name="screenspot_v2", title="ScreenSpot-v2", hub_id="HongxinLi/ScreenSpot_v2", photograph=None
)
screenspot_pro = ReferringSet(
    name="screenspot_pro",
    title="ScreenSpot-Pro",
    hub_id="TIGER-Lab/ScreenSpot-Pro",
    split="test",
    files=None,
    expression="instruction",
    box="bbox",
    convention=Convention("xyxy"),
    size=("img_size",),
    tags=("ui_type", "platform", "application", "group"),
)

# The dataset card's table of columns; the order of boxes is that of the code its authors built it with.
dior_rsvg = ReferringSet(
    name="dior_rsvg",
    title="DIOR-RSVG",
    hub_id="danielz01/DIOR-RSVG",
    split="test",
    expression="objects.captions",
    box="objects.bbox",
    convention=Convention("xyxy"),
    per="object",
    photograph="path",
    identity="path",
)

# Boxes as documented by the benchmark's code: whole hundredths, so that a small box may have zero width or height.
vrsbench = ReferringSet(
    name="vrsbench",
    title="VRSBench",
    hub_id=None,
    split="test",
    expression="question",
    box="ground_truth",
    convention=Convention("xyxy", 100.0, flat=True),
    identity="question_id",
    photograph="image_id",
    tags=("is_unique", "unique", "obj_cls", "size_group"),
    published=True,
)

SETS: Mapping[str, ReferringSet] = MappingProxyType(
    {
        "refcoco_testA": refcoco_testA,
        "refcoco_testB": refcoco_testB,
        "refcocog_test": refcocog_test,
        "refcoco_m": refcoco_m,
        "ref_l4_val": ref_l4_val,
        "ref_l4_test": ref_l4_test,
        "ref_adv": ref_adv,
        "refbench_pro": refbench_pro,
        "refbench_pro_rejection": refbench_pro_rejection,
        "refdrone": refdrone,
        "refdrone_rejection": refdrone_rejection,
        "groundingme": groundingme,
        "groundingme_rejection": groundingme_rejection,
        "screenspot": screenspot,
        "screenspot_v2": screenspot_v2,
        "screenspot_pro": screenspot_pro,
        "dior_rsvg": dior_rsvg,
        "vrsbench": vrsbench,
    }
)
"""Name → dataset, for tasks."""
