"""Distance of runs from their logs: planted measures and flips, bounds from two runs, and logs that tell nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.planted_logs import line, write

from lmms_plugin.analysis import distances, logs
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.cli.main import main
from lmms_plugin.cli.screens.screen import HEIGHT, WIDTH
from lmms_plugin.protocol.response import Alternatives, Response, Token
from lmms_plugin.side_by_side import ModelSpec

SETTINGS = MeasurementSettings(resamples=100)
N = 60


def planted(flips=6, seed=0):
    """Lines of a run with a reference: the divergence is largest where the answer flipped, but for one answer."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(N):
        row = line(k, 0.8, {"coordinate_mean": 0.5})
        flipped = k < flips
        kl = float(rng.uniform(0, 1)) + 2 * (flipped and k > 0)
        reference = {"score": 0.2 if flipped else 0.8, "kl": kl, "kl_coordinates": kl, "answer_agreement": 1 - flipped}
        reference |= {"token_agreement": 0.9, "answer_probability_change": -kl / 10}
        if k % 2:
            reference["box_shift"] = 0.01
        row["mean_iou"]["reference"] = reference
        rows.append(row)
    rows[0]["mean_iou"]["reference"]["kl_coordinates"] = 0.0
    return rows


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / "run", {"rec": planted()}, "quant_rtn")


def test_measures_are_means_over_answers_and_flips_those_of_the_scores(run):
    (found,) = distances.of_run(logs.read_one(run), SETTINGS)
    assert (found.exact, found.lost, found.won, found.records, found.images) == (True, 0, 6, N, N // 4)
    by_name = {one.measure: one for one in found.measures}
    kl = [row["mean_iou"]["reference"]["kl"] for row in planted()]
    assert by_name["kl"].value == by_name["kl"].upper == pytest.approx(np.mean(kl))
    assert by_name["kl"].interval.low < np.mean(kl) < by_name["kl"].interval.high
    assert by_name["kl_coordinates"].flips_predicted == pytest.approx(5 / 6)
    assert by_name["answer_agreement"].flips_predicted == 1.0
    # All alike, it says nothing: the share of the flipped.
    assert by_name["token_agreement"].flips_predicted == pytest.approx(6 / N)
    assert (by_name["box_shift"].records, by_name["box_shift"].value) == (N // 2, pytest.approx(0.01))


def test_where_nothing_flips_nothing_is_predicted(tmp_path):
    run = logs.read_one(write(tmp_path, {"rec": planted(flips=0)}))
    (found,) = distances.of_run(run, SETTINGS)
    assert (found.lost, found.won) == (0, 0)
    assert all(np.isnan(one.flips_predicted) for one in found.measures)


def test_logs_without_a_reference_are_told(tmp_path):
    plain = [line(k, 0.8, {"coordinate_mean": 0.5}) for k in range(8)]
    with pytest.raises(ValueError, match=r"expected a run with a reference .* reference=none"):
        distances.of_run(logs.read_one(write(tmp_path / "a", {"rec": plain})), SETTINGS)
    rows = planted()
    del rows[3]["mean_iou"]["reference"]
    with pytest.raises(ValueError, match=r"every document in .*, got none to 003"):
        distances.of_run(logs.read_one(write(tmp_path / "b", {"rec": rows})), SETTINGS)
    rows[3]["mean_iou"]["reference"] = {"kl": "far"}
    with pytest.raises(ValueError, match="expected numbers under 'reference'"):
        distances.of_run(logs.read_one(write(tmp_path / "c", {"rec": rows})), SETTINGS)


def answered(digits, answer="[1, 2, 3, 4]"):
    """Answer whose first number is uncertain."""
    tokens = [Token(c, 0.0, Alternatives({c: 1.0}) if c.isdecimal() else None) for c in answer]
    tokens[1] = Token(answer[1], float(np.log(digits[answer[1]])), Alternatives(digits))
    sizes = {"original_size": (100, 100), "dialect": "qwen3_vl", "records_digits": True}
    return Response(answer, (*tokens, Token("", 0.0)), **sizes)


def own(folder, digits, other=(), answer="[2, 2, 3, 4]", score=0.8, dialect="qwen3_vl"):
    rows = []
    for k in range(12):
        row = line(k, 0.8 if k not in other else score, {"coordinate_mean": 0.5})
        response = replace(answered(digits, answer if k in other else "[1, 2, 3, 4]"), dialect=dialect)
        rows.append({"doc_id": k, "filtered_resps": response.encode(), **row})
    return write(folder, {"rec": rows}, "quant_none")


def test_two_runs_give_bounds_and_their_own_flips(tmp_path):
    first = own(tmp_path / "a", {"1": 0.9, "2": 0.1})
    second = own(tmp_path / "b", {"1": 0.7, "2": 0.3}, other=(5,), score=0.2)
    (found,) = distances.of_runs(logs.read_one(first), logs.read_one(second), SETTINGS)
    by_name = {one.measure: one for one in found.measures}
    exact = 0.9 * np.log(0.9 / 0.7) + 0.1 * np.log(0.1 / 0.3)
    # Of four digits in an answer one is uncertain, and after another one nothing is compared.
    expected = (11 * exact / 4 + exact) / 12
    kl = by_name["kl_coordinates"]
    assert kl.value <= expected <= kl.upper
    assert kl.interval.low <= kl.value
    assert kl.upper <= kl.interval.high
    assert (found.exact, found.lost, found.won) == (False, 1, 0)
    assert (found.compared, found.tokens) == (11 * 13 + 2, 12 * 13)
    assert by_name["answer_agreement"].value == pytest.approx(11 / 12)
    assert by_name["answer_agreement"].flips_predicted == 1.0
    # A fifth of the mass moves by one thousandth of the width, on one of four sides.
    assert by_name["box_shift"].value == pytest.approx(0.2 / 1000 / 4)
    assert "answer_probability_change" not in by_name


def test_runs_of_two_families_have_no_distance(tmp_path):
    first = own(tmp_path / "a", {"1": 0.9, "2": 0.1})
    second = own(tmp_path / "b", {"1": 0.9, "2": 0.1}, dialect="qwen2_vl")
    with pytest.raises(ValueError, match="answers to rec have the formats qwen3_vl and qwen2_vl"):
        distances.of_runs(logs.read_one(first), logs.read_one(second), SETTINGS)


def called(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["lmms-plugin", "distance", *map(str, arguments), "--resamples", "50"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_the_command_answers_in_one_screen_and_in_data(run, tmp_path, monkeypatch, capsys):
    status, out, _ = called(monkeypatch, capsys, run)
    lines = out.rstrip("\n").split("\n")
    assert status == 0
    assert len(lines) <= HEIGHT
    assert max(map(len, lines)) <= WIDTH
    said = "6 of 60 answers flipped between right and wrong, 10 % of them among the 6 answers of the largest box_shift."
    assert said in " ".join(lines)
    assert "docs/distance.md" in lines[-1]
    _, everything, _ = called(monkeypatch, capsys, run, "--all")
    assert all(name in everything for name in ("kl_coordinates", "box_shift", "among the F"))
    _, data, _ = called(monkeypatch, capsys, run, "--json")
    assert json.loads(data)["tasks"][0]["measures"][0]["measure"] == "kl"
    both = own(tmp_path / "a", {"1": 0.9, "2": 0.1}), own(tmp_path / "b", {"1": 0.7, "2": 0.3})
    status, out, _ = called(monkeypatch, capsys, *both)
    assert status == 0
    assert "nats per token from A (" in " ".join(out.split("\n"))
    assert "bounded by what logs keep" in out
    assert "On rec B is " in out
    assert "unquantized" not in out
    assert max(map(len, out.split("\n"))) <= WIDTH


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("quant_none:pretrained=demo", "quant_rtn:bits=4"),
            "got the model 'quant_none:pretrained=demo': --tasks runs",
        ),
        (
            ("quant_none:pretrained=demo", "quant_rtn:pretrained=demo", "--tasks", ","),
            "--tasks: expected names of tasks",
        ),
        (
            ("quant_none:pretrained=demo", "quant_rtn:pretrained=demo", "--tasks", "x", "--limit", "nan"),
            "--limit: expected a number of documents",
        ),
        (
            ("quant_none:pretrained=demo", "quant_rtn:pretrained=demo", "--tasks", "x", "--limit", "-1"),
            "--limit: expected a number of documents",
        ),
        (("a", "--limit", "3"), "--limit says nothing without --tasks"),
        (("quant_rtn:pretrained=demo", "--tasks", "x"), "expected two models, got one"),
        (("quant_rtn:pretrained=demo", "quant_rtn:pretrained=demo", "--tasks", "x"), "expected the unquantized model"),
        (("quant_none:pretrained=demo", "openai:model=x", "--tasks", "x"), "expected a quantized model that is loaded"),
        (("quant_none:pretrained=demo,dtype=float32", "quant_rtn:bits=4", "--tasks", "x"), "expected dtype=float32"),
        (("quant_none:bits=x", "quant_rtn:reference=none", "--tasks", "x"), "has a reference of its own"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(arguments, told, monkeypatch, capsys):
    status, _, err = called(monkeypatch, capsys, *arguments)
    assert status == 2
    (one,) = err.splitlines()
    assert told in one


@pytest.mark.parametrize(
    ("reference", "model", "arguments"),
    [
        ("quant_none:pretrained=demo", "quant_rtn:pretrained=demo,bits=4", "pretrained=demo,bits=4,reference=none"),
        ("quant_none:pretrained=a/b", "quant_prequantized:pretrained=c", "pretrained=c,reference=a/b"),
        ("quant_none", "quant_rtn", "reference=none"),
    ],
)
def test_a_model_takes_another_as_its_reference(reference, model, arguments):
    assert ModelSpec.parse(model).with_reference(ModelSpec.parse(reference)).arguments == arguments
