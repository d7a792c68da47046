"""Which cell is started next, so that cells find what others have computed."""

from dataclasses import replace

from helpers.small_studies import CELL

from lmms_plugin.study.file.grid import Cell
from lmms_plugin.study.run.local import next_of


def calibrated(bits: int, seed: int = 0) -> Cell:
    axes = replace(CELL.axes, method="awq", bits=bits, calibration="self", seed=seed)
    return replace(
        CELL, axes=axes, backend="awq", arguments={"pretrained": "demo", "bits": bits, "calibration": "self"}
    )


def test_a_cell_waits_for_one_that_computes_what_it_takes() -> None:
    four, three, other = calibrated(4), calibrated(3), calibrated(4, seed=1)
    never, always = (lambda _: False), (lambda _: True)
    assert next_of([four, three], [], never) == four
    assert next_of([three, other, CELL], [four], never) == other
    assert next_of([three, CELL], [four, other], never) == CELL
    # Rather twice than not at all; cells without calibration share none.
    assert next_of([three], [four], never) == three
    assert next_of([CELL], [CELL], never) == CELL
    # A server that runs is given back first.
    assert next_of([three, other], [four], always) == three
