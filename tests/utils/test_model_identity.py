"""Identity of a model under which answers and statistics are kept."""

import shutil

import pytest
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_plugin.utils.model_identity import identity_of


@pytest.fixture(scope="module")
def loaded(checkpoint):
    path = checkpoint("qwen2_5_vl")
    return path, AutoModelForImageTextToText.from_pretrained(path)


def identity(path, model, **changes):
    processor = AutoProcessor.from_pretrained(path)
    for name, value in changes.items():
        setattr(processor, name, value)
    return identity_of(str(path), model, processor)


def test_it_is_the_same_each_time(loaded):
    assert identity(*loaded) == identity(*loaded)


def test_a_change_between_the_blocks_that_are_read_of_a_large_file_is_seen(loaded, tmp_path):
    path, model = loaded
    copy = shutil.copytree(path, tmp_path / "copy")
    weights = copy / "model.safetensors"
    with weights.open("ab") as stream:
        stream.truncate(10_000_000)
    before = identity(copy, model)
    with weights.open("r+b") as stream:
        # 64 blocks of 4,096 bytes lie 158,665 bytes apart.
        stream.seek(5_000_000 // 158_665 * 158_665 + 100_000)
        stream.write(b"another")
    after = identity(copy, model)
    assert before["checkpoint"] == after["checkpoint"]
    assert before["changed"] != after["changed"]


def test_another_template_is_another_model(loaded):
    path, model = loaded
    assert identity(path, model) != identity(path, model, chat_template="{{ messages }}")


def test_other_rules_of_the_tokenizer_are_another_model(loaded):
    path, model = loaded
    processor = AutoProcessor.from_pretrained(path)
    before = identity_of(str(path), model, processor)
    shown = repr(processor)
    processor.tokenizer.backend_tokenizer.normalizer = Lowercase()
    assert repr(processor) == shown
    assert identity_of(str(path), model, processor) != before


def test_another_class_is_another_model(loaded):
    path, model = loaded
    before = identity(path, model)
    original = type(model)
    try:
        model.__class__ = type(original.__name__, (original,), {"__module__": "remote"})
        assert identity(path, model) != before
    finally:
        model.__class__ = original
