"""Ours beside the published accuracy: the verdict in closed form, the record, the reasons, and the command on logs."""

import json

import pytest
from helpers import report_study

from lmms_plugin import side_by_side
from lmms_plugin.analysis import logs
from lmms_plugin.analysis.overview import Estimate
from lmms_plugin.analysis.reproduction import published
from lmms_plugin.analysis.reproduction.deviation_reasons import Standing, reasons
from lmms_plugin.analysis.reproduction.judging_reproduction import WIDEST, Reproduction, not_degenerate, verdict_on
from lmms_plugin.analysis.reproduction.published import NamedBy, PublishedGrounding
from lmms_plugin.analysis.reproduction.run_facts import RunFacts
from lmms_plugin.cli.main import main
from lmms_plugin.cli.screens.screen import HEIGHT, WIDTH
from lmms_plugin.tasks.registry import catalogue

QUICK = ("--resamples", "200")


class TestVerdict:
    @pytest.mark.parametrize(
        ("low", "high", "whole", "verdict"),
        [
            (0.87, 0.89, True, Reproduction.REPRODUCED),
            (0.88, 0.88 + WIDEST - 1e-9, True, Reproduction.REPRODUCED),
            (0.86, 0.86 + 1.01 * WIDEST, True, Reproduction.UNDECIDED),
            (0.87, 0.89, False, Reproduction.UNDECIDED),
            (0.0, 1.0, True, Reproduction.UNDECIDED),
            (0.8801, 0.9, True, Reproduction.OFF),
            (0.5, 0.8799, False, Reproduction.OFF),
        ],
    )
    def test_inside_narrow_and_whole_is_reproduced(self, low, high, whole, verdict):
        assert verdict_on(Estimate((low + high) / 2, low, high), 0.88, whole=whole) is verdict

    def test_equal_answers_are_no_certainty(self):
        # n right answers of n: the lower end is the share at which that happens in one of forty cases.
        right = not_degenerate(Estimate(1.0, 1.0, 1.0), 7, 0.95)
        assert right.low**7 == pytest.approx(0.025)
        assert right.high == right.value == 1.0
        wrong = not_degenerate(Estimate(0.0, 0.0, 0.0), 7, 0.95)
        assert (1 - wrong.high) ** 7 == pytest.approx(0.025)
        assert not_degenerate(Estimate(0.9, 0.8, 1.0), 7, 0.95) == Estimate(0.9, 0.8, 1.0)


class TestRecord:
    def test_every_number_is_of_a_task_there_is_and_of_one_model(self):
        models = PublishedGrounding.known().models
        tasks = {task.name for task in catalogue.tasks()}
        assert {task for one in models.values() for task in one.scores} <= tasks
        ids = [id_.casefold() for one in models.values() for id_ in one.checkpoints]
        assert len(ids) == len(set(ids)) > 20
        assert all(0 < score.value < 1 and score.source for one in models.values() for score in one.scores.values())
        assert models["Qwen2.5-VL-3B"].scores["refcocoplus_rec_testA"].value == pytest.approx(0.880)

    def test_a_study_prints_them_too_for_the_unquantized_model_alone(self):
        asked = "Qwen/Qwen2.5-VL-3B-Instruct", "refcocoplus_rec_testB"
        assert published.score(*asked, "none", 16, "acc@0.5").value == pytest.approx(0.741)
        assert published.score(*asked, "awq", 4, "acc@0.5") is None
        assert published.score(asked[0], "refcocoplus_shift_testB_fog_3", "none", 16, "acc@0.5") is None

    def test_a_checkpoint_is_known_by_id_by_its_configuration_or_by_the_user(self, tmp_path):
        record = PublishedGrounding.known()
        assert record.identify("qwen/qwen2.5-vl-3b-instruct")[1] is NamedBy.ID
        config = {"_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        model, by = record.identify(str(tmp_path))
        assert (model.name, by) == ("Qwen2.5-VL-7B", NamedBy.CONFIG)
        model, by = record.identify(str(tmp_path), "qwen2.5-vl-3b")
        assert (model.name, by) == ("Qwen2.5-VL-3B", NamedBy.USER)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"config\.json names 'none'.*--as NAME"):
            record.identify(str(tmp_path))

    @pytest.mark.parametrize("near", ["Qwen/Qwen2.5-VL-3B-Instruct-AWQ", "me/Qwen2.5-VL-3B-Instruct-tuned"])
    def test_a_copy_that_was_changed_is_not_the_published_model(self, near):
        with pytest.raises(ValueError, match="no published number is known of"):
            PublishedGrounding.known().identify(near)

    def test_numbers_of_the_user_go_first(self, tmp_path):
        own = record_file(tmp_path, 50, name="Qwen2.5-VL-3B", id_="Qwen/Qwen2.5-VL-3B-Instruct")
        found = PublishedGrounding.known(own).named("Qwen2.5-VL-3B")
        assert {task: score.value for task, score in found.scores.items()} == {"shapes_rec": 0.5}

    @pytest.mark.parametrize(
        ("percent", "told"), [("[1, 2]", "expected 1 numbers in percent, got 2"), ("[101]", "must be at most 100")]
    )
    def test_a_wrong_record_is_told_in_one_line(self, tmp_path, percent, told):
        with pytest.raises(ValueError, match=told) as refused:
            PublishedGrounding.known(record_file(tmp_path, percent))
        assert "own.yaml" in str(refused.value)
        assert "\n" not in str(refused.value)


class TestReasons:
    def found(self, difference=-0.1, **facts):
        return {reason.name: reason for reason in reasons(RunFacts(**facts), difference)}

    def test_what_the_facts_exclude_is_not_named(self):
        found = self.found(engine={"dtype": "bfloat16"}, dialect="demo")
        assert not {"answers", "reasoning", "dtype", "checkpoint", "arguments", "dataset"} & found.keys()
        assert {reason.standing for reason in found.values()} == {Standing.OPEN}

    def test_answers_without_a_box_account_for_no_more_than_their_share(self):
        assert "up to 25%" in self.found(without_box=0.025)["answers"].evidence
        assert "up to 100%" in self.found(without_box=0.5)["answers"].evidence
        assert "answers" not in self.found(difference=0.1, without_box=0.025)

    @pytest.mark.parametrize(
        ("name", "given"),
        [("pixel limits", "max_pixels"), ("prompt", "system_prompt"), ("template", "enable_thinking")],
    )
    def test_what_was_given_is_shown_before_what_is_open(self, name, given):
        found = reasons(RunFacts(given={given: "5"}), -0.1)
        assert (found[0].name, found[0].standing) == (name, Standing.SHOWN)
        assert f"{given}=5" in found[0].evidence
        assert [reason.standing for reason in found].count(Standing.SHOWN) == 1

    def test_other_facts_are_told(self):
        engine = {"dtype": "float16", "pixels": '{"size": {"longest_edge": 112}, "max_pixels": 9}'}
        found = self.found(engine=engine, dialect="fractions", named_by=NamedBy.CONFIG, local_copy=True)
        assert "float16" in found["dtype"].evidence
        assert "size.longest_edge 112, max_pixels 9" in found["pixel limits"].evidence
        assert found["prompt"].standing is Standing.SHOWN
        assert "generic words" in found["prompt"].evidence
        assert "_name_or_path" in found["checkpoint"].evidence
        assert "local copy" in found["dataset"].evidence


def record_file(folder, percent, name="Demo", id_="demo"):
    numbers = percent if isinstance(percent, str) else f"[{percent}]"
    file = folder / "own.yaml"
    row = f"{{name: {name}, checkpoints: [{id_}], percent: {numbers}}}"
    file.write_text(f"grounding:\n  - {{source: A test, tasks: [shapes_rec], models: [{row}]}}\n")
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on the demo's documents: on all of them, limited, and of a quantized model."""
    folder = tmp_path_factory.mktemp("runs")
    tasks = {"shapes_rec": None}
    docs = report_study.documents(400)
    report_study.write_run(folder / "whole", docs, 1.0, tasks=tasks)
    report_study.write_run(folder / "first", docs, 1.0, tasks=tasks, limit=400)
    report_study.write_run(folder / "few", docs[:24], 0.8, tasks=tasks)
    report_study.write_run(folder / "one image", docs[:2], 1.0, tasks=tasks, limit=2)
    report_study.write_run(folder / "rtn", docs[:24], 0.8, 0, "quant_rtn", "pretrained=demo,bits=3", tasks=tasks)
    return folder


@pytest.fixture
def reproduce(monkeypatch, capsys):
    def of(*arguments):
        monkeypatch.setattr("sys.argv", ["lmms-plugin", "reproduce", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return of


def accuracy(folder):
    return float((logs.read_one(folder).tasks["shapes_rec"].score >= 0.5).mean())


class TestCommand:
    def judged(self, reproduce, folder, tmp_path, percent, *more):
        file = record_file(tmp_path, f"[{percent:.3f}]")
        status, out, err = reproduce("--results", folder, "--published", file, *QUICK, *more)
        assert not err
        if "--json" not in more:
            lines = out.rstrip("\n").split("\n")
            assert len(lines) <= HEIGHT
            assert max(map(len, lines)) <= WIDTH
        return status, " ".join(out.split())

    def test_inside_a_narrow_interval_is_reproduced(self, reproduce, runs, tmp_path):
        value = 100 * accuracy(runs / "whole")
        status, told = self.judged(reproduce, runs / "whole", tmp_path, value)
        assert status == 0
        assert told.startswith(f"Reproduced: Demo has {value:.1f} % on shapes_rec where {value:.1f} % are published")
        assert "Why it may differ" not in told

    def test_outside_is_off_with_reasons(self, reproduce, runs, tmp_path):
        value = 100 * accuracy(runs / "whole")
        status, told = self.judged(reproduce, runs / "whole", tmp_path, value - 30)
        assert status == 1
        assert told.startswith("Off by +30.0 points: Demo has")
        assert "Why it may differ" in told
        assert "Asked in dialect demo" in told

    def test_the_first_documents_are_never_reproduced(self, reproduce, runs, tmp_path):
        value = 100 * accuracy(runs / "first")
        status, told = self.judged(reproduce, runs / "first", tmp_path, value)
        assert status == 1
        assert told.startswith("Not decided: Demo has")
        assert "first 400 expressions, which are no sample" in told
        _, told = self.judged(reproduce, runs / "first", tmp_path, value - 30)
        assert told.startswith("Off so far by +30.0 points")

    def test_a_wide_interval_decides_nothing_and_says_its_width(self, reproduce, runs, tmp_path):
        value = 100 * accuracy(runs / "few")
        status, told = self.judged(reproduce, runs / "few", tmp_path, value)
        assert status == 1
        _, text = self.judged(reproduce, runs / "few", tmp_path, value, "--json")
        found = json.loads(text)
        (split,) = found["splits"]
        assert found["reproduced"] is False
        assert split["verdict"] == "undecided"
        assert split["width"] == pytest.approx(split["ours"]["high"] - split["ours"]["low"])
        assert f"which is {100 * split['width']:.1f} points wide (at most 5.0 decide)" in told

    def test_a_quantized_model_has_no_published_number(self, reproduce, runs, tmp_path):
        status, out, err = reproduce("--results", runs / "rtn", "--published", record_file(tmp_path, 80))
        assert (status, out) == (2, "")
        assert "expected a run of the unquantized model (quant_none)" in err
        assert "rtn 3" in err

    def test_one_image_has_no_interval(self, reproduce, runs, tmp_path):
        status, _, err = reproduce("--results", runs / "one image", "--published", record_file(tmp_path, 80))
        assert status == 2
        assert "expected 2 images of shapes_rec or more for an interval, got 1; raise --limit" in err

    def test_a_task_that_did_not_run_is_told(self, reproduce, runs):
        status, _, err = reproduce("--results", runs / "few", "--as", "Qwen2.5-VL-3B")
        assert status == 2
        assert "expected refcocoplus_rec_val or refcocoplus_rec_testA" in err

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ((), "expected MODEL"),
            (("demo",), "no published number is known of 'demo', by its name"),
            (("me/other",), "Qwen/Qwen2.5-VL-3B-Instruct"),
            (("demo", "--as", "Qwen2.5-VL-3"), "did you mean 'Qwen2.5-VL-3B'?"),
            (("demo", "--as", "Qwen2.5-VL-3B", "--task", "shapes_rec"), "(known: refcocoplus_rec_val,"),
            (("demo", "--as", "Qwen2.5-VL-3B", "--model-args", "kv_bits=4"), "got kv_bits"),
            (("demo", "--as", "Qwen2.5-VL-3B", "--model-args", "max_pixel=4"), "did you mean 'max_pixels'?"),
            (("demo", "--results", "."), "MODEL says nothing with --results"),
            (("--results", ".", "--limit", "4"), "--limit says nothing with --results"),
            (("--published", "nowhere.yaml"), "there is no file nowhere.yaml"),
        ],
    )
    def test_what_cannot_be_is_told_before_anything_runs(self, reproduce, monkeypatch, tmp_path, arguments, told):
        monkeypatch.setattr(side_by_side, "run", lambda *_: pytest.fail("a model was run"))
        monkeypatch.chdir(tmp_path)
        status, out, err = reproduce(*arguments)
        assert (status, out) == (2, "")
        (line,) = err.splitlines()
        assert told in line
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    @pytest.mark.model
    def test_a_model_is_run_and_judged(self, reproduce, commands, monkeypatch, tmp_path):
        # The real command, in a process that need not import everything anew.
        monkeypatch.setattr(side_by_side, "run", lambda command, _: commands.output(*command, cwd=tmp_path))
        monkeypatch.chdir(tmp_path)
        asked = "--limit", 8, "--output", tmp_path / "kept", "--model-args", "device=cpu"
        status, out, err = reproduce("demo", "--published", record_file(tmp_path, 94.7), *asked)
        assert status == 1
        assert err.startswith("lmms-eval --model quant_none --model_args pretrained=demo,device=cpu --tasks shapes_rec")
        told = " ".join(out.split())
        assert "first 8 expressions, which are no sample" in told
        assert "Computed in float32" in told
        assert logs.read_one(tmp_path / "kept").limit == 8
