"""Small copies of the natural datasets in their documented schemas, of photographs with boxes drawn by hand."""

import io
import json
from pathlib import Path

import datasets
from helpers import photographs
from helpers.photographs import REFERENTS, photograph

TEXT, INTEGER, NUMBER = datasets.Value("string"), datasets.Value("int64"), datasets.Value("float64")
BOX = datasets.List(NUMBER)
THINGS = [*REFERENTS["testA"], *REFERENTS["testB"]]


def image(thing):
    buffer = io.BytesIO()
    photograph(thing.photograph).save(buffer, "JPEG", quality=90)
    return {"bytes": buffer.getvalue(), "path": None}


def size(thing):
    return photograph(thing.photograph).size


def xyxy(thing, scale=None):
    x, y, w, h = thing.bbox
    if scale is None:
        return [float(x), float(y), float(x + w), float(y + h)]
    width, height = size(thing)
    return [scale * x / width, scale * y / height, scale * (x + w) / width, scale * (y + h) / height]


def file_name(thing):
    return f"{Path(thing.photograph).stem}.jpg"


def sized(thing):
    return dict(zip(("width", "height"), size(thing), strict=True))


def ref_l4():
    return [
        {
            "id": k,
            "caption": f"In the picture, {thing.expressions[0]} can be seen.",
            "bbox": [float(v) for v in thing.bbox],
            "bbox_area": float(thing.bbox[2] * thing.bbox[3]),
            "bbox_id": f"o365_{k}",
            "ori_category_id": "o365_1",
            "image_id": f"o365_{k}",
            "file_name": file_name(thing),
            "is_rewrite": bool(k % 2),
            "split": "test",
            **sized(thing),
        }
        for k, thing in enumerate(THINGS)
    ]


def ref_adv():
    return [
        {
            "image": image(thing),
            "file_name": file_name(thing),
            "normal_caption": f"{thing.expressions[0]}, not the other one",
            "solution": xyxy(thing),
            **sized(thing),
            "image_source": "COCO",
            "human_authored": True,
            "use_negation": True,
            "distractors": 2 + 3 * (k % 3),
        }
        for k, thing in enumerate(THINGS)
    ]


def refcoco_m():
    """One row per photograph, with the objects on it in structs of their own."""
    photographs_of = dict.fromkeys(thing.photograph for thing in THINGS)
    rows = []
    for number, name in enumerate(photographs_of):
        samples = [
            {
                "id": k,
                "image_id": number,
                "category": "person" if k % 2 else "thing",
                "supercategory": "all",
                "label": thing.expressions[0],
                "sentences": list(thing.expressions),
                "bbox": [float(v) for v in thing.bbox],
                "mask": {"counts": "0", "size": list(size(thing)[::-1])},
            }
            for k, thing in enumerate(THINGS)
            if thing.photograph == name
        ]
        picture = image(next(thing for thing in THINGS if thing.photograph == name))
        file = f"COCO_train2014_{number:012d}.jpg"
        rows.append({"image": picture, "image_id": number, "file_name": file, "samples": samples})
    return rows


KINDS = ("attribute", "position", "interaction", "relation", "commonsense", "reject")


def refbench_pro():
    """As published: boxes of some are kept back, and expressions to reject have none."""
    return [
        {
            "image_path": file_name(thing),
            "task_type": KINDS[k % 6],
            "expression": thing.expressions[0],
            "bbox": [] if KINDS[k % 6] == "reject" else xyxy(thing),
            **sized(thing),
        }
        for k, thing in enumerate(THINGS)
    ]


def refdrone():
    """Of every three expressions one has one target, one has two and one has none."""
    images, annotations = [], []
    for k, thing in enumerate(THINGS):
        entry = {"file_name": file_name(thing), "id": k, "original_id": -1, "tokens_negative": [], **sized(thing)}
        images.append({**entry, "caption": thing.expressions[0], "dataset_name": "RefDrone"})
        found = [thing.bbox] * (1, 2, 0)[k % 3]
        annotations += [
            {"image_id": k, "bbox": [float(v) for v in box], "empty": False, "category_id": "4", "id": len(annotations)}
            for box in found
        ]
        if not found:
            nothing = {"bbox": [0.0, 0.0, 0.0, 0.0], "empty": True, "category_id": -1, "id": len(annotations)}
            annotations.append({"image_id": k, **nothing})
    return {"images": images, "annotations": annotations, "categories": [{"id": 4, "name": "van"}]}


def groundingme():
    kinds = ("Discriminative", "Spatial", "Limited", "Rejection")
    return [
        {
            "id": f"g{k}",
            "image": image(thing),
            "description": thing.expressions[0],
            "bbox": [0.0, 0.0, 0.0, 0.0] if kinds[k % 4] == "Rejection" else xyxy(thing),
            **sized(thing),
            "subtask_l1": kinds[k % 4],
            "subtask_l2": "Appearance",
        }
        for k, thing in enumerate(THINGS)
    ]


def screenspot():
    return [
        {
            "file_name": file_name(thing),
            "bbox": xyxy(thing, 1.0),
            "instruction": f"open {thing.expressions[0]}",
            "data_type": "icon",
            "data_source": "macos",
            "image": image(thing),
        }
        for thing in THINGS
    ]


def screenspot_v2():
    return [{name: value for name, value in row.items() if name != "file_name"} for row in screenspot()]


def screenspot_pro():
    return [
        {
            "image": image(thing),
            "instruction": f"open {thing.expressions[0]}",
            "bbox": json.dumps([int(v) for v in xyxy(thing)]),
            "img_size": json.dumps(list(size(thing))),
            "ui_type": "icon",
        }
        for thing in THINGS
    ]


def dior_rsvg():
    return [
        {
            "image": image(things[0]),
            "path": file_name(things[0]),
            "objects": {
                "bbox": [[int(v) for v in xyxy(thing)] for thing in things],
                "captions": [thing.expressions[0] for thing in things],
                "categories": ["ship"] * len(things),
                "categories_normalized": ["Ship"] * len(things),
            },
        }
        for things in (THINGS[:2], THINGS[3:5], THINGS[7:8])
    ]


def vrsbench():
    return [
        {
            "question_id": k,
            "image_id": file_name(thing),
            "question": f"The {thing.expressions[0]}.",
            "ground_truth": "{" + "".join(f"<{int(v)}>" for v in xyxy(thing, 100)) + "}",
            "is_unique": bool(k % 2),
            "obj_cls": "ship",
            "size_group": "small",
        }
        for k, thing in enumerate(THINGS)
    ]


SAMPLES = {
    "ref_adv": datasets.Features(
        {
            "image": datasets.Image(),
            "file_name": TEXT,
            "normal_caption": TEXT,
            "solution": BOX,
            "width": INTEGER,
            "height": INTEGER,
            "image_source": TEXT,
            "human_authored": datasets.Value("bool"),
            "use_negation": datasets.Value("bool"),
            "distractors": INTEGER,
        }
    ),
    "refcoco_m": datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": INTEGER,
            "file_name": TEXT,
            "samples": datasets.List(
                {
                    "id": INTEGER,
                    "image_id": INTEGER,
                    "category": TEXT,
                    "supercategory": TEXT,
                    "label": TEXT,
                    "sentences": datasets.List(TEXT),
                    "bbox": datasets.List(datasets.Value("float32")),
                    "mask": {"counts": TEXT, "size": datasets.List(datasets.Value("int32"))},
                }
            ),
        }
    ),
    "groundingme": datasets.Features(
        {
            "id": TEXT,
            "image": datasets.Image(),
            "description": TEXT,
            "bbox": BOX,
            "width": INTEGER,
            "height": INTEGER,
            "subtask_l1": TEXT,
            "subtask_l2": TEXT,
        }
    ),
    "screenspot": datasets.Features(
        {
            "file_name": TEXT,
            "bbox": BOX,
            "instruction": TEXT,
            "data_type": TEXT,
            "data_source": TEXT,
            "image": datasets.Image(),
        }
    ),
    "screenspot_v2": datasets.Features(
        {"bbox": BOX, "instruction": TEXT, "data_type": TEXT, "data_source": TEXT, "image": datasets.Image()}
    ),
    "screenspot_pro": datasets.Features(
        {"image": datasets.Image(), "instruction": TEXT, "bbox": TEXT, "img_size": TEXT, "ui_type": TEXT}
    ),
    "dior_rsvg": datasets.Features(
        {
            "image": datasets.Image(),
            "path": TEXT,
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("int32"))),
                "captions": datasets.List(TEXT),
                "categories": datasets.List(TEXT),
                "categories_normalized": datasets.List(TEXT),
            },
        }
    ),
}
"""Datasets that the hub holds as tables with images."""


def rows(name):
    return datasets.Dataset.from_list(globals()[name](), features=SAMPLES[name])


def published(folder):
    """Write the files of benchmarks that publish images apart; annotations by name, images under `images`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for thing in THINGS:
        (folder / "images" / file_name(thing)).write_bytes(image(thing)["bytes"])
    datasets.Dataset.from_list(ref_l4()).to_parquet(folder / "ref_l4")
    (folder / "refdrone").write_text(json.dumps(refdrone()))
    (folder / "vrsbench").write_text(json.dumps(vrsbench()))
    (folder / "refbench_pro").write_text("".join(f"{json.dumps(row)}\n" for row in refbench_pro()))
    return folder


def write(folder):
    """Write all local copies and return the environment that names them."""
    from lmms_plugin.tasks.grounding.natural import SETS
    from lmms_plugin.tasks.sources import published_files as making

    files = published(folder / "published")
    for name in making.FORMS:
        making.write(name, files / name, files / "images", folder / name / "test.parquet")
    making.write("ref_l4", files / "ref_l4", files / "images", folder / "ref_l4" / "val.parquet")
    for name in SAMPLES:
        (folder / name).mkdir()
        split = next(source.split for source in SETS.values() if source.name == name)
        rows(name).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    for name in ("refcocoplus", "refcoco"):
        photographs.write(folder / name)
    (folder / "refcocog").mkdir()
    photographs.rows("testA").to_parquet(folder / "refcocog" / "test-00000-of-00001.parquet")
    names = {source.name for source in SETS.values()} | {"refcocoplus"}
    return {f"LMMS_PLUGIN_{name.upper()}": str(folder / name) for name in names}


def reviewed(split):
    """Reviewers' entries of RefCOCO+'s expressions, of which every third is wrong."""
    images, annotations = [], []
    for row in photographs.rows(split).remove_columns("image"):
        for text in row["answer"]:
            number = len(images)
            photograph = int(row["file_name"].split("_")[2])
            images.append({"id": number, "original_id": photograph, "caption": f"{text.capitalize()}."})
            box = [float(v) for v in row["bbox"]]
            annotations.append({"image_id": number, "bbox": box, "caption_quality": int(number % 3 != 1)})
    return {"images": images, "annotations": annotations}


def write_reviewed(folder):
    """Write the reviewers' files of all splits, and return their folder."""
    folder.mkdir(parents=True)
    for split in REFERENTS:
        (folder / f"refcoco+_{split}_reviewed.json").write_text(json.dumps(reviewed(split)))
    return folder


CATEGORIES = {"camera": (1, 2), "coffee": (47, 47), "astronaut": (1, 1, 1)}
"""Category of each object that RefCOCO+ refers to, by photograph and in the order of `REFERENTS`; 9 elsewhere."""

OTHERS = {"coins": (9, 5), "flower.jpg": (9, 2), "camera": (1, 3), "chelsea": (4, 7)}
"""Category and number of the objects that nothing refers to, by photograph."""

DISTRACTORS = {"astronaut": 2, "coffee": 1, "flower.jpg": 2, "chelsea": 0, "rocket": 0, "coins": 5, "china.jpg": 0}
"""Number of distractors of each photograph's objects; on `camera` 3 of the man and none of the camera."""


def instances():
    """Objects of the photographs of RefCOCO+ in the form of COCO's annotations."""
    names = sorted({thing.photograph for things in REFERENTS.values() for thing in things})
    annotations = []
    for number, name in enumerate(names):
        boxes = [thing.bbox for thing in THINGS if thing.photograph == name]
        of = list(zip(CATEGORIES.get(name, (9,) * len(boxes)), boxes, strict=True))
        category, count = OTHERS.get(name, (0, 0))
        of += [(category, (5.0 * k, 5.0 * k, 30.0, 30.0)) for k in range(count)]
        annotations += [
            {"id": len(annotations) + k, "image_id": number, "category_id": kind, "bbox": [float(v) for v in box]}
            for k, (kind, box) in enumerate(of)
        ]
    return {"annotations": annotations, "categories": [], "images": []}


def write_instances(folder):
    """Write the annotations of the photographs of RefCOCO+, and return their folder."""
    folder.mkdir(parents=True)
    (folder / "instances.json").write_text(json.dumps(instances()))
    return folder


def write_warehouse(folder):
    """Write the dataset that the documentation adds."""
    folder.mkdir()
    rows = [
        {
            "image": image(thing),
            "frame": file_name(thing),
            "query": thing.expressions[0],
            "target": [round(v) for v in xyxy(thing, 1000)],
            "camera": "north",
        }
        for thing in THINGS
    ]
    kinds = {"image": datasets.Image(), "frame": TEXT, "query": TEXT, "camera": TEXT}
    features = datasets.Features({**kinds, "target": datasets.List(INTEGER)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "test.parquet")
    return folder
