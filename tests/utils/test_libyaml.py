"""Libyaml's parser reads what PyYAML's own does."""

from pathlib import Path

import lmms_eval.tasks
import pytest
import yaml
from lmms_eval import utils

from lmms_plugin.registration import tasks_folder
from lmms_plugin.utils import libyaml

TEXTS = [
    "a: 1\nb: [1.5, .nan, 0x1F, 1_000, 012, yes, ~, 2020-01-02]\n",
    'c: "\\u00e9\\n"\nd: |\n  two\n  lines\ne: >-\n  fol\n  ded\n',
    "base: &b {x: 1}\nmore: {<<: *b, y: 2}\nempty:\n",
    "f: !function utils.thing\n",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_read_alike(text):
    yaml.add_constructor("!function", utils.ignore_constructor)
    with libyaml.parsing():
        assert yaml.__with_libyaml__ == (yaml.full_load is libyaml.full_load)
        found = yaml.full_load(text)
    assert repr(found) == repr(yaml.full_load(text))


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\t- x", "a: !unknown 1", "a: *nobody"])
def test_the_same_texts_are_refused(text):
    with pytest.raises(yaml.YAMLError) as expected:
        yaml.full_load(text)
    with libyaml.parsing(), pytest.raises(yaml.YAMLError) as found:
        yaml.full_load(text)
    assert isinstance(found.value, yaml.MarkedYAMLError) == isinstance(expected.value, yaml.MarkedYAMLError)


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder", [Path(lmms_eval.tasks.__file__).parent, Path(tasks_folder())], ids=["theirs", "ours"]
)
def test_files_of_tasks_are_read_alike(folder):
    files = sorted(folder.rglob("*.yaml"))
    assert files
    for file in files:
        plain = utils.load_yaml_config(file, mode="simple")
        with libyaml.parsing():
            assert repr(utils.load_yaml_config(file, mode="simple")) == repr(plain), file
