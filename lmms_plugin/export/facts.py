"""Facts about a run from its folder: quantization, versions, size and speed, all as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.study_files import CELL, About
from lmms_plugin.arguments import arguments_of, shown
from lmms_plugin.quant_backends import backend_name, get, names
from lmms_plugin.utils.messages import command_line
from lmms_plugin.utils.reading import accounts

_FROM_TABLE = {
    "avg_bits_per_weight": "quantization_bits_per_weight",
    "avg_bits_per_model_weight": "bits_per_model_weight",
    "avg_bytes_before": "bytes_before",
    "avg_bytes_after": "bytes_after",
    "avg_quantized_layers": "quantization_layers",
    "avg_skipped_layers": "quantization_layers_left_alone",
    "avg_kv_bits_per_element": "kv_cache_bits_per_element",
    "avg_kv_bytes": "kv_cache_bytes_of_the_longest_prompt",
}
"""lmms-eval's names of what a model of this package reports of itself → ours."""


def beside(file: Path, name: str) -> Path | None:
    """Return a file of this name in the folder of a results file or in the one above it, where studies keep it."""
    return next((path for folder in file.parents[:2] if (path := folder / name).is_file()), None)


def quantization(run: LoggedRun, results: Mapping[str, Any]) -> dict[str, str]:
    """Return how a model was quantized and the effect on its size, every value as text.

    The source is the cell of a study if the run has one, else the name of the model and its arguments. Unknown facts
    are absent.

    Args:
        run: Run.
        results: Content of its results file.
    """
    backend = backend_name(run.model)
    found = {} if backend is None else {"quantization_method": backend}
    found |= {f"quantization_{name}": value for name, value in _arguments(run).items()}
    found |= {f"quantization_{name}": str(value) for name, value in _axes(run.file).items() if value is not None}
    reported = results.get("throughput") or {}
    found |= {
        ours: f"{reported[name]:.10g}" for name, ours in _FROM_TABLE.items() if type(reported.get(name)) in (int, float)
    }
    return found | {"model_args": run.model_args, "lmms_eval_model": run.model}


def checkpoint(run: LoggedRun) -> str | None:
    """Return the checkpoint that the arguments name; None if there is none."""
    named = arguments_of(run.model_args).get("pretrained")
    return None if named is None else shown(named)


def cell(file: Path) -> Mapping[str, Any]:
    """Return a study's record of the run of a results file; empty outside of a study."""
    found = beside(file, CELL)
    return accounts.read(found, About) if found else {}


def command(run: LoggedRun) -> str | None:
    """Return the command of the run, where a study recorded it."""
    return command_line(cell(run.file).get("command", ())) or None


def versions(run: LoggedRun) -> dict[str, str]:
    """Return versions of the libraries, where a study recorded them."""
    return {str(name): str(version) for name, version in cell(run.file).get("versions", {}).items()}


def _axes(file: Path) -> dict[str, Any]:
    return {name: value for name, value in cell(file).get("axes", {}).items() if name != "model"}


def _arguments(run: LoggedRun) -> dict[str, str]:
    names = ("bits", "group_size", "vision_bits", "connector_bits", "language_bits", "symmetric", "calibration", "seed")
    given = arguments_of(run.model_args)
    found = {name: shown(value) for name, value in given.items() if name in names or name.startswith("kv_")}
    if "bits" not in found and (bits := _default_bits(run)) is not None:
        found["bits"] = str(bits)
    return found


def _default_bits(run: LoggedRun) -> int | None:
    backend = backend_name(run.model)
    # A checkpoint that is already quantized has bits of its own.
    if backend is None or backend not in names() or backend == "prequantized":
        return None
    form = arguments_of(run.model_args).get("format")
    return get(backend, **({} if form is None else {"format": form})).default_bits
