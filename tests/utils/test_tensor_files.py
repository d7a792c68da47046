"""Files of tensors that runs share: what the system refuses, and how much a folder holds."""

import os
import subprocess
import sys
import time

import torch
from safetensors.torch import save_file

from lmms_plugin.utils import tensor_files

TENSORS = {"sums": torch.arange(100_000.0)}

LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from lmms_plugin.utils import tensor_files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tensor_files.write(Path(sys.argv[1]), {"sums": torch.arange(100_000.0)})
print("went on")
"""


def test_what_the_system_refuses_to_write_is_not_kept_and_said(tmp_path):
    file = tmp_path / "full" / "a.safetensors"
    done = subprocess.run([sys.executable, "-P", "-c", LIMITED, str(file)], capture_output=True, text=True)
    assert done.stdout == "went on\n", done.stderr
    assert "a.safetensors is not kept" in done.stderr
    assert not list(file.parent.iterdir())


def test_room_counts_all_files_and_what_killed_processes_left_long_ago_is_removed(tmp_path):
    file = tmp_path / "model" / "a.safetensors"
    tensor_files.write(file, TENSORS)
    left = [file.with_name(f".a.safetensors.unfinished-{name}") for name in ("old", "new")]
    for one in left:
        save_file(TENSORS, one)
    os.utime(left[0], (time.time() - 10**6,) * 2)
    room = tensor_files.room_in(tmp_path, 10**7)
    assert room == 10**7 - file.stat().st_size - left[1].stat().st_size
    assert [one.exists() for one in left] == [False, True]
    assert tensor_files.room_in(tmp_path, 10**7, but={file}) == room + file.stat().st_size
    assert tensor_files.room_in(tmp_path, 1000) == 0


def test_a_place_where_no_folder_can_be_has_no_room(tmp_path):
    (tmp_path / "file").write_text("")
    assert tensor_files.room_in(tmp_path / "file" / "folder", 10**7) == 0
