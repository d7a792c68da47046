"""Arms of a study that a server answers (`method: served`): what they take, and what their results depend on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmms_plugin.arguments import ModelArguments, read_arguments
from lmms_plugin.quant_backends import SERVED, option_types
from lmms_plugin.study.file.fingerprints import of_value
from lmms_plugin.study.file.grid import Resources
from lmms_plugin.utils.processes.launch_command import LaunchCommand
from lmms_plugin.vlm.served.options import OPTION_TYPES, ServedOptions, expect_effect

ROOTS = ("lmms_plugin.vlm.served.model", "lmms_plugin.registration")
"""Modules that such a cell runs."""
STATED: Mapping[str, str] = {"stated_method": "method"}
"""Name in a study file → model argument, where the file has another meaning for the argument's name."""
_READ = (".gguf", ".safetensors", ".json", ".yaml", ".yml", ".jinja")
"""Endings of files that servers read and do not write."""
OPTIONS = tuple(sorted({*OPTION_TYPES, *STATED} - {"method", "launch_log"}))
"""What a served arm takes besides model arguments."""


def options_of(backend: str) -> Mapping[str, Any]:
    """Return the types of the options of a backend, or of served models."""
    return OPTION_TYPES if backend == SERVED else option_types(backend)


def checked(given: Mapping[str, Any], resources: Resources) -> dict[str, Any]:
    """Return the model arguments of a served cell, with its launch command in one line.

    Args:
        given: Model arguments.
        resources: Resources of the cell.

    Raises:
        ValueError: An argument is unknown, says nothing or has an impossible value.
        FileNotFoundError: There is no such checkpoint.
    """
    arguments = ModelArguments.parse(given, OPTION_TYPES)
    command = ServedOptions.of(arguments).command
    expect_effect(given)
    if arguments.resume_folder is not None:
        raise ValueError("resume_folder: expected none, since a study keeps the answers of each served cell by itself")
    arguments.find_checkpoint()
    if command is None:
        return dict(given)
    if resources.processes > 1:
        raise ValueError(
            f"launch: expected one process, got {resources.processes}: one process asks as many questions at once as "
            "concurrency= says"
        )
    if read_arguments(f"launch={command.text},seed=0") != {"launch": command.text, "seed": 0}:
        raise ValueError(
            f"launch: expected a command that can stand among model arguments, got {command.text!r:.200}: put it into "
            "a script, 'sh SCRIPT {port}'"
        )
    return {**given, "launch": command.text}


def dependencies(command: LaunchCommand) -> Mapping[str, Any]:
    """Return what results depend on by the command that starts their server: its words, and the checkpoints among them.

    Other files that a command names, such as logs and caches, may change while its server runs.
    """
    words = [part for word in command.words for part in word.split("=")]
    return {"words": [_content(word) for word in words], "environment": dict(command.environment)}


def _content(word: str) -> Any:
    """Return the fingerprint of a checkpoint or configuration that a word names; else the word."""
    path = Path(word)
    read = (path / "config.json").is_file() or (path.suffix in _READ and path.is_file())
    return of_value(str(path.absolute())) if read else word
