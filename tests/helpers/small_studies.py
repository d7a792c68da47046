"""A study small enough to be run by a test, and a cell of it."""

from lmms_plugin.study.file.grid import Cell, CellAxes, Resources

STUDY = """
models: [demo]
tasks: [shapes_rec]
limit: 2
batch_size: 2
resources: {gpus: 0}
grids:
  - {methods: [none, rtn], bits: [3]}
"""
CELL = Cell(
    CellAxes("demo", "rtn", 4, 128, "language", None, None),
    "rtn",
    {"pretrained": "demo", "bits": 4, "group_size": 128},
    ("shapes_rec",),
    None,
    1,
    Resources(gpus=0),
)
