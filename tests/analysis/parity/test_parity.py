"""Comparison of two runs from their logs alone: numbers, places of differences, and inputs that cannot be compared."""

import json
import math

import pytest
from helpers.planted_logs import answers, line, write

from lmms_plugin.analysis import logs
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.analysis.parity.judging_parity import judge
from lmms_plugin.analysis.parity.prompts_apart import Place, difference_of
from lmms_plugin.cli.main import main
from lmms_plugin.protocol.response import Alternatives, Response, Token
from lmms_plugin.protocol.traces import Trace

SETTINGS = MeasurementSettings(resamples=50)
IMAGE = 7
FACTS = {"checkpoint": "org/model", "weights": "", "dtype": "float16", "quantization": "none", "template": "t"}


def run(folder, responses, boxes=None, name="quant_none", **kwargs):
    """A run of one grounding task with these answers."""
    folder.mkdir()
    rows = []
    for k, response in enumerate(responses):
        row = line(k, 0.8, {"coordinate_mean": 0.5})
        row["mean_iou"]["box"] = list(boxes[k]) if boxes else [0.0, 0.0, 0.5, 0.5]
        rows.append({"doc_id": k, "filtered_resps": response.encode(), **row})
    config = {"generation_kwargs": {"max_new_tokens": 64, "temperature": 0, **kwargs}}
    return logs.read_one(write(folder, {"rec": rows}, name, rec=config))


def said(*texts, logprob=-0.5, images=16, length=40, facts=FACTS, size=(200, 100), **more):
    tokens = tuple(Token(text, logprob) for text in (*texts, ""))
    trace = Trace(length, images, f"digest {length} {images}", "")
    return Response("".join(texts), tokens, size, size, "demo", trace=trace, engine=facts, **more)


def names(found):
    return [cause.name for cause in found.causes]


def test_shifts_are_in_pixels_of_the_original_image(tmp_path):
    boxes = [(0.0, 0.0, 0.5, 0.5)] * 8, [(0.0, 0.0, 0.5, 0.5)] * 7 + [(0.1, 0.0, 0.5, 0.7)]
    one, other = (
        run(tmp_path / name, [said("a", logprob=p)] * 8, of)
        for name, p, of in zip("ab", (-0.5, -0.75), boxes, strict=True)
    )
    found = judge(one, other, SETTINGS)
    # 0.1 of 200 pixels is 20, and 0.2 of 100 pixels as well.
    assert found.whole.boxes.largest_shift == pytest.approx(20)
    assert found.whole.boxes.mean_shift == pytest.approx(20 / 8)
    assert found.whole.boxes.least_iou == pytest.approx(0.2 / 0.33)
    assert (found.whole.boxes.both, found.whole.boxes.moved) == (8, 1)
    # Both tokens, the end included, of all documents.
    assert found.whole.logprobs[:3] == pytest.approx((16, 0.25, 0.25))
    assert found.whole.logprobs.coordinates == 0


def test_nothing_fits_a_difference_of_unknown_cause(tmp_path):
    one, other = (run(tmp_path / name, [said("a", logprob=p)] * 8) for name, p in (("a", -0.5), ("b", -0.9)))
    found = judge(one, other, SETTINGS)
    assert not found.same
    assert found.causes == []
    assert found.sentence.startswith(
        "Different, unexplained: 8 of 8 answers are equal, and log-probabilities differ by"
    )
    assert "parity=True" in found.hint
    assert judge(one, other, SETTINGS, tolerance=0.5).same


def test_only_common_documents_and_tasks_count(tmp_path):
    one = run(tmp_path / "a", [said("a")] * 12)
    other = run(tmp_path / "b", [said("a")] * 8)
    found = judge(one, other, SETTINGS)
    assert found.same
    assert (found.whole.documents, found.whole.first_only, found.whole.second_only) == (8, 4, 0)


def test_answers_without_trailers_are_compared_as_texts(tmp_path):
    def plain(folder, texts):
        rows = [{**row, "filtered_resps": text} for row, text in zip(answers(0.8, n=len(texts)), texts, strict=True)]
        return logs.read_one(write(folder, {"rec": rows}))

    one, other = plain(tmp_path / "a", ["[1]"] * 8), plain(tmp_path / "b", ["[1]"] * 7 + ["[2]"])
    assert judge(one, one, SETTINGS).same
    found = judge(one, other, SETTINGS)
    assert found.whole.written.texts == (8, 1, "007: [1] and [2]")
    assert found.whole.read.prompts.known == 0
    assert math.isnan(found.whole.logprobs.largest)
    assert "logs no facts about its engine" in found.hint


def test_limits_of_pixels_are_seen_in_numbers_of_image_tokens(tmp_path):
    def of(name, counts):
        return run(tmp_path / name, [said("a", images=n, length=20 + n, logprob=-n / 50) for n in counts])

    whole = of("whole", [64, 100, 256, 400])
    assert names(judge(whole, of("capped", [64, 100, 196, 200]), SETTINGS)) == ["other pixel limits"]
    assert names(judge(whole, of("raised", [250, 256, 256, 400]), SETTINGS)) == ["other pixel limits"]
    # Half of the tokens everywhere is no limit.
    halved = judge(whole, of("halved", [32, 50, 128, 200]), SETTINGS)
    assert names(halved) == ["other number of image tokens"]
    assert "sent in the same size" in halved.causes[0].evidence


def test_another_image_size_is_named(tmp_path):
    one = run(tmp_path / "a", [said("a")] * 4)
    found = judge(one, run(tmp_path / "b", [said("a", logprob=-0.7, size=(100, 50))] * 4), SETTINGS)
    assert names(found) == ["other image size"]
    assert "200 x 100 and 100 x 50" in found.causes[0].evidence


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        ({"checkpoint": "org/other"}, "another checkpoint"),
        ({"dtype": "bfloat16"}, "other dtype"),
        ({"quantization": "awq"}, "other quantization"),
        ({"template": "u"}, "other chat template"),
        ({"system": "s"}, "other system prompt"),
        ({"pixels": "2", "checkpoint": ""}, None),
    ],
)
def test_facts_that_differ_are_named(tmp_path, facts, cause):
    one = run(tmp_path / "a", [said("a")] * 4)
    other = run(tmp_path / "b", [said("a", logprob=-0.6, facts=FACTS | facts)] * 4)
    assert names(judge(one, other, SETTINGS)) == ([] if cause is None else [cause])
    # Where nothing differs, other facts are no difference.
    assert judge(one, run(tmp_path / "c", [said("a", facts=FACTS | facts)] * 4), SETTINGS).same


def test_a_token_that_was_not_the_likeliest_was_drawn(tmp_path):
    def digits(chosen, likeliest):
        listed = Alternatives({chosen: 0.3, likeliest: 0.6}, 0.1)
        tokens = Token("[", -0.1), Token(chosen, math.log(0.3), listed)
        return Response(f"[{chosen}", tokens, (9, 9), None, "demo", records_digits=True, engine=FACTS)

    one = run(tmp_path / "a", [said("[", "1")] * 4)
    assert names(judge(one, run(tmp_path / "b", [digits("2", "1")] * 4), SETTINGS)) == ["sampling leaking in"]


def test_places_of_differences_between_prompts():
    def trace(*ids):
        return Trace.of(ids, IMAGE)

    picture = [IMAGE] * 9
    base = trace(1, 2, *picture, 3, 4, 5)
    assert difference_of(base, base).place is Place.NOWHERE
    assert difference_of(base, trace(1, 2, *picture, *picture, 3, 4, 5)).place is Place.IMAGE
    added = difference_of(base, trace(9, 9, 8, 1, 2, *picture, 3, 4, 5))
    assert added == (Place.HEAD, 0, (), (9, 9, 8))
    assert difference_of(base, trace(1, 2, *picture, 3, 4, 5, 6)).place is Place.ELSEWHERE
    assert difference_of(base, trace(1, 6, 2, *picture, 3, 6, 4, 5)).place is Place.ELSEWHERE
    assert difference_of(base.without_ids(), base) is None


def test_a_trace_survives_the_way_through_a_log():
    trace = Trace.of([1, IMAGE, IMAGE, 3], IMAGE, [5, 6])
    assert (trace.tokens, trace.image_tokens) == (4, 2)
    assert Trace.of([1, IMAGE, 3, IMAGE], IMAGE).digest != trace.digest
    for one in (trace, trace.without_ids(), Trace(62)):
        response = Response("a", (Token("a", -0.5),), trace=one, engine={"dtype": "float32"})
        assert Response.decode(response.encode()) == response
    assert Response.decode(Response("a").encode()).trace is None
    damaged = Response("a", trace=trace).encode().replace("[4,2,", '[4,"2",')
    with pytest.raises(ValueError, match="numbers of tokens"):
        Response.decode(damaged)


def called(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["lmms-plugin", "parity", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_the_status_tells_same_from_different(tmp_path, monkeypatch, capsys):
    for name, p in (("a", -0.5), ("b", -0.9)):
        run(tmp_path / name, [said("a", logprob=p)] * 8)
    status, out, _ = called(monkeypatch, capsys, tmp_path / "a", tmp_path / "a")
    assert (status, out[:5]) == (0, "Same:")
    status, out, _ = called(monkeypatch, capsys, tmp_path / "a", tmp_path / "b", "--json", "--resamples", "20")
    told = json.loads(out)
    assert (status, told["same"], told["causes"]) == (1, False, [])
    assert told["whole"]["logprobs"]["largest"] == pytest.approx(0.4)
    assert {change["metric"] for change in told["changes"]} >= {"acc@0.5", "ece", "aurc"}


def test_what_cannot_be_compared_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    run(tmp_path / "a", [said("a")] * 8)
    other = [{**row, "filtered_resps": "x"} for row in answers(0.8, n=8)]
    write(tmp_path / "task", {"rec2": other})
    for row in other:
        row["mean_iou"]["id"] = f"other {row['doc_id']}"
    write(tmp_path / "documents", {"rec": other})
    for row in other:
        row["mean_iou"] |= {"id": f"{row['doc_id']:03d}", "expression": "something else"}
    write(tmp_path / "version", {"rec": other})
    write(
        tmp_path / "answers",
        {"rec": [{k: v for k, v in row.items() if k != "filtered_resps"} for row in answers(0.8, n=8)]},
    )
    run(tmp_path / "facts", [said("a", facts={"trials": {"fine": {"trace": None}}})] * 8)
    next(write(tmp_path / "log", {"rec": answers(0.8, n=8)}).glob("*.jsonl")).unlink()
    expected = {
        "task": "expected a task that both runs have; the first has rec, the second rec2",
        "documents": "expected documents that both runs answered in rec, got none in common",
        "version": "expected the same asked in both runs, but 8 documents differ",
        "answers": "expected the answer as a text under filtered_resps",
        "facts": "document 000, engine is damaged: trials: fine: tokens is missing",
        "log": "run lmms-eval with --log_samples",
        "nowhere": "expected a results file or a folder",
    }
    for name, message in expected.items():
        status, out, err = called(monkeypatch, capsys, tmp_path / "a", tmp_path / name)
        assert (status, out) == (2, ""), name
        assert message in err
        assert err.count("\n") == 1, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "b", "--limit", "3"), "--limit says nothing without --tasks"),
        (("a/b", "quant_none", "--tasks", "shapes_rec"), "expected a model and its arguments such as quant_none:"),
        (("a", "b", "--tolerance", "-1"), "expected a results file or a folder"),
    ],
)
def test_wrong_options_are_told(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = called(monkeypatch, capsys, *arguments)
    assert status == 2
    assert message in err
