"""What is read before the first request, and what waits for it."""

import json
import sys
from pathlib import Path

import pytest
from helpers.environments import run
from helpers.models import answer, message, photograph
from loguru import logger

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.quant_backends.checkpoints.loading import Preparation
from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.vlm import wrapper as models


@pytest.fixture
def loads(monkeypatch):
    """Checkpoints of which weights were read, in order."""
    read, original = [], Preparation.load

    def spy(self):
        read.append(self.path)
        return original(self)

    monkeypatch.setattr(Preparation, "load", spy)
    return read


@pytest.fixture
def said():
    lines = []
    handler = logger.add(lambda line: lines.append(line.record["message"]), level="INFO")
    yield lines
    logger.remove(handler)


@pytest.fixture
def evaluate(monkeypatch):
    """lmms-eval's evaluator on our tasks; returns its results."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager

    get_model("quant_none")
    manager = TaskManager(include_defaults=False)

    def run(arguments, task, model="quant_none", **options):
        return simple_evaluate(
            model=model, model_args=arguments, tasks=[task], task_manager=manager, limit=2, bootstrap_iters=0, **options
        )

    return run


def test_a_missing_dataset_ends_a_run_before_any_weight_is_read(evaluate, loads, monkeypatch, tmp_path):
    monkeypatch.setenv("LMMS_PLUGIN_REFCOCOPLUS", str(tmp_path / "nowhere"))
    with pytest.raises(DatasetError, match="nowhere"):
        evaluate("pretrained=demo,bits=3,calibration=noise", "refcocoplus_rec_testA", model="quant_gptq")
    assert loads == []


def test_weights_are_read_once_and_told_in_the_results(evaluate, loads):
    results = evaluate("pretrained=demo,bits=4,device=cpu", "shapes_rec", model="quant_rtn")
    assert loads == [CHECKPOINT]
    told = results["throughput"]
    assert told["total_gen_tokens"] > 0
    assert told["avg_bits_per_weight"] == pytest.approx(4 + 32 / 128, abs=0.3)


def test_a_run_whose_answers_are_all_known_reads_no_weights_and_says_so(evaluate, loads, said, tmp_path):
    options = {"use_cache": str(tmp_path / "cache")}
    first = evaluate("pretrained=demo,device=cpu", "shapes_rec", **options)
    again = evaluate("pretrained=demo,device=cpu", "shapes_rec", **options)
    assert loads == [CHECKPOINT]
    assert any(line.startswith("No request came to the model, so it was not loaded") for line in said)
    # Some metrics of two answers are NaN, which equals nothing.
    assert repr(again["results"]["shapes_rec"]) == repr(first["results"]["shapes_rec"])
    assert "avg_bits_per_weight" not in (again.get("throughput") or {})


def test_a_report_that_was_asked_for_is_written_where_all_answers_are_known(evaluate, loads, tmp_path):
    options = {"use_cache": str(tmp_path / "cache")}
    file = tmp_path / "report.json"
    for _ in range(2):
        file.unlink(missing_ok=True)
        evaluate(f"pretrained=demo,device=cpu,report={file}", "shapes_rec", **options)
        assert json.loads(file.read_text())["method"] == "none"
    assert len(loads) == 2


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("smolvlm", {"method": "gptq", "calibration": "dataset:/no/such/folder"}, "/no/such/folder"),
        ("blip2_itm", {"kv_bits": 4}, "kv_bits: .* is a retrieval checkpoint, which caches nothing"),
        ("blip2_itm", {"features": "folder"}, "features, selector: .* is a retrieval checkpoint"),
        ("blip2_itm", {"method": "gptq"}, "is a retrieval checkpoint: gptq is calibrated with answers"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_told_when_the_model_is_made(checkpoint, loads, name, arguments, message):
    method, path = arguments.get("method", "rtn"), str(checkpoint(name))
    others = {key: value for key, value in arguments.items() if key != "method"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        models.model_class(method)(pretrained=path, device="cpu", bits=4, **others)
    assert loads == []


def test_a_model_that_gets_no_request_answers_what_lmms_eval_asks_of_it(checkpoint, loads):
    vlm = models.QuantNone(pretrained=str(checkpoint("smolvlm")), device="cpu")
    assert (vlm.rank, vlm.world_size, str(vlm.device), vlm.is_simple) == (0, 1, "cpu", False)
    assert not hasattr(vlm, "batch_sizes")
    assert vlm.generate_until([]) == vlm.loglikelihood([]) == vlm.generate_until_multi_round([]) == []
    vlm.clean()
    assert loads == []


def test_the_report_outlives_the_model_which_is_freed(checkpoint, loads):
    vlm = models.QuantNone(pretrained=str(checkpoint("smolvlm")), device="cpu")
    vlm.task_dict = {"toy": {"test": [[message(photograph(0))]]}}
    answer(vlm, [0])
    report = vlm.report
    vlm.clean()
    assert vlm.report is report
    assert not {"model", "responder"} & set(vars(vlm))
    assert len(loads) == 1


@pytest.mark.slow
def test_an_error_at_the_first_request_ends_the_command_in_one_line(tmp_path):
    """A plan that fits no layer shows when the layers are there, which is after the tasks were found."""
    plan = tmp_path / "plan.yaml"
    plan.write_text("components: {language: 4}\nrules: [{match: no_such_layer, bits: 8}]\n")
    command = [
        *("--model", "quant_rtn", "--model_args", f"pretrained=demo,plan={plan}", "--tasks", "shapes_rec"),
        *("--limit", "1"),
    ]
    with pytest.raises(RuntimeError, match="exited with 2") as failure:
        run([str(Path(sys.executable).with_name("lmms-eval")), *command], tmp_path)
    assert "no_such_layer" in str(failure.value).splitlines()[-1]
