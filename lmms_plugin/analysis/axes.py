"""Place of a run in a study: model, method, bits, group size, components, calibration, seed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.analysis.logs import GIT_STATE, git_state, limit_of
from lmms_plugin.analysis.study_files import CELL, About
from lmms_plugin.arguments import ModelArguments, arguments_of, shown
from lmms_plugin.quant_backends import GGUF, SERVED, backend_name, get, model_name, names
from lmms_plugin.utils.image_slices import ImageSlice
from lmms_plugin.utils.reading import accounts

DENSE_BITS = 16
UNQUANTIZED = "unquantized"
"""Label of the reference model, which ran in 16 or 32 bits, whatever its `dtype` said."""
_DENSE, _READY = model_name("none"), model_name("prequantized")
_SERVED, _GGUF = model_name(SERVED), model_name(GGUF)
_OF_THE_CACHE = "kv_"
_STATED = "quantization=stated, not verified"
_COMPONENT_BITS = {"vision": "vision_bits", "connector": "connector_bits", "head": "head_bits"}
_ASKED = ("system_prompt", "dialect", "min_pixels", "max_pixels", "max_num_frames", "limit", "images")
"""Arguments that change what a model is asked or shown."""
# Arguments that have an axis of their own, or that say how a run is done and not what is measured.
_NO_OPTIONS = frozenset(
    (
        *("pretrained", "bits", "group_size", "language_bits", *_COMPONENT_BITS.values(), "calibration", "seed"),
        *("batch_size", "max_batch_size", "device", "device_map", "report", "save_quantized", "features", "resume"),
        *("resume_folder", "share_prefix", "static_cache", "storage", "parity", "trust_remote_code", "use_safetensors"),
        *("base_url", "concurrency", "timeout", "retries", "key_variable", "launch_timeout", "launch_log"),
        *("threads", "slots", "gpu_layers", "converter", "shared_folder"),
    )
)


class Config(NamedTuple):
    """Configuration that runs of one table row share: everything but the seed.

    Attributes:
        model: Checkpoint.
        method: Quantizer, `none` for the unquantized model; for another package's model, the model's name. A quantized
            key-value cache is part of it: `KV int4`, `rtn, KV int4`.
        bits: Nominal bits per weight; None if unknown, and where the key-value cache alone is quantized.
        group_size: Columns that share a scale; None where not applicable.
        components: Quantized components; "" for none.
        calibration: Source of calibration inputs; "" where none is named.
        options: Other relevant arguments, as `name=value`, sorted.
    """

    model: str
    method: str
    bits: int | None
    group_size: int | None
    components: str
    calibration: str
    options: tuple[str, ...]

    @property
    def dense(self) -> bool:
        """Whether this is the unquantized reference model."""
        return self.method == "none"

    @property
    def label(self) -> str:
        """Method and bits: `awq 4`, `unquantized`."""
        return UNQUANTIZED if self.dense else f"{self.method} {self.bits}".removesuffix(" None")

    @property
    def parts(self) -> tuple[str, ...]:
        """All other settings."""
        group = f"group {self.group_size}" if self.group_size is not None else ""
        components = "" if self.components in ("", "language") else self.components
        calibration = f"calibration {self.calibration}" if self.calibration else ""
        return tuple(part for part in (group, components, calibration, *self.options) if part)

    @property
    def asked(self) -> frozenset[str]:
        """Options that change what the model is asked or shown; answers to different questions are never compared."""
        return frozenset(option for option in self.options if option.partition("=")[0] in _ASKED)

    def nearest(self, others: Iterable[Config]) -> Config | None:
        """Return the most similar configuration of the same model with the same questions; None if there is none."""
        alike = [other for other in others if (other.model, other.asked) == (self.model, self.asked)]
        own = set(self.options)
        return min(alike, key=lambda other: (len(own ^ set(other.options)), other.options), default=None)


@dataclass(frozen=True)
class RunAxes:
    """Place of one run.

    Attributes:
        config: Configuration without the seed.
        checkpoint: Checkpoint that was loaded; the model's name in a study may not identify it.
        ready: Whether the checkpoint was quantized before the run.
        seed: Seed of calibration; None where there is none.
        cell: Id of the study's cell; "" outside of a study.
        folder: Folder with the cell's files, or of the results file.
        command: Command of the run, if the cell logs it; else empty.
        versions: Package → version, as far as logged.
    """

    config: Config
    checkpoint: str
    ready: bool
    seed: int | None
    cell: str
    folder: Path
    command: tuple[str, ...]
    versions: Mapping[str, str]


def of(file: Path, root: Path, results: Mapping[str, Any]) -> RunAxes:
    """Return the axes of a results file, from the `cell.json` above it, else from model and arguments.

    Raises:
        ValueError: `cell.json` is damaged.
    """
    config = results.get("config") or {}
    model = str(config.get("model", ""))
    args = arguments_of(config.get("model_args"))
    limit = limit_of(config)
    state = git_state(results)
    versions = {} if state is None else {GIT_STATE: state}
    folder = _cell_folder(file, root)
    if folder is None:
        seed = args.get("seed")
        seed = None if seed is None else int(float(seed))
        own = _limited(_from_arguments(model, args), limit)
        return RunAxes(own, own.model, model == _READY, seed, "", file.parent, (), versions)
    cell = accounts.read(folder / CELL, About)
    axes = cell.get("axes", {})
    if lacking := [name for name in ("model", "method") if axes.get(name) is None]:
        raise ValueError(f"{folder / CELL} is damaged: axes.{lacking[0]}: expected a text, got none")
    cell_args = cell.get("model_args") or {}
    # A study may give the unquantized model any name.
    method = _with_cache("none", cell_args) if cell.get("model") == _DENSE else str(axes["method"])
    own = Config(
        str(axes["model"]),
        method,
        axes.get("bits") if cell.get("model") != _DENSE or method == "none" else None,
        axes.get("group_size"),
        str(axes.get("components") or ""),
        str(axes.get("calibration") or ""),
        _options_of_cell(str(cell.get("model")), cell_args),
    )
    command = tuple(map(str, cell.get("command") or ()))
    versions |= cell.get("versions") or {}
    name = str(cell.get("id", ""))
    checkpoint = str(cell_args.get("pretrained") or own.model)
    ready = cell.get("model") == _READY
    if cell.get("images") is not None:
        own = own._replace(options=(*own.options, ImageSlice.parse(cell["images"]).label))
    return RunAxes(_limited(own, limit), checkpoint, ready, axes.get("seed"), name, folder, command, versions)


def told_apart(found: Sequence[RunAxes]) -> list[RunAxes]:
    """Return the same axes, with the checkpoint named wherever one name stands for several checkpoints."""
    of: dict[tuple[str, str], set[str]] = {}
    for one in found:
        of.setdefault(_named(one), set()).add(one.checkpoint)
    return [replace(one, config=_with_checkpoint(one)) if len(of[_named(one)]) > 1 else one for one in found]


def _named(one: RunAxes) -> tuple[str, str]:
    # A checkpoint that is already quantized never belongs to the unquantized model.
    return one.config.model, one.config.method if one.ready else ""


def _with_checkpoint(one: RunAxes) -> Config:
    config = one.config
    if one.ready:
        return config._replace(options=tuple(sorted((*config.options, f"pretrained={one.checkpoint}"))))
    return config._replace(model=f"{config.model} ({one.checkpoint})")


def _limited(config: Config, limit: float | None) -> Config:
    """Mark a run of the first documents only, so that it is never combined with a complete one."""
    if limit is None:
        return config
    return config._replace(options=(*config.options, f"limit={limit:g}"))


def _cell_folder(file: Path, root: Path) -> Path | None:
    # If a single results file is named, its cell is above the given path.
    top = root.parent.parent if root.is_file() else root
    for folder in file.parents:
        if (folder / CELL).is_file():
            return folder
        if folder == top:
            break
    return None


def _from_arguments(model: str, args: Mapping[str, Any]) -> Config:
    backend = backend_name(model)
    name = str(args.get("pretrained") or args.get("model") or (model if backend is None else ModelArguments.pretrained))
    method = model if backend is None else backend
    if model == _DENSE:
        cached = _with_cache(method, args)
        return Config(name, cached, DENSE_BITS if cached == method else None, None, "", "", _options(args))
    if model == _SERVED:
        return _served(name, args)
    if model == _GGUF:
        return _gguf(name, args)
    if backend is not None:
        method = _with_cache(method, args)
    if model == _READY or backend is None:
        return Config(name, method, None, None, "", "", _options(args))
    bits = _whole(args.get("language_bits", args.get("bits")))
    default_bits, decided = _defaults(backend, args)
    bits = default_bits if bits is None else bits
    parts = {"language": bits} | {part: _whole(args.get(key)) for part, key in _COMPONENT_BITS.items()}
    components = "+".join(
        part if count == bits else f"{part}:{count}"
        for part, count in parts.items()
        if count is not None and count != DENSE_BITS
    )
    group_size = None if "group_size" in decided else _whole(args.get("group_size", 128))
    return Config(name, method, bits, group_size, components, _text(args, "calibration"), _options(args))


def _with_cache(method: str, args: Mapping[str, Any]) -> str:
    """Return the method with its key-value cache, where that is quantized."""
    given = {name: value for name, value in args.items() if name.startswith(_OF_THE_CACHE)}
    try:
        spec = ModelArguments.parse(given).cache_spec if given else None
    except ValueError:
        # Another version of this package took these arguments; they are listed among the options.
        return f"{method}, KV"
    if spec is None:
        return method
    return f"KV {spec.name}" if method == "none" else f"{method}, KV {spec.name}"


def _served(name: str, args: Mapping[str, Any]) -> Config:
    """A server's model: how its weights are quantized is what its user states."""
    stated = str(args.get("method") or "")
    bits = _whole(args.get("bits"))
    options = _options({key: value for key, value in args.items() if key != "method"})
    return Config(name, f"served {stated}".strip(), bits, None, "", "", tuple(sorted((*options, *_marks(args)))))


def _options_of_cell(model: str, args: Mapping[str, Any]) -> tuple[str, ...]:
    """Options of a study's cell; a method of its own name stands for the command that starts its server."""
    if model != _SERVED:
        return _options(args)
    return tuple(sorted((*_options({key: value for key, value in args.items() if key != "launch"}), *_marks(args))))


def _marks(args: Mapping[str, Any]) -> tuple[str, ...]:
    return (_STATED,) if args.get("method") or args.get("bits") is not None else ()


def _gguf(name: str, args: Mapping[str, Any]) -> Config:
    """A GGUF file; one that was written for the run has the type that was asked for, of others only the file tells."""
    kind = str(args.get("type") or "")
    bits = re.search(r"\d+", kind)
    options = _options({key: value for key, value in args.items() if key != "type"})
    count = None if bits is None else min(DENSE_BITS, int(bits[0]))
    return Config(name, f"gguf {kind}".strip(), count, None, "", "", options)


def _defaults(method: str, args: Mapping[str, Any]) -> tuple[int | None, Mapping[str, str]]:
    """Return the bits that a method has without any given, and the arguments that its options decide."""
    # Asked only if the run did not log the bits, or names a format: a backend imports torch.
    form = args.get("format")
    if method not in names() or (form is None and not {"bits", "language_bits"}.isdisjoint(args)):
        return None, {}
    backend = get(method, **({} if form is None else {"format": form}))
    return backend.default_bits, backend.settled


def _whole(value: object) -> int | None:
    return None if value is None else int(float(str(value)))


def _text(args: Mapping[str, Any], name: str) -> str:
    return str(args.get(name) or "")


def _options(args: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name}={shown(value)}" for name, value in sorted(args.items()) if name not in _NO_OPTIONS)
