"""The border to lmms-eval, with the real TaskManager and model registry."""

from functools import partial
from importlib import import_module

import pytest
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager

from lmms_plugin import quant_backends, registration
from lmms_plugin.shifts.image.corruptions import SHIFTS
from lmms_plugin.shifts.image.moving import MOVING
from lmms_plugin.shifts.language.rewording import TEXT_SHIFTS
from lmms_plugin.tasks.grounding import language_shifts
from lmms_plugin.tasks.registry import catalogue, cells, task_files
from lmms_plugin.utils.copies import DatasetError


@pytest.fixture(scope="module")
def manager():
    return TaskManager()


@pytest.fixture
def loguru_messages():
    from loguru import logger

    messages = []
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING")
    yield messages
    logger.remove(sink)


def test_every_backend_is_a_chat_model():
    for backend in quant_backends.names():
        resolved = MODEL_REGISTRY_V2.resolve(quant_backends.model_name(backend))
        assert resolved.model_type == "chat"


def test_tasks_are_indexed_without_include_path(manager):
    listed = {task.name for task in catalogue.tasks(cells=True)}
    assert listed <= set(manager.all_tasks)
    assert {"refcocoplus_rec_testA", "refcocoplus_shift", "shapes_rec", "shapes_shift"} <= listed
    assert {"reliable_vqa", "reliable_vqav2", "reliable_advqa", "reliable_vizwiz", "reliable_vqav2_advqa_10"} <= listed
    count = 5 * (len(SHIFTS) + len(MOVING) + len(TEXT_SHIFTS) + len(SHIFTS) * len(TEXT_SHIFTS))
    assert len([name for name in listed if name.startswith("refcocoplus_shift_testB_")]) == count
    assert {"refcocoplus_shift_testA_casing_5", "shapes_shift_fog_and_synonyms_1", "shapes_rejection"} <= listed
    assert {"refcocoplus_rejection_val_absent_object", "shapes_rejection_attribute_swap_fog_3"} <= listed
    assert {"refcocoplus_geometry", "refcocoplus_c", "shapes_c", "shapes_shift_crop_1"} <= listed


def test_every_listed_task_tells_the_split_that_is_read(manager):
    summaries = {task.name: task.summary for task in catalogue.tasks() if task.kind == "task"}
    assert [summary for summary in summaries.values() if "split None" in summary] == []
    for name in ("coco_caption_val2017", "coco_caption_val2017_fog_3", "flickr30k_retrieval_pool20", "shapes_rec"):
        assert summaries[name].endswith(f", split {manager._get_config(name)['test_split']}")
    assert summaries["coco_caption_val2017"] == "coco_caption, split val"


def named(value):
    """A value with the functions that a task's YAML names in their places, and other functions by their names."""
    if isinstance(value, task_files.Function):
        module, _, attribute = value.rpartition(".")
        value = getattr(import_module(module), attribute)
    if isinstance(value, dict):
        return {key: named(one) for key, one in value.items()}
    if isinstance(value, list):
        return [named(one) for one in value]
    if isinstance(value, partial):
        return [named(value.func), value.args, value.keywords]
    return f"{value.__module__}.{value.__name__}" if hasattr(value, "__name__") else value


def test_task_files_say_what_lmms_eval_reads(manager):
    generated = [name for name, source in task_files.sources().items() if source.generated]
    compared = set()
    for name in [*(task_files.sources().keys() - set(generated)), *generated[::97]]:
        source = task_files.sources()[name]
        assert manager.task_index[name]["type"] == source.kind
        try:
            expected = manager._get_config(name)
        # Without a local copy of its dataset lmms-eval cannot read it.
        except (DatasetError, ImportError):
            continue
        assert named(dict(source.configuration)) == named(expected), name
        compared.add(name)
    assert compared >= {"refcocoplus_rec_testA", "shapes_rec", "coco_caption_val2017_fog_3", *generated[::97]}


def test_no_name_collides_with_a_built_in_task(manager):
    ours = {task.name for task in catalogue.tasks(cells=True)}
    for name in ours:
        assert registration.tasks_folder() in manager.task_index[name]["yaml_path"], name


def test_simple_evaluate_users_may_name_the_folder_too():
    index = TaskManager(include_path=registration.tasks_folder(), include_defaults=False).task_index
    assert "shapes_rec" in index


@pytest.mark.parametrize("arguments", [["--tasks", "shapes_rec"], ["--tasks=shapes_shift_fog_3"]], ids=["rec", "cell"])
def test_a_folder_that_hides_a_task_is_refused(tmp_path, monkeypatch, arguments):
    name = arguments[-1].removeprefix("--tasks=")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lmms-eval", "--model", "quant_none", *arguments])
    TaskManager(include_defaults=False)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"--tasks {name}: expected the task, but .* the folder {tmp_path / name}"):
        TaskManager(include_defaults=False)


def test_a_folder_of_tasks_is_no_task(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lmms-eval", "--tasks", "mine"])
    TaskManager(include_defaults=False)


def test_registering_twice_wraps_once():
    before = TaskManager.initialize_tasks
    registration.make_tasks_visible()
    assert TaskManager.initialize_tasks is before


def test_a_cell_is_its_template_and_four_keys(manager, monkeypatch):
    monkeypatch.delenv("LMMS_PLUGIN_REFCOCOPLUS", raising=False)
    clean = manager._get_config("refcocoplus_rec_testB")
    cell = manager._get_config("refcocoplus_shift_testB_gaussian_noise_3")
    different = {key for key in cell if key not in clean or _comparable(cell[key]) != _comparable(clean[key])}
    assert different == {"task", "lmms_eval_specific_kwargs", "metadata"}
    assert cell["test_split"] == clean["test_split"] == "testB"
    assert cell["lmms_eval_specific_kwargs"]["default"] == {"shift": "gaussian_noise", "severity": 3}


def test_a_joint_cell_shifts_image_and_language(manager, monkeypatch):
    monkeypatch.delenv("LMMS_PLUGIN_REFCOCOPLUS", raising=False)
    clean = manager._get_config("refcocoplus_rec_testB")
    cell = manager._get_config("refcocoplus_shift_testB_fog_and_casing_2")
    different = {key for key in cell if key not in clean or _comparable(cell[key]) != _comparable(clean[key])}
    assert different == {"task", "lmms_eval_specific_kwargs", "metadata", "process_docs", "process_results"}
    place = {"shift": "fog", "severity": 2, "text_shift": "casing", "text_severity": 2}
    assert cell["metadata"] == {"version": 1.0, **place}
    assert cell["process_docs"] == language_shifts.Reworded("casing", 2)


def test_a_rejection_task_has_its_own_metrics(manager):
    cell = manager._get_config("shapes_rejection_attribute_swap_fog_3")
    assert cell["lmms_eval_specific_kwargs"]["default"]["shift"] == "fog"
    assert {"rejection_auroc", "confidence_falls"} <= {entry["metric"] for entry in cell["metric_list"]}
    assert "mean_iou" not in {entry["metric"] for entry in cell["metric_list"]}


def test_group_members_exist(manager):
    for name, entry in cells.entries().items():
        if entry.kind == "group":
            members = manager._get_config(name)["task"]
            assert len(members) == len(set(members))
            assert set(members) <= set(manager.all_tasks)


def test_shift_group_is_clean_and_every_corruption_at_severity_three(manager):
    members = manager._get_config("refcocoplus_shift")["task"]
    assert members == [
        "refcocoplus_rec_testA",
        "refcocoplus_rec_testB",
        "refcocoplus_shift_testA",
        "refcocoplus_shift_testB",
    ]
    shifted = manager._get_config("refcocoplus_shift_testA")["task"]
    assert shifted == [f"refcocoplus_shift_testA_{shift}_3" for shift in SHIFTS]


def test_unreachable_hub_says_how_to_go_on(manager, monkeypatch):
    monkeypatch.delenv("LMMS_PLUGIN_REFCOCOPLUS", raising=False)
    monkeypatch.setattr("lmms_eval.api.task.ConfigurableTask.download.retry.sleep", lambda _: None)
    with pytest.raises(
        DatasetError, match=r"cannot load lmms-lab-encoder/RefCOCOplus.*LMMS_PLUGIN_REFCOCOPLUS.*shapes_rec"
    ):
        manager.load_task_or_group(["refcocoplus_rec_testA"], "chat")


def test_missing_local_copy_is_one_clear_error(manager, monkeypatch):
    monkeypatch.setenv("LMMS_PLUGIN_REFCOCOPLUS", "/nowhere")
    with pytest.raises(DatasetError, match=r"LMMS_PLUGIN_REFCOCOPLUS=/nowhere: there is no such folder"):
        manager.load_task_or_group(["refcocoplus_rec_testA"], "chat")


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ("reliable_vqav2", r"reliable_vqav2.*LMMS_PLUGIN_VQAV2"),
        ("reliable_advqa", r"AdVQA: no copy on the hub.*LMMS_PLUGIN_ADVQA"),
        ("reliable_vqav2_advqa_33", r"reliable_vqav2_advqa_33.*LMMS_PLUGIN_VQAV2"),
    ],
)
def test_vqa_that_cannot_be_reached_says_how_to_go_on(task, problem, manager, monkeypatch):
    for dataset in ("VQAV2", "ADVQA"):
        monkeypatch.delenv(f"LMMS_PLUGIN_{dataset}", raising=False)
    monkeypatch.setattr("lmms_eval.api.task.ConfigurableTask.download.retry.sleep", lambda _: None)
    with pytest.raises(DatasetError, match=problem):
        manager.load_task_or_group([task], "chat")


@pytest.mark.parametrize(
    ("task", "hub_id", "variable"),
    [
        ("dior_rsvg", "danielz01/DIOR-RSVG", "DIOR_RSVG"),
        ("groundingme_rejection", "lirang04/GroundingME", "GROUNDINGME"),
        ("refcoco_rec", "lmms-lab-encoder/RefCOCO", "REFCOCO"),
    ],
)
def test_a_natural_shift_that_cannot_be_reached_says_how_to_go_on(task, hub_id, variable, manager, monkeypatch):
    monkeypatch.delenv(f"LMMS_PLUGIN_{variable}", raising=False)
    monkeypatch.setattr("lmms_eval.api.task.ConfigurableTask.download.retry.sleep", lambda _: None)
    with pytest.raises(DatasetError, match=rf"{task}.*cannot load {hub_id}: .*LMMS_PLUGIN_{variable} .*columns image"):
        manager.load_task_or_group([task], "chat")


def test_a_natural_shift_without_a_copy_on_the_hub_says_how_to_make_one(manager, monkeypatch):
    monkeypatch.delenv("LMMS_PLUGIN_REFDRONE", raising=False)
    with pytest.raises(
        DatasetError, match=r"RefDrone: no copy on the hub.*bboxes.*sources\.published_files refdrone --help"
    ):
        manager.load_task_or_group(["refdrone_rejection"], "chat")


def test_changed_task_manager_is_left_alone_with_a_warning(monkeypatch, loguru_messages):
    class Changed:
        def initialize_tasks(self, somewhere_else):
            return {}

    monkeypatch.setattr("lmms_eval.tasks.TaskManager", Changed)
    before = Changed.initialize_tasks
    registration.make_tasks_visible()
    assert Changed.initialize_tasks is before
    assert any("--include_path" in message for message in loguru_messages)


def test_untested_version_is_a_warning_that_says_what_works(monkeypatch, loguru_messages):
    monkeypatch.setattr(registration, "version", lambda _: "0.8.1")
    names = [manifest.model_id for manifest in registration.manifests()]
    assert "quant_awq" in names
    assert any("found 0.8.1" in m and "quant_*" in m and "--include_path" in m for m in loguru_messages)


def _comparable(value):
    """YAML is read anew for every task, so functions are compared by what they are, not by identity."""
    if isinstance(value, list):
        return [_comparable(v) for v in value]
    if isinstance(value, dict):
        return {key: _comparable(v) for key, v in value.items()}
    return getattr(value, "func", value)
