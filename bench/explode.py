"""From rows to expressions: seconds to make RefCOCO+'s documents, beside lmms-eval's own `refcoco+_bbox_rec` task.

    python -m bench.explode [--rows N] [--repeats N] [--json FILE]

RefCOCO+ val has 3,805 rows with 2.8 expressions each. Rows here have the hub dataset's columns and JPEG photographs of
640×480. The built-in task decodes every photograph and copies it once per expression; it is given few rows (`--theirs`)
and its time is scaled to as many as ours. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import datasets
import lmms_eval
import numpy as np
from PIL import Image

from bench.reporting import Row, interleaved, machine, write
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs

SIZE = (640, 480)


def rows(count: int) -> datasets.Dataset:
    """Rows in the schema of the hub dataset, every photograph another one to the reader."""
    rng = np.random.default_rng(0)
    photograph = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(SIZE)
    buffer = io.BytesIO()
    photograph.save(buffer, "JPEG", quality=92)
    features = datasets.Features(
        {
            "question_id": datasets.Value("string"),
            "image": datasets.Image(),
            "answer": datasets.List(datasets.Value("string")),
            "bbox": datasets.List(datasets.Value("float32")),
            "file_name": datasets.Value("string"),
        }
    )
    made = [
        {
            "question_id": str(number),
            "image": {"bytes": buffer.getvalue() + number.to_bytes(4, "big"), "path": None},
            "answer": [f"the man on the left {word}" for word in ("in red", "with a hat", "near the door")],
            "bbox": [10.0, 10.0, 100.0, 100.0],
            "file_name": f"COCO_train2014_{number:012d}_0.jpg",
        }
        for number in range(count)
    ]
    return datasets.Dataset.from_list(made, features=features)


def builtin() -> Any:
    """lmms-eval's own preprocessing of the same dataset; its folder is no package, so it is loaded by path."""
    path = Path(lmms_eval.__file__).parent / "tasks" / "refcoco+" / "utils_rec.py"
    spec = importlib.util.spec_from_file_location("utils_rec", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.refcoco_bbox_rec_preprocess_dataset


def quietly(call: Any, *arguments: Any) -> None:
    """Call without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        call(*arguments)


def main() -> None:
    """Print the table and optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3805)
    parser.add_argument("--theirs", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    datasets.disable_progress_bars()
    datasets.disable_caching()
    print(machine())
    many = rows(options.rows)
    few = many.select(range(options.theirs))
    explode = builtin()
    seconds = interleaved(
        {"ours": lambda: ExpressionDocs(many), "theirs": lambda: quietly(explode, few)}, options.repeats
    )
    scaled = seconds["theirs"] * options.rows / options.theirs
    row: Row = {
        "case": f"explode@{options.rows}",
        "ratio": scaled / seconds["ours"],
        "seconds": seconds["ours"],
        "baseline": "lmms-eval refcoco+_bbox_rec, scaled",
        "baseline_seconds": scaled,
        "baseline_rows": options.theirs,
    }
    print(f"{row['case']}: {row['seconds']:.3f} s, lmms-eval's {scaled:.1f} s (scaled), ratio {row['ratio']:.0f}")
    write(options.json, [row])


if __name__ == "__main__":
    main()
