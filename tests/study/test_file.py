"""The study file: what it comes to, and where its errors point."""

import re
import textwrap
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from lmms_plugin.quant_backends.plans import plan as plan_module
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec, Rule
from lmms_plugin.study.file.expansion import cells
from lmms_plugin.study.file.grid import Cell, CellAxes
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.file.tasks import describe
from lmms_plugin.study.run import planning
from lmms_plugin.study.verdicts import judging
from lmms_plugin.utils.reading.located import load
from lmms_plugin.utils.reading.problems import SeveralErrors, lines_of

Write = Callable[[str], Path]
SHARED = "models: [demo]\ntasks: [shapes_rec]\n"
ASKED = (
    SHARED
    + """methods: [none, rtn]
analysis:
  question: Which one
  kind: against_reference
  metrics: [ece]
"""
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(text: str) -> Path:
        file = tmp_path / "study.yaml"
        file.write_text(textwrap.dedent(text), encoding="utf-8")
        return file

    return _write


def planned(file: Path) -> list[Cell]:
    return list(cells(read(file)))


def test_a_cache_in_16_bits_is_the_models_own(write: Write) -> None:
    """Said or left out, it is one configuration: planned once, and refused under two names."""
    idle = "{method: none, kv_bits: 16, kv_image_bits: 16}"
    (cell,) = planned(write(SHARED + f"grids: [{{methods: [none]}}, {{methods: [{idle}]}}]"))
    assert (cell.axes.method, cell.model_args) == ("none", "pretrained=demo")
    with pytest.raises(ValueError, match="methods: expected every value once, got this one twice"):
        planned(write(SHARED + f"methods: [none, {idle}]"))
    quantized = "{name: images, method: none, kv_bits: 16, kv_image_bits: 4}"
    assert len(planned(write(SHARED + f"methods: [none, {quantized}]"))) == 2
    twice = write(SHARED + "methods: [none, {name: 16 bits, method: none, kv_bits: 16}]")
    with pytest.raises(ValueError, match="once, got 'none' again under the name '16 bits'"):
        planned(twice)
    with pytest.raises(ValueError, match="kv_keep says nothing without kv_bits"):
        planned(write(SHARED + "methods: [{method: none, kv_bits: 16, kv_keep: 4+4}]"))


def test_axes_that_do_not_apply_collapse(write: Write) -> None:
    found = planned(
        write(
            SHARED
            + """
methods: [none, rtn, awq]
bits: [4, 3]
calibration: [noise, demo]
seeds: [0, 1, 2]
"""
        )
    )
    assert [cell.axes for cell in found if cell.backend == "none"] == [
        CellAxes("demo", "none", 16, None, None, None, None)
    ]
    assert [cell.axes for cell in found if cell.backend == "rtn"] == [
        CellAxes("demo", "rtn", bits, 128, "language", None, None) for bits in (4, 3)
    ]
    assert len([cell for cell in found if cell.backend == "awq"]) == 2 * 2 * 3
    assert len({cell.question for cell in found}) == len(found) == 1 + 2 + 12


def test_a_cell_of_two_grids_is_planned_once(write: Write) -> None:
    found = planned(write(SHARED + "grids: [{methods: [none, rtn]}, {methods: [none, hqq]}]"))
    assert [cell.axes.method for cell in found] == ["none", "rtn", "hqq"]


def test_a_cell_is_planned_once_whatever_the_order_of_its_tasks(write: Write) -> None:
    tasks = "[[shapes_rec, shapes_shift_fog_3], [shapes_shift_fog_3, shapes_rec], [shapes_rec]]"
    found = planned(write(f"models: [demo]\nmethods: [rtn]\ntasks: {tasks}\n"))
    assert [cell.tasks for cell in found] == [("shapes_rec", "shapes_shift_fog_3"), ("shapes_rec",)]


def test_seeds_of_sampling_apply_without_calibration(write: Write) -> None:
    found = planned(write(SHARED + "methods: [none, rtn]\nseeds: [3, 5]\nmodel_args: {samples: 4}"))
    assert [(cell.axes.method, cell.axes.seed) for cell in found] == [("none", 3), ("none", 5), ("rtn", 3), ("rtn", 5)]
    assert all(cell.arguments["seed"] == cell.axes.seed for cell in found)


def test_grids_say_otherwise_than_the_top_of_the_file(write: Write) -> None:
    found = planned(
        write(
            SHARED
            + """
bits: [8, 4]
limit: 7
grids:
  - methods: [rtn]
  - {methods: [hqq], bits: [3], limit: null, tasks: [shapes_rec, shapes_shift]}
cells:
  - {method: awq, bits: 2, calibration: noise, seed: 9}
"""
        )
    )
    assert [(cell.axes.method, cell.axes.bits, cell.limit) for cell in found] == [
        ("rtn", 8, 7),
        ("rtn", 4, 7),
        ("hqq", 3, None),
        ("awq", 2, 7),
    ]
    assert found[2].tasks == ("shapes_rec", "shapes_shift")
    assert found[3].axes.seed == 9
    assert found[3].axes.calibration == "noise"


@pytest.mark.parametrize(
    ("components", "name", "arguments"),
    [
        ("language", "language", {"bits": 3}),
        ("vision", "vision", {"bits": 3, "vision_bits": 3, "language_bits": 16}),
        ("all", "all", {"bits": 3, "vision_bits": 3, "connector_bits": 3}),
        ("language+head", "language+head", {"bits": 3, "head_bits": 3}),
        (
            "{vision: 4, connector: 16, language: 8}",
            "vision4-connector16-language8",
            {"vision_bits": 4, "connector_bits": 16, "language_bits": 8, "head_bits": 16},
        ),
    ],
)
def test_components(write: Write, components: str, name: str, arguments: dict[str, int]) -> None:
    (cell,) = planned(write(SHARED + f"methods: [rtn]\nbits: [3]\ncomponents: [{components!s}]"))
    assert cell.axes.components == name
    assert {key: value for key, value in cell.arguments.items() if key.endswith("bits")} == arguments
    assert cell.axes.bits == (None if ":" in components else 3)


def test_components_with_bits_of_their_own_take_none_of_the_axis(write: Write) -> None:
    found = planned(write(SHARED + "methods: [rtn]\nbits: [8, 4]\ncomponents: [language, {vision: 4, language: 8}]"))
    assert [cell.axes.bits for cell in found] == [8, 4, None]


def test_a_format_takes_neither_bits_nor_groups_of_the_axes(write: Write) -> None:
    methods = "methods: [rtn, {method: rtn, name: nvfp4, format: nvfp4}, {method: rtn, name: fp8, format: fp8_e4m3}]"
    found = planned(write(SHARED + f"{methods}\nbits: [4, 3]\ngroup_sizes: [64, 128]\n"))
    assert [(cell.axes.method, cell.axes.bits, cell.axes.group_size) for cell in found] == [
        *(("rtn", bits, size) for bits in (4, 3) for size in (64, 128)),
        ("nvfp4", 4, None),
        ("fp8", 8, None),
    ]
    assert found[-1].model_args == "pretrained=demo,format=fp8_e4m3,bits=8"
    with pytest.raises(ValueError, match=r"unknown format 'nvfp5'.*\(method bad\)"):
        planned(write(SHARED + "methods: [{method: rtn, name: bad, format: nvfp5}]"))


def test_exclusions_drop_cells_or_tasks(write: Write) -> None:
    found = planned(
        write(
            """
models: [demo]
tasks: [shapes_rec, shapes_shift]
methods: [quanto, rtn]
bits: [4, 3]
exclude:
  - {method: quanto, bits: 3}
  - {method: rtn, bits: [3, 2], task: shapes_shift}
"""
        )
    )
    assert [(cell.axes.method, cell.axes.bits, cell.tasks) for cell in found] == [
        ("quanto", 4, ("shapes_rec", "shapes_shift")),
        ("rtn", 4, ("shapes_rec", "shapes_shift")),
        ("rtn", 3, ("shapes_rec",)),
    ]


def test_lists_of_tasks_are_processes_of_their_own(write: Write) -> None:
    found = planned(write("models: [demo]\nmethods: [none]\ntasks: [[shapes_rec], [shapes_shift, shapes_shift_text]]"))
    assert [cell.tasks for cell in found] == [("shapes_rec",), ("shapes_shift", "shapes_shift_text")]


def test_shifts_that_move_boxes_are_tasks_like_any_other(write: Write) -> None:
    tasks = "shapes_rec, shapes_geometry, shapes_shift_zoom_blur_5"
    (cell,) = planned(write(f"models: [demo]\nmethods: [none]\ntasks: [[{tasks}]]"))
    assert cell.tasks == ("shapes_rec", "shapes_geometry", "shapes_shift_zoom_blur_5")
    assert describe("shapes_geometry").documents == (488,) * 10


def test_options_and_names_of_methods_and_models(write: Write) -> None:
    found = planned(
        write(
            """
models: [{name: small, pretrained: demo, max_pixels: 4096}]
tasks: [shapes_rec]
methods: [{method: awq, clip: true}, {method: awq, name: clipped, clip: true}]
calibration: [{name: few, source: noise, samples: 4}]
analysis: {kind: components, question: Which one, metrics: [ece]}
"""
        )
    )
    assert [cell.axes.method for cell in found] == ["awq+clip=True", "clipped"]
    assert found[0].axes.model == "small"
    assert found[0].axes.calibration == "few"
    assert found[0].model_args == (
        "pretrained=demo,max_pixels=4096,clip=True,bits=4,group_size=128,calibration=noise,calibration_samples=4,seed=0"
    )


def test_the_analysis_is_checked_where_it_stands(write: Write) -> None:
    study = read(write(SHARED + "methods: [none]\nanalysis: {kind: components, question: Which one, metrics: [ece]}"))
    assert study.analysis == {"kind": "components", "question": "Which one", "metrics": ["ece"]}
    with pytest.raises(
        ValueError, match=r"study\.yaml:4:51: analysis: unknown setting 'metric', did you mean 'metrics'"
    ):
        read(write(SHARED + "methods: [none]\nanalysis: {kind: components, question: Which one, metric: [ece]}"))


@pytest.mark.parametrize(
    ("change", "place", "said"),
    [
        (("metrics: [ece]", "metrics: [ece]\n  tasks: [shape_rec]"), "8:10", "did you mean 'shapes_rec'?"),
        (("metrics: [ece]", "metrics: [rejection_auroc]"), "7:12", "a metric of the tasks, got 'rejection_auroc'"),
        (("tasks: [shapes_rec]", "tasks: [[shapes_rec], [shapes_shift_fog_3]]"), "5:3", "that answers all tasks"),
        (("tasks: [shapes_rec]", "tasks: [shapes_rec, reliable_advqa]"), "2:8", "set LMMS_PLUGIN_ADVQA"),
        (("methods: [none, rtn]", "methods: [rtn]"), "5:3", "one cell with the unquantized model"),
        (
            ("methods: [none, rtn]", "methods: [none, rtn]\nexclude: [{method: rtn, task: shapes_shift_fog_3}]"),
            "6:3",
            "expected the tasks of the unquantized model in every cell",
        ),
    ],
)
def test_a_plan_says_where_something_is_asked_that_there_is_not(
    write: Write, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], place: str, said: str
) -> None:
    monkeypatch.delenv("LMMS_PLUGIN_ADVQA", raising=False)
    describe.cache_clear()
    text = ASKED if "exclude" not in change[1] else ASKED.replace("[shapes_rec]", "[shapes_rec, shapes_shift_fog_3]")
    file = write(text.replace(*change))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        planning.plan(read(file))
    assert str(caught.value).startswith(f"{file}:{place}: ")


def test_lists_of_bits_by_component_are_multiplied(write: Write) -> None:
    bits = "{vision: [4, 16], connector: 8, language: [3, 16]}"
    found = planned(write(SHARED + f"methods: [rtn]\ncomponents: [{bits}]"))
    names = ["vision4-connector8-language3", "vision4-connector8-language16"]
    names += ["vision16-connector8-language3", "vision16-connector8-language16"]
    assert [cell.axes.components for cell in found] == names
    # Without quantization the method is none: the corner of 16 bits everywhere is no cell of rtn.
    corner = planned(write(SHARED + "methods: [rtn]\ncomponents: [{vision: [4, 16], language: [16]}]"))
    assert [cell.axes.components for cell in corner] == ["vision4-language16"]
    with pytest.raises(ValueError, match="without quantization the method is none"):
        planned(write(SHARED + "methods: [rtn]\ncomponents: [{vision: 16}]"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("methods: [none]", "methods: [hqq]"), r"one cell with the unquantized model \(method none\) for demo, got 0"),
        (("plain: {method: rtn}", "plain: {method: [rtn, hqq]}"), "'plain': expected method of a cell .*, got 'hqq'"),
        (("plain: {method: rtn}", "plain: {method: hqq}"), "no cell belongs to arm 'plain'"),
        (
            ("bits: [4]", "components: [{vision: 4, language: 8}]"),
            "one number of bits in arm 'plain', got rtn of vision4-language8",
        ),
        (("bits: [4]", "bits: [4, 3]"), "same bits in 'aware' and 'plain', got 4 and 3, 4"),
        (
            ("shifted: [shapes_shift_fog_3]", "shifted: [shapes_shift_fog_5]"),
            "expected task shapes_shift_fog_5 in every",
        ),
    ],
)
def test_an_analysis_that_the_study_cannot_answer_is_refused_before_it_runs(write, change, message) -> None:
    text = """models: [demo]
tasks: [shapes_rec, shapes_shift_fog_3]
grids:
  - methods: [none]
  - methods: [rtn]
    bits: [4]
  - methods: [awq]
    bits: [ 4 ]
analysis:
  question: Which?
  clean: shapes_rec
  shifted: [shapes_shift_fog_3]
  arms:
    aware: {method: awq}
    plain: {method: rtn}
  contrasts: [[aware, plain]]
"""
    good = read(write(text))
    judging.expect(good.analysis, planned(write(text)))
    bad = write(text.replace(*change))
    with pytest.raises(ValueError, match=message):
        judging.expect(read(bad).analysis, planned(bad))


def test_a_mapping_says_otherwise_than_what_it_takes_over(write: Write) -> None:
    found = planned(
        write(
            SHARED
            + """
grids:
  - &rtn {methods: [rtn], bits: [4], group_sizes: [64]}
  - &hqq {<<: *rtn, methods: [hqq]}
  - {bits: [3], <<: [*hqq, {group_sizes: [32], limit: 5}]}
analysis: {kind: components, question: Which one, metrics: [ece]}
"""
        )
    )
    axes = [(cell.axes.method, cell.axes.bits, cell.axes.group_size, cell.limit) for cell in found]
    assert axes == [("rtn", 4, 64, None), ("hqq", 4, 64, None), ("hqq", 3, 64, 5)]


def test_paths_are_named_in_full(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("skip: ['head$']\n")
    monkeypatch.chdir(tmp_path)
    (cell,) = planned(write(SHARED + "methods: [rtn]\nmodel_args: {plan: plan.yaml}"))
    assert cell.arguments["plan"] == str(plan)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("", "1:1", "an empty file"),
        ("models: [demo\n", "2:1", "expected YAML"),
        ("modles: [demo]", "1:1", "did you mean 'models'?"),
        ("models: [demo]\nmodels: [demo]", "2:1", "'models' twice"),
        (SHARED + "grids: [&a {methods: [rtn]}, {<<: *a, bits: [3], bits: [4]}]", "3:50", "'bits' twice"),
        (SHARED + "grids: [{<<: 3, methods: [rtn]}]", "3:14", "a mapping to take over"),
        ("models: [demo]\ntasks: [shapes_rec]", "1:1", "'methods'"),
        (SHARED + "methods: [rtn, aqw]", "3:16", "did you mean 'awq'?"),
        (SHARED + "methods: [rtn]\nbits: [4, 9]", "4:11", "bits must be an integer from 2 to 8"),
        (SHARED + "methods: [rtn]\nbits: [4, 4]", "4:11", "twice"),
        (SHARED + "methods: [rtn]\nbits: []", "4:7", "bits must be a list of at least 1, got []"),
        (SHARED + "methods: [quanto]\nbits: [4, 3]", "4:11", "quanto cannot quantize to 3 bits"),
        (SHARED + "methods: [rtn]\ngroup_sizes: [0]", "4:15", "a whole number of columns"),
        (SHARED + "methods: [rtn]\ncomponents: [visoin]", "4:14", "did you mean 'vision'?"),
        (SHARED + "methods: [rtn]\ncomponents: [{visoin: 4}]", "4:15", "did you mean 'vision'?"),
        (SHARED + "methods: [awq]\ncalibration: [nose]", "4:15", "did you mean 'noise'?"),
        (SHARED + "methods: [awq]\ncalibration: [none]", "4:15", "a source of calibration inputs"),
        (SHARED + "methods: [awq]\nseeds: [0, -1]", "4:12", "a whole number from 0, got -1"),
        (SHARED + "methods: [rtn]\nlimit: 0", "4:8", "a whole number from 1, got 0"),
        (SHARED + "methods: [rtn]\nimages: 0", "4:9", "images must be a whole number from 1 to 9"),
        (SHARED + f"methods: [rtn]\nimages: {10**20}", "4:9", "images must be a whole number from 1 to 9"),
        (ASKED + f"  seed: {10**18}", "8:9", "seed must be a whole number from 0 to 9"),
        (SHARED + "methods: [rtn]\nmodel_args: {bits: 3}", "4:20", "no axis of the study"),
        (SHARED + "methods: [rtn]\nmodel_args: {system_prompt: 'a, b'}", "4:29", "without commas"),
        (SHARED + "methods: [{method: awq, clap: 1}]", "3:31", "did you mean 'clip'?"),
        (SHARED + "methods: [{method: rtn, clip: 1}]", "3:31", "an option of a method"),
        (SHARED + "methods: [rtn]\nmodel_args: {max_pixls: 3}", "4:25", "did you mean 'max_pixels'?"),
        (
            SHARED + "methods: [rtn]\nmodel_args: {samples: x}",
            "",
            "samples must be 0 or at least 2, which can agree, got 'x'",
        ),
        (SHARED + "methods: [rtn]\nexclude: [{method: awq}]", "4:11", "got none that fits"),
        (SHARED + "methods: [rtn]\nexclude: [{method: rtn}]", "", "at least one cell"),
        (SHARED + "methods: [rtn]\nresources: {gpus: 3, processes: 2}", "4:19", "as many GPUs"),
        (SHARED + "cells: [{method: [rtn, awq]}]", "3:18", "one value in a cell"),
        (SHARED + "methods: [rtn]\nmodel_args: {plan: 5}", "4:20", "a text, got 5"),
        ("models: [{pretrained: 7}]\ntasks: [shapes_rec]\nmethods: [rtn]", "1:23", "a text, got 7"),
        ("models: [a/demo, b/demo]\ntasks: [shapes_rec]\nmethods: [rtn]", "1:18", "two called 'demo'"),
        (
            SHARED + "methods: [awq]\ncalibration: [{source: self, samples: 16}, {source: self, samples: 128}]",
            "4:44",
            "two called 'self'",
        ),
        (
            SHARED + "grids: [{methods: [rtn]}, {methods: [rtn], model_args: {max_pixels: 4096}}]",
            "3:27",
            "differ in axes, tasks or limit",
        ),
        ("models: [demo]\nmethods: [rtn]\ntasks:\n  - shapes_rec\n  - 5", "5:5", "a task, or a list of tasks, got 5"),
        (
            SHARED + "methods: [rtn]\nresources: {gpus: true}",
            "4:19",
            "gpus must be a whole number from 0, or 'auto', got True",
        ),
        (SHARED + "methods: [rtn]\nresources: {timout: 3}", "4:13", "did you mean 'timeout'?"),
        (SHARED + "methods: [rtn]\nbatch_size: many", "4:13", "batch_size must be a whole number from 1, or 'auto'"),
        (SHARED + "methods: [rtn]\nexclude: [{methods: rtn}]", "4:12", "did you mean 'method'?"),
        (SHARED + "methods: [rtn]\nexclude: [{}]", "4:11", "got nothing"),
        (SHARED + "grids:\n  - methods: [rtn]\n    bits: [4, true]", "5:15", "bits must be an integer from 2 to 8"),
        (SHARED + "grids: [5]", "3:9", "expected a mapping with models, methods, bits"),
        (SHARED + "cells: [{method: rtn, bit: 3}]", "3:23", "did you mean 'bits'?"),
        (SHARED + "methods: [{name: a}]", "3:11", "methods: method is missing"),
        ("models: [{name: a}]\ntasks: [shapes_rec]\nmethods: [rtn]", "1:10", "models: pretrained is missing"),
        (SHARED + "methods: [awq]\ncalibration: [{source: self, sampls: 3}]", "4:30", "did you mean 'samples'?"),
        (SHARED + "methods: [rtn]\ncomponents: [{language: [4, 9]}]", "4:29", "language must be an integer from 2"),
        (SHARED + "methods: [rtn]\n5: 3", "4:1", "must be a name, got 5"),
        (SHARED + "methods: [rtn]\nanalysis: 5", "4:11", "expected a mapping, got 5"),
        (ASKED + "  resamples: 0", "8:14", "a whole number from 1 to 1000000, got 0"),
        (ASKED + "  level: 1.5", "8:10", "a number in (0.5, 1), got 1.5"),
        (ASKED + "  margin: a lot", "8:11", "a number above 0, got 'a lot'"),
        (ASKED + "  estimator: nonsense", "8:14", "an estimator of"),
        (ASKED.replace("[ece]", "[nonsense]"), "7:13", "got 'nonsense'"),
        (ASKED.replace("against_reference", "[a]"), "6:9", "expected one of method_by_shift"),
        ("models: [./nowhere/at/all]\ntasks: [shapes_rec]\nmethods: [rtn]", "", "there is no folder"),
    ],
)
def test_errors_point_at_their_place(write: Write, text: str, place: str, said: str) -> None:
    file = write(text)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        planned(file)
    assert str(caught.value).startswith(f"{file}:{place}")


def test_all_errors_are_told_at_once_in_the_order_of_the_file(write: Write) -> None:
    file = write(
        """\
models: [demo]
tasks: [shapes_rec]
methods: [rtn, aqw]
bits: [4, 9]
componets: [all]
exclude: [{metod: rtn}]
analysis: {kind: components, question: Which one, metrics: [ece], resampels: 0, seed: -1}
"""
    )
    with pytest.raises(SeveralErrors) as caught:
        read(file)
    told = [line.removeprefix(f"{file}:").split(": ", 1) for line in lines_of(caught.value)]
    assert [place for place, _ in told] == ["3:16", "4:11", "5:1", "6:12", "7:67", "7:87"]
    hints = ("'awq'", "", "'components'", "'method'", "'resamples'", "")
    for (_, line), hint in zip(told, hints, strict=True):
        assert line.count("did you mean") == bool(hint)
        assert hint in line


def test_cells_that_cannot_run_are_told_at_once(write: Write) -> None:
    file = write(SHARED + "methods: [quanto, hqq]\nbits: [3, 7, 4]\nexclude: [{method: awq}]")
    with pytest.raises(SeveralErrors) as caught:
        planned(file)
    told = lines_of(caught.value)
    assert [line.removeprefix(f"{file}:").split(": ")[0] for line in told] == ["4:8", "4:11", "4:11", "5:11"]
    assert ["quanto" in line for line in told] == [True, True, False, False]


def test_every_grid_without_an_axis_is_told(write: Write) -> None:
    with pytest.raises(SeveralErrors, match=r":2:9: expected 'methods' .*\n.*:2:22: expected 'methods'"):
        read(write("models: [demo]\ngrids: [{bits: [3]}, {bits: [4]}]\ntasks: [shapes_rec]"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read(tmp_path / "nothing.yaml")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefghij")
)
READERS = {
    "study": read,
    "plan": lambda file: QuantPlan.from_yaml(file, default=QuantSpec(4)),
    "any": lambda file: load(file).plain(),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("rules: [{match: a, bits: 4}]\nrules: [{match: b, bits: 4}]", "2:1: .*'rules' twice"),
        ("rules: [{match: a, match: b}]", "1:20: .*'match' twice"),
        ("yes: 1\ntrue: 2", "2:1: .*twice"),
        (BOMB, "at most 100000 values"),
        ("a: &a [x]\n? *a\n: 1", "2:3: expected a name|1:4: expected a name"),
        ("? [a, b]\n: 1", "1:3: expected a name"),
        ("a: &a [*a]", "hold itself"),
        ("a: &a {b: *a}", "hold itself"),
        ("[" * 5000, "deep"),
        ("a: " + "[" * 101 + "]" * 101, "nested at most 100 deep"),
        ("a: !!bool x", "1:4: expected a value of the type bool, got 'x'"),
        ("b: 1\na: [!!int '']", "2:5: expected a value of the type int, got ''"),
        ("a: !!timestamp x", "1:4: expected a value of the type timestamp, got 'x'"),
        ("a: !!float x", "1:4: expected a value of the type float, got 'x'"),
        ("a: 2024-99-99", "1:4: expected a value of the type timestamp"),
        ("a: " + "9" * 5000, "1:4: expected a value of the type int"),
        ("a: !!python/object:os.system x", "1:4: expected YAML: could not determine a constructor"),
        ("a: !thing x", "1:4: expected YAML: could not determine a constructor"),
        ("{<<: 3}", "1:6: expected a mapping to take over, or a list of mappings, got 3"),
        ("a: 1\n---\nb: 2", "2:1: expected YAML"),
        ("a: \x00", "expected YAML: unacceptable character"),
        ("rules:\n".encode("utf-16"), "expected text in UTF-8, got invalid start byte at byte 0"),
        ("a: ü".encode("latin-1"), "expected text in UTF-8"),
        (b"#" * (5 << 20), "at most 4194304 bytes"),
        ("", "1:1: expected a mapping, got an empty file"),
    ],
)
def test_every_yaml_is_read_by_one_reader_that_refuses_in_one_short_line(tmp_path, reader, content, told):
    file = tmp_path / "file.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=told) as refused:
        reader(file)
    message = str(refused.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    assert len(message) < 500


def test_aliases_and_merges_of_moderate_size_are_taken(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [*a, {z: 4}]}\n")
    found = load(file).plain()
    assert found["b"] == {"x": 1, "y": 3}
    assert found["c"] == {"x": 1, "y": 2, "z": 4}


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "^(a|aa|aaa)+$"])
def test_a_pattern_that_backtracks_for_ever_is_refused_in_time(monkeypatch, pattern):
    monkeypatch.setattr(plan_module, "MOST_SECONDS", 0.1)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"took more than 0.1 s on 'aaa"):
        Rule(pattern, None).matches("a" * 60 + "b")
    assert time.monotonic() - began < 20


def test_a_pattern_is_no_book():
    with pytest.raises(ValueError, match="longer than 1000 letters"):
        Rule("a" * 1001, None)
