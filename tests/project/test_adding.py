"""What docs/adding.md shows works as it stands there.

Its quantizer is tested in quant_backends/methods/test_third_party.py.
"""

import inspect
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from lmms_eval.tasks import TaskManager
from PIL import Image

from lmms_plugin.protocol.boxes import Box
from lmms_plugin.quant_backends.backend import CalibratedBackend
from lmms_plugin.registration import tasks_folder
from lmms_plugin.shifts.image import corruptions, moving

pytestmark = pytest.mark.usefixtures("registered")
PAGE = (Path(__file__).parents[2] / "docs" / "adding.md").read_text(encoding="utf-8")


def snippet(language, holding):
    (found,) = (code for code in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if holding in code)
    return found


def test_a_method_that_looks_at_data_implements_what_the_page_says():
    for name in sorted(CalibratedBackend.__abstractmethods__):
        _, *arguments = inspect.signature(getattr(CalibratedBackend, name)).parameters
        assert f"`{name}({', '.join(arguments)})`" in PAGE


def test_a_shift_is_one_function(monkeypatch):
    monkeypatch.setattr(corruptions, "SHIFTS", dict(corruptions.SHIFTS))
    exec(snippet("python", "@shift"), {})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    levels = [
        len(np.unique(np.asarray(corruptions.apply(image, "posterize", severity, "x")))) for severity in (1, 3, 5)
    ]
    assert levels[0] > levels[1] > levels[2] == 4


def test_a_moving_shift_is_one_function(monkeypatch):
    monkeypatch.setattr(moving, "MOVING", dict(moving.MOVING))
    exec(snippet("python", "@moving_shift"), {})
    moved = moving.movement((100, 50), "squeeze", 5, "x")
    assert moved.size == (60, 50)
    assert moved.box((10, 10, 20, 20)) == pytest.approx((6, 10, 12, 20))


def test_a_family_is_one_entry():
    names = {}
    exec(snippet("python", "Dialect("), names)
    robot = names["ROBOT"]
    sizes = {"original_size": (640, 480), "model_size": None}
    assert robot.parse("<box>100 250 500 750</box>", **sizes).box == pytest.approx(Box(0.25, 0.1, 0.75, 0.5))
    assert robot.parse(robot.write(Box(0.1, 0.2, 0.3, 0.4)), **sizes).box == pytest.approx(Box(0.1, 0.2, 0.3, 0.4))


def test_a_task_is_a_few_lines(tmp_path):
    text = snippet("yaml", "shapes_rec_joint").replace("TASKS", str(tasks_folder()))
    (tmp_path / "shapes_rec_joint.yaml").write_text(text)
    manager = TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    task = manager.load_task_or_group("shapes_rec_joint")["shapes_rec_joint"]
    assert len(task.eval_docs) == 488
    assert task.config.process_results.keywords == {"estimator": "joint"}


def test_a_task_of_rejection_takes_another_estimator_from_a_file_beside_it(tmp_path):
    (tmp_path / "scoring.py").write_text(snippet("python", "rejection.process_results"))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ninclude: {tasks_folder()}/grounding/shapes/_attribute_swap.yaml\noutput_type: generate_until\n"
        "test_split: test\nprocess_results: !function scoring.joint\n"
    )
    manager = TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    task = manager.load_task_or_group("mine")["mine"]
    assert task.config.process_results.keywords == {"estimator": "joint"}


def test_photographs_and_a_table_become_a_dataset(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "adding_a_dataset.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (script,) = (code for code in blocks if "labels.csv" in code)
    (declared,) = (code for code in blocks if "SET =" in code)
    monkeypatch.chdir(tmp_path)
    Path("photographs").mkdir()
    Image.new("RGB", (200, 100), "red").save("photographs/dock.jpg")
    Path("labels.csv").write_text(
        "frame,query,left,top,right,bottom,camera\ndock.jpg,the forklift,100,200,500,800,north\n", encoding="utf-8"
    )
    exec(script, {})
    shutil.rmtree("photographs")
    monkeypatch.setenv("LMMS_PLUGIN_WAREHOUSE", str(tmp_path / "warehouse"))
    (task,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    Path("tasks").mkdir()
    Path("tasks/warehouse.py").write_text(declared)
    Path("tasks/warehouse.yaml").write_text(task.replace("TASKS", str(tasks_folder())))
    manager = TaskManager("ERROR", include_path=str(tmp_path / "tasks"), include_defaults=False)
    (doc,) = manager.load_task_or_group("warehouse_rec")["warehouse_rec"].eval_docs
    assert (doc["expression"], doc["image"].size) == ("the forklift", (200, 100))
    assert doc["bbox"] == pytest.approx([20, 20, 80, 60]), "xywh in pixels"
