"""One harmless warning is dropped, all others of the same logger pass."""

import enum
import logging

import pytest

from lmms_plugin.utils.processes.quiet import hush

ENUMERATION = "%s is an Enum subclass and is now natively supported by torch.compile as an opaque value type."


class Ours(enum.Enum):
    A = 1


class Theirs(enum.Enum):
    A = 1


Theirs.__module__ = "torchao.quantization.quantize_.common.kernel_preference"


@pytest.mark.parametrize(
    ("message", "kind", "shown"),
    [(ENUMERATION, Theirs, False), (ENUMERATION, Ours, True), ("%s is registered twice", Theirs, True)],
    ids=["theirs", "ours", "another message"],
)
def test_only_the_note_about_enumerations_of_torchao_is_dropped(caplog, message, kind, shown):
    hush()
    logging.getLogger("torch.utils._pytree").warning(message, kind)
    assert bool(caplog.records) == shown


def test_importing_the_model_prints_nothing_of_it():
    """In a process of its own, where torchao is not imported yet."""
    import subprocess
    import sys

    pytest.importorskip("torchao")
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import lmms_plugin, torchao.prototype.mx_formats"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Enum subclass" not in done.stderr
