"""The embedded demo: coloured shapes, expressions about them, and a tiny checkpoint trained on them.

It runs the whole pipeline with real numbers offline, on a CPU, in minutes. Its results say nothing about other models.

Attributes:
    CHECKPOINT: Folder of the trained checkpoint, for `AutoModelForImageTextToText.from_pretrained`.
    DATA: Folder of the parquet files in RefCOCO+'s schema, for `datasets.load_dataset`.
"""

from pathlib import Path

CHECKPOINT: str = str(Path(__file__).with_name("checkpoint"))
DATA: str = str(Path(__file__).with_name("data"))
