import sys

import pytest

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.vlm.harness_model import HarnessModel

COMMAND = ["/usr/bin/lmms-eval", "--model", "quant_none", "--tasks", "shapes_rec"]


class Captured(HarnessModel):
    """Model that keeps what it is created with."""

    def __init__(self, **given):
        super().__init__()
        self.given = given

    def make_responder(self):
        """Answer nothing: what is tested comes before the first request."""
        raise NotImplementedError


def batch_size(monkeypatch, argv, passed, model_args="pretrained=demo"):
    monkeypatch.setattr(sys, "argv", argv)
    added = {"batch_size": passed, "max_batch_size": None, "device": None}
    return ModelArguments.parse(Captured.create_from_arg_string(model_args, added).given).batch_size


@pytest.mark.parametrize(
    ("argv", "passed", "expected"),
    [
        (COMMAND, 1, None),
        ([*COMMAND, "--batch_size", "1"], "1", 1),
        ([*COMMAND, "--batch_size", "auto"], "auto", None),
        (["/site-packages/lmms_eval/__main__.py", "--model", "quant_none"], 1, None),
        (["/usr/bin/lmms-eval", "--config", "evaluations.yaml"], 1, 1),
        (["study.py"], 1, 1),
        (["study.py"], None, None),
    ],
    ids=["nothing said", "one", "auto", "module", "file of evaluations", "Python, one", "Python, nothing said"],
)
def test_a_batch_size_that_nobody_gave_is_automatic(monkeypatch, argv, passed, expected):
    assert batch_size(monkeypatch, argv, passed) == expected


@pytest.mark.parametrize(("words", "expected"), [((), 1), (("--batch_size", "1"), "1")], ids=["nothing", "one"])
def test_lmms_evals_command_passes_a_number_where_none_is_given_and_text_where_one_is(monkeypatch, words, expected):
    from lmms_eval.__main__ import parse_eval_args

    monkeypatch.setattr(sys, "argv", [*COMMAND, *words])
    _, found = parse_eval_args()
    assert found.batch_size == expected
    assert type(found.batch_size) is type(expected)


def test_model_args_come_before_the_command(monkeypatch):
    assert batch_size(monkeypatch, COMMAND, 1, "pretrained=demo,batch_size=1") == 1


def test_a_static_cache_takes_one_at_a_time_unless_told_otherwise():
    assert ModelArguments.parse({"static_cache": True}).batch_size == 1
    assert ModelArguments.parse({"static_cache": False}).batch_size is None
    assert ModelArguments.parse({"static_cache": True, "batch_size": "auto"}).batch_size is None
