"""How far a study is, and how long it still takes."""

import io

import pytest
from rich.console import Console

from lmms_plugin.cli.study_display import Display
from lmms_plugin.study.run.progress import StudyProgress, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_is_what_is_expected_at_the_pace_so_far_less_what_is_spent() -> None:
    clock = Clock()
    progress = StudyProgress({"a": 10.0, "b": 20.0, "c": None}, before=2, jobs=2, clock=clock)
    assert progress.left is None, "nothing tells how long c takes"
    progress.started("a")
    clock.now = 12.0
    progress.ended("a", 12.0)
    # a took 1.2 times what was expected.
    assert progress.left == pytest.approx((24.0 + 12.0) / 2)
    progress.started("b")
    clock.now = 17.0
    assert progress.left == pytest.approx((24.0 + 12.0 - 5.0) / 2)
    progress.ended("b", None, failed=True)
    assert (progress.completed, progress.total) == (4, 5)
    assert progress.state() == "done 3 · running 0 · failed 1 · time left 6 s"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(45, "45 s"), (720, "12 min"), (11_100, "3 h 5 min"), (272_733_180, "75,759 h")]
)
def test_durations_are_told_as_people_tell_them(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_where_there_is_no_terminal_every_event_is_a_line() -> None:
    written = io.StringIO()
    with Display({"a": None, "b": 3.0}, 1, 1, Console(file=written)) as display:
        display.started("a")
        display.done("a", 2.0)
        display.failed("b", "no\nroom")
        display.waiting("b", "the machine is gone")
    lines = [line.partition(" ")[2] for line in written.getvalue().splitlines()]
    assert lines == [
        "[1/3] start  a",
        "[2/3] done   a (2 s), 3 s left",
        "[3/3] FAILED b: no room, 0 s left",
        "[3/3] again  b: the machine is gone, 0 s left",
    ]
