"""Write demo scenes as parquet in RefCOCO+'s own schema.

python -m demo_training.dataset --out data
"""

import argparse
import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lmms_plugin.demo.dataset import FEATURES, rows

SCENES = {"test": 130, "val": 100}
# Without the split names spelled out, `datasets` would call "val" "validation". FILES are listed by `write`.
CARD = """---
configs:
- config_name: default
  data_files:
FILES---

# Coloured shapes with referring expressions

Synthetic scenes of one to three shapes in the schema of lmms-lab/RefCOCOplus: circles, squares, triangles and crosses
in six colours, small or large, plain or hollow. One row is one object; `answer` lists the expressions that mean it
and nothing else in its scene, `bbox` is x, y, width, height in pixels. Drawn by `lmms_plugin.demo.scenes`, written by
`python -m demo_training.dataset`. It is a demonstration: numbers measured on it say nothing about photographs.
"""


def write(folder: Path) -> None:
    """Write every split below `folder` as `<split>-<digest>.parquet`, and the card that lists these files.

    The digest is of the content: `datasets` knows a folder with a card by the folder's name and the file names in the
    card alone, and would go on serving its cached copy of other scenes under the same names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = ""
    for split, count in SCENES.items():
        for former in folder.glob(f"{split}-*.parquet"):
            former.unlink()
        buffer = io.BytesIO()
        table = pa.Table.from_pylist(list(rows(split, count)), schema=FEATURES.arrow_schema)
        # All rows of a scene hold its picture; a dictionary page large enough for every picture keeps one copy of each.
        pq.write_table(table, buffer, compression="zstd", dictionary_pagesize_limit=1 << 25)
        name = f"{split}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:12]}.parquet"
        (folder / name).write_bytes(buffer.getvalue())
        listed += f"  - split: {split}\n    path: {name}\n"
    (folder / "README.md").write_text(CARD.replace("FILES", listed))


def main(argv: list[str] | None = None) -> None:
    """Write the demo data where `--out` says."""
    parser = argparse.ArgumentParser(prog="python -m demo_training.dataset", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for the parquet files")
    write(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
