"""What a study is expected to take: by finished cells, and by the checkpoint's configuration."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from helpers.small_studies import CELL

from lmms_plugin.quant_backends.quantization import tensor_bytes
from lmms_plugin.study.file.grid import Cell, Resources
from lmms_plugin.study.file.tasks import describe
from lmms_plugin.study.run import cost
from lmms_plugin.study.run.weights import size

DOCUMENTS = 488


def past(
    seconds: float, method: str = "rtn", bits: int = 4, model: str = "demo", limit: int | None = None
) -> cost.Past:
    axes = {**CELL.axes.to_dict(), "method": method, "bits": bits, "model": model}
    return cost.Past({"axes": axes, "tasks": ["shapes_rec"], "limit": limit, "processes": 1}, seconds)


@pytest.mark.parametrize(
    ("finished", "expected"),
    [
        ([past(10), past(30), past(50), past(1000, bits=3), past(9, "awq")], 30),
        ([past(20, bits=3), past(40, bits=2), past(9, "awq")], 30),
        ([past(9, "awq"), past(11, "hqq")], 10),
        ([past(9, model="other"), past(9, limit=3)], None),
        ([], None),
    ],
    ids=["same bits", "same method", "same tasks", "none alike", "none"],
)
def test_seconds_are_those_of_the_cells_most_alike(finished: list[cost.Past], expected: float | None) -> None:
    assert cost.seconds(CELL, finished).value == expected


def test_without_finished_cells_the_model_that_counts_is_stated() -> None:
    one = cost.seconds(replace(CELL, limit=100), [], 10**9)
    other = cost.seconds(replace(CELL, limit=300), [], 10**9)
    assert one.value is not None
    assert other.value is not None
    assert other.value - cost.START == pytest.approx(3 * (one.value - cost.START))
    assert "not measured" in one.basis
    # The demo's test split has 488 expressions, which a limit does not make more.
    assert f"{DOCUMENTS} documents" in cost.seconds(CELL, [], 10**9).basis
    assert cost.seconds(replace(CELL, limit=10_000), [], 10**9) == cost.seconds(CELL, [], 10**9)
    assert cost.seconds(replace(CELL, tasks=("shapes_rejection_attribute_swap",)), [], 10**9).value is None


def calibrated(method: str, bits: int, seed: int = 0, **arguments: object) -> Cell:
    axes = replace(CELL.axes, method=method, bits=bits, calibration="self", seed=seed)
    given = {"pretrained": "demo", "bits": bits, "calibration": "self", "calibration_samples": 128, **arguments}
    return replace(CELL, axes=axes, backend=method, arguments=given, limit=100)


@pytest.mark.parametrize(
    ("cells", "billions", "passes"),
    [
        # Two for the prompts of the model's own answers, two for statistics, two for each search.
        ([calibrated("awq", 4), calibrated("awq", 3), calibrated("awq", 3, seed=1)], 3, [6, 2, 6]),
        ([calibrated("mbq", 4), calibrated("awq", 4), calibrated("mbq", 3)], 1, [9, 4, 2]),
        # Blocks that are quantized already are a method's own, and what finds no room is gathered by every cell.
        ([calibrated("gptaq", 4), calibrated("gptaq", 3)], 3, [6, 4]),
        ([calibrated("awq", 4), calibrated("mbq", 4), calibrated("mbq", 3)], 8, [6, 7, 4]),
        ([calibrated("awq", 4, calibration="noise"), calibrated("awq", 3, calibration="noise")], 3, [4, 2]),
    ],
    ids=["bits", "methods", "sequential", "no room", "noise"],
)
def test_what_calibrations_share_is_counted_once(cells: list[Cell], billions: int, passes: list[int]) -> None:
    shared = cost.SharedCosts()
    found = [shared.calibration(cell, billions * 10**9) for cell in cells]
    assert [one.passes for one in found] == passes
    writes = "noise" not in cells[0].arguments["calibration"]
    assert found[0].written == cost.WRITTEN_TOKENS * writes
    assert sum(one.written for one in found[1:2]) == 0
    values = [cost.seconds(cell, [], billions * 10**9, cuda=True, shared=cost.SharedCosts()).value for cell in cells]
    taken = cost.SharedCosts()
    less = [cost.seconds(cell, [], billions * 10**9, cuda=True, shared=taken).value for cell in cells]
    assert less[0] == values[0]
    alone = cost.SharedCosts().calibration(cells[1], billions * 10**9)
    each = 128 * cost.TOKENS * 2 * billions * 1e9 / cost.GPU_RATE
    spared = each * (alone.passes - passes[1]) + 128 * alone.written * cost.TOKEN_SECONDS
    assert (values[1] or 0) - (less[1] or 0) == pytest.approx(cost.IMPORTS + spared)


def test_libraries_are_imported_once_by_cells_of_one_process() -> None:
    plain, shared = replace(CELL, limit=100), cost.SharedCosts()
    apart = replace(plain, resources=Resources(processes=2))
    # A finished cell has paid, too.
    cost.seconds(plain, [past(9)], 10**9, shared=shared)
    alone, again, two = (
        cost.seconds(one, [], 10**9, shared=each).value
        for one, each in ((plain, None), (plain, shared), (apart, shared))
    )
    assert alone is not None
    assert again == pytest.approx(alone - cost.IMPORTS)
    assert two == alone


def test_documents_are_counted_here_or_as_published(local_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMMS_PLUGIN_REFCOCOPLUS", raising=False)
    describe.cache_clear()
    assert describe("refcocoplus_shift_testA_fog_3").documents == (5726,)
    monkeypatch.setenv("LMMS_PLUGIN_REFCOCOPLUS", str(local_copy))
    describe.cache_clear()
    rows = datasets.load_dataset("parquet", data_files=str(local_copy / "testA-*.parquet"), split="train")
    assert describe("refcocoplus_rec_testA").documents == (sum(len(answers) for answers in rows["answer"]),)
    describe.cache_clear()


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3),
        ("OpenGVLab/InternVL3_5-8B-HF", 8),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", 3),
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", 2.2),
        ("google/gemma-3-4b-it", 4),
        ("Salesforce/blip2-opt-2.7b", 2.7),
        ("somebody/model-4bit", None),
    ],
)
def test_a_name_tells_how_many_parameters_work(name: str, billions: float | None) -> None:
    found = size(replace(CELL, arguments={"pretrained": name, "bits": 4}), cuda=False)
    assert found.parameters == (None if billions is None else round(billions * 1e9))
    assert found.bytes is None


@pytest.mark.parametrize(
    ("bits", "parts"),
    [(16, {}), (4, {}), (3, {"vision_bits": 3, "connector_bits": 3})],
    ids=["none", "language", "all"],
)
def test_weights_take_what_loading_them_takes(bits: int, parts: dict[str, int]) -> None:
    from lmms_plugin.demo import CHECKPOINT
    from lmms_plugin.quant_backends import get
    from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
    from lmms_plugin.quant_backends.plans.plan import QuantPlan

    method = "none" if bits == 16 else "rtn"
    arguments = {"pretrained": "demo"} | ({} if bits == 16 else {"bits": bits, **parts})
    axes = replace(CELL.axes, method=method, bits=bits)
    found = size(replace(CELL, axes=axes, backend=method, arguments=arguments), cuda=False)
    loaded = load_quantized(
        CHECKPOINT, backend=get(method), plan=QuantPlan.from_arguments(bits=bits, **parts), calibration=None, seed=0
    )
    assert found.parameters == 1_898_624
    assert found.bytes == pytest.approx(tensor_bytes(loaded[0]), rel=0.03)


def test_a_checkpoint_that_is_not_here_is_of_unknown_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_thing"}))
    found = size(replace(CELL, arguments={"pretrained": str(tmp_path), "bits": 4}), cuda=False)
    assert found.bytes is None
    assert found.basis.startswith("unknown: ")
