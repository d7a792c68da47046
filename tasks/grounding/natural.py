"""Shifts that nobody made: other photographs, other categories, other ways of asking than RefCOCO+.

A task's YAML refers to an entry of `SETS` three times: `natural.ref_l4_test_PATH` and `natural.ref_l4_test_KWARGS`,
read from the environment when the task is loaded, and `natural.ref_l4_test`, which makes documents of the rows.

No file of these datasets was at hand when this was written. Where columns and boxes are known from is said with each;
whatever a copy holds instead is an error that names the column and what was found.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from lmms_plugin.tasks.grounding.expressions import REFCOCOPLUS
from lmms_plugin.tasks.grounding.referring import ReferringSet
from lmms_plugin.tasks.sources.conventions import Convention
from lmms_plugin.tasks.sources.origins import attributes

# The same repository layout as RefCOCO+'s. Its split `val` of RefCOCO and of RefCOCOg holds the Google partition, too,
# which no column tells apart (8811 = 3811 + 5000 rows; 7573 = 2573 + 5000): no task reads it.
_REFCOCO = replace(REFCOCOPLUS, name="refcoco", title="RefCOCO", hub_id="lmms-lab-encoder/RefCOCO")
_REFCOCOG = replace(REFCOCOPLUS, name="refcocog", title="RefCOCOg", hub_id="lmms-lab-encoder/RefCOCOg", split="test")

# The dataset card's table of columns; boxes as the authors' evaluation reads them.
_REF_L4 = ReferringSet(
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

# Columns and boxes as the authors' evaluation reads them.
_REF_ADV = ReferringSet(
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
)

# The published annotations (MDETR's form of COCO's), with the boxes of an expression gathered in one row.
_REFDRONE = ReferringSet(
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

# Columns and boxes as the authors' evaluation and lmms-eval's own task read them.
_GROUNDINGME = ReferringSet(
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

# The dataset card's table of columns; boxes as lmms-eval's own task reads them.
_SCREENSPOT = ReferringSet(
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
_SCREENSPOT_V2 = replace(
    _SCREENSPOT, name="screenspot_v2", title="ScreenSpot-v2", hub_id="HongxinLi/ScreenSpot_v2", photograph=None
)
_SCREENSPOT_PRO = ReferringSet(
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
_DIOR_RSVG = ReferringSet(
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

# Boxes are documented by the benchmark's code: whole hundredths, so that a small one may have no width or height left.
_VRSBENCH = ReferringSet(
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
        "refcoco_testA": replace(_REFCOCO, split="testA"),
        "refcoco_testB": replace(_REFCOCO, split="testB"),
        "refcocog_test": _REFCOCOG,
        "ref_l4_val": replace(_REF_L4, split="val"),
        "ref_l4_test": _REF_L4,
        "ref_adv": _REF_ADV,
        "refdrone": _REFDRONE,
        "refdrone_rejection": replace(_REFDRONE, rejection=True),
        "groundingme": _GROUNDINGME,
        "groundingme_rejection": replace(_GROUNDINGME, rejection=True),
        "screenspot": _SCREENSPOT,
        "screenspot_v2": _SCREENSPOT_V2,
        "screenspot_pro": _SCREENSPOT_PRO,
        "dior_rsvg": _DIOR_RSVG,
        "vrsbench": _VRSBENCH,
    }
)
"""What tasks are made of, by name."""

__getattr__ = attributes(__name__, SETS)
