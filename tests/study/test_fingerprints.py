"""Fingerprints of what a cell reads: they change when, and only when, that does."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers.small_studies import CELL
from huggingface_hub import constants

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.study.file import fingerprints
from lmms_plugin.study.file.grid import Resources
from lmms_plugin.study.file.identity import keyed
from lmms_plugin.study.file.tasks import describe
from lmms_plugin.utils import hashing


def test_a_folder_is_told_by_its_files_not_its_place(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "sub").mkdir(parents=True)
    (one / "a.txt").write_text("a")
    (one / "sub" / "b.bin").write_bytes(bytes(range(256)) * 4096)
    shutil.copytree(one, other)
    assert hashing.of_path(one) == hashing.of_path(other)
    (other / ".cache").mkdir()
    (other / ".cache" / "lock").write_text("")
    assert hashing.of_path(one) == hashing.of_path(other)
    (other / "a.txt").rename(other / "c.txt")
    assert hashing.of_path(one) != hashing.of_path(other)


@pytest.mark.parametrize("size", [10, 64 * 4096, 3_000_000], ids=["short", "as long as the blocks", "long"])
def test_a_file_is_told_by_its_content(tmp_path: Path, size: int) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(size))
    before = hashing.of_path(file)
    file.write_bytes(bytes(size - 1) + b"\1")
    assert hashing.of_path(file) != before
    file.write_bytes(bytes(size + 1))
    assert hashing.of_path(file) != before


def test_without_the_hub_the_copy_here_tells_the_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reference = tmp_path / "models--somebody--model" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("0123abcd\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Nothing listens there.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    fingerprints.revision.cache_clear()
    assert fingerprints.revision("somebody/model", "model") == "0123abcd"
    assert fingerprints.revision("somebody/other", "model") is None
    fingerprints.revision.cache_clear()


def test_a_module_that_is_not_there_is_no_root_of_a_key() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"expected a module of this package, got 'lmms_plugin\.moved_away'"):
        fingerprints.code(["lmms_plugin.study.file.grid", "lmms_plugin.moved_away"])


def test_functions_are_named_and_paths_looked_into(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("skip: []")
    value = {"a": partial(hashing.of_bytes, b"3"), "b": [str(file)], "c": {2, 1}, "d": None}
    found = fingerprints.of_value(value)
    assert found["a"] == ["lmms_plugin.utils.hashing.of_bytes", [repr(b"3")], {}]
    assert found["b"] == [hashing.of_path(file)]
    assert found["c"] == [1, 2]
    assert found["d"] is None


def test_code_is_followed_through_imports_of_functions_too() -> None:
    found = fingerprints.code(["lmms_plugin.quant_backends.methods.hqq"])
    assert "lmms_plugin.quant_backends.backend" in found.files
    # `get` imports its backends by name: another method is no part of this one.
    assert "lmms_plugin.quant_backends.methods.gptq" not in found.files
    assert "lmms_plugin.study.file.fingerprints" not in found.files
    assert {"hqq", "torch"} <= set(found.versions)


def test_comments_and_docstrings_are_no_code(tmp_path: Path) -> None:
    def fingerprint(text: str) -> str:
        file = tmp_path / "module.py"
        file.write_text(text)
        return fingerprints.parsed_module(file, hash(text), len(text)).fingerprint

    plain = fingerprint("def f(x):\n    return x + 1\n")
    assert fingerprint('"""A."""\n# Why.\ndef f(x):\n    """B."""\n    return x + 1  # c\n') == plain
    assert fingerprint("def f(x):\n    return x + 2\n") != plain


def test_a_group_is_described_by_its_tasks_and_their_data() -> None:
    group, single = describe("shapes_shift"), describe("shapes_shift_fog_3")
    assert single.tasks == ("shapes_shift_fog_3",)
    assert len(group.tasks) == 18
    assert "shapes_shift_fog_3" in group.tasks
    assert "lmms_plugin.tasks.grounding.comprehension" in single.modules
    others = {describe(name).fingerprint for name in ("shapes_rec", "shapes_shift_fog_2", "shapes_shift_fog_3")}
    assert len(others | {group.fingerprint}) == 4


def test_keys_differ_by_what_matters() -> None:
    key = keyed(CELL, cuda=False)
    cells = [
        replace(CELL, backend="hqq"),
        replace(CELL, arguments={**CELL.arguments, "bits": 3}),
        replace(CELL, tasks=("shapes_shift_fog_3",)),
        replace(CELL, limit=5),
        replace(CELL, batch_size=2),
        replace(CELL, resources=Resources(gpus=0, processes=2)),
    ]
    assert len({key.key, keyed(CELL, cuda=True).key, *(keyed(cell, cuda=False).key for cell in cells)}) == 8
    assert keyed(replace(CELL, axes=replace(CELL.axes, model="x")), cuda=False).key == key.key
    assert keyed(cells[0], cuda=False).differences(key.parts) == ["code", "model"]


def test_another_copy_of_a_checkpoint_is_the_same_and_another_training_is_not(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(CHECKPOINT, copy)
    moved = replace(CELL, arguments={**CELL.arguments, "pretrained": str(copy)})
    assert keyed(moved, cuda=False).key == keyed(CELL, cuda=False).key
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5000:] = bytes(5000)
    (copy / "model.safetensors").write_bytes(weights)
    assert keyed(moved, cuda=False).differences(keyed(CELL, cuda=False).parts) == ["checkpoint"]
