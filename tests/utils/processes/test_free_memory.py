"""Memory that can still be taken: the machine's, within the limit of a container."""

import psutil
import pytest

from lmms_plugin.utils.processes.free_memory import free_host_bytes, total_host_bytes


@pytest.fixture
def group(tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 200000\nactive_file 100000\n")
    return tmp_path


def test_a_container_has_its_limit_less_what_cannot_be_taken_back(group):
    assert free_host_bytes(group) == 1_000_000 - 700_000 + 200_000
    assert total_host_bytes(group) == 1_000_000


def test_a_full_container_has_nothing(group):
    (group / "memory.current").write_text("1300000\n")
    assert free_host_bytes(group) == 0


@pytest.mark.parametrize("limit", ["max", None])
def test_without_a_limit_it_is_the_machine(group, limit):
    if limit is None:
        (group / "memory.max").unlink()
    else:
        (group / "memory.max").write_text(limit)
    assert total_host_bytes(group) == psutil.virtual_memory().total
    assert 0 < free_host_bytes(group) <= psutil.virtual_memory().total


def test_a_limit_whose_use_is_not_told_is_the_bound(group):
    (group / "memory.stat").unlink()
    assert free_host_bytes(group) == 1_000_000
