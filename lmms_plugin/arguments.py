"""Model arguments: what `--model_args` accepts, checked before anything is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import BeforeValidator, Field, ValidationError, create_model

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.plans.cache_spec import (
    CACHE_FORMATS,
    CACHE_PARTS,
    CACHE_ROTATIONS,
    KEY_AXES,
    NOTHING_KEPT,
    CacheFormat,
    CachePart,
    CacheRotation,
    CacheSpec,
    KeyAxis,
)
from lmms_plugin.quant_backends.plans.plan import UNTOUCHED_BITS, QuantPlan, named_in
from lmms_plugin.quant_backends.plans.specs import DEFAULT_SAMPLES, Bits
from lmms_plugin.quant_backends.plans.storage_choice import STORAGES, Storage
from lmms_plugin.utils import checkpoints
from lmms_plugin.utils.files import expect_inside, read_json
from lmms_plugin.utils.outputs import expect_file, expect_folder, expect_free
from lmms_plugin.utils.reading.located import text_of
from lmms_plugin.utils.reading.validation import Expected, Number, Problem, Schema, Truth, Whole, left_out, validated
from lmms_plugin.utils.suggest import unknown

if TYPE_CHECKING:
    from lmms_plugin.quant_backends.backend import Backend

T = TypeVar("T")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEMO = "demo"
OF_THE_CACHE = (
    "kv_bits",
    "kv_image_bits",
    "kv_format",
    "kv_group_size",
    "kv_keys",
    "kv_part",
    "kv_keep",
    "kv_rotation",
)
_OF_ANSWERS = (
    *OF_THE_CACHE,
    *(
        "storage",
        "samples",
        "sample_temperature",
        "verbalised",
        "static_cache",
        "share_prefix",
        "features",
        "feature_layer",
    ),
    *("selector", "selector_transfer", "parity", "reference"),
)
"""Arguments that say how questions are answered, and nothing about weights."""
_TOLD = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
"""Configuration files of a checkpoint; each holds a JSON object."""


def _whole(value: Any) -> Any:
    """Undo what lmms-eval does to whole numbers: `-1` arrives as a float, other numbers as text."""
    try:
        return int(float(value)) if isinstance(value, float | str) and float(value).is_integer() else value
    except ValueError:
        return value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float | Path) and not isinstance(value, bool) else value


def _nothing(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() in ("", "none") else value


def _auto(value: Any) -> Any:
    """Read `auto` as None; an empty batch size is an error."""
    if value is None:
        raise ValueError(value)
    return None if value == "auto" else _whole(value)


def _variables(value: Any) -> Any:
    """Read template variables from JSON; a mapping is returned as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value else value or None
    except (ValueError, RecursionError):
        return value


_Int = Annotated[Whole, BeforeValidator(_whole)]
_Str = Annotated[str, BeforeValidator(_text)]
_Bits = Annotated[Bits, BeforeValidator(_whole)]
_Count = Annotated[_Int, Field(ge=1)]
_Any = Annotated[T | None, BeforeValidator(_nothing)]
_GIVEN: Mapping[Any, Any] = {int: _Int, float: Annotated[float, Field(strict=True)], bool: Truth, str: _Str}
"""Type of a method's option → type that a given value is validated against."""


@validated
class ModelArguments:
    """Arguments that a user can set with `--model_args name=value,...`.

    Attributes:
        pretrained: Id on the Hugging Face hub, path of a checkpoint folder, or `demo` for the embedded checkpoint. An
            id that is neither on the hub nor in the cache is refused after one request.
        bits: Bits per weight of the language model, 2 to 8; 16 for untouched.
        group_size: Columns of a weight that share a scale; -1 for a whole row.
        vision_bits: Bits per weight of the vision tower.
        connector_bits: Bits per weight of the projector between vision tower and language model.
        language_bits: Bits per weight of the language model; overrides `bits`.
        head_bits: Bits per weight of the output projection.
        symmetric: Whether quantization is symmetric, with the zero point fixed in the middle of the range.
        plan: YAML file with rules per module; replaces the arguments above.
        storage: How quantized weights are held while answering: `dense` keeps them unpacked, `packed` unpacks them for
            each product where no kernel multiplies with the codes, `auto` takes what is faster and fits in memory.
        kv_bits: Bits of the cached keys and values of text tokens, 2 to 8; 16 for untouched, which is the default
            except in an 8-bit float.
        kv_image_bits: Bits of those of image tokens; by default `kv_bits`.
        kv_format: Format of cached keys and values: `int`, `fp8_e4m3` or `fp8_e5m2`.
        kv_group_size: Elements that share a scale; by default 32, or the size of a head where 32 does not divide it,
            and for a float none, which has no scale then.
        kv_keys: Whether the elements that share a scale are, of keys, those of one `channel` in consecutive tokens or
            those of one `token`. Values are always scaled per token.
        kv_part: Which of them are quantized: `both`, `keys` or `values`.
        kv_keep: Numbers of the first and last tokens whose keys and values stay in 16 bits, such as `4+32`.
        kv_rotation: Rotation of each head of keys and values before they are rounded: `hadamard`, QuaRot's, or `none`.
        calibration: Source of the calibration inputs: `self` (the model generates them), `noise`, `demo`, `photographs`
            or `dataset:...`; `self` by default. Methods without calibration refuse it.
        calibration_samples: Number of calibration samples.
        resume: Whether an interrupted calibration continues after its last finished block.
        resume_folder: Folder of finished blocks until a calibration is complete; by default below the environment
            variable `LMMS_PLUGIN_CACHE`, or beside the Hugging Face cache.
        shared_folder: Folder of what runs compute of one unquantized model and share, whatever their method and bits:
            what calibration takes from it, and answers of `reference`; of each 16 GiB at most. By default nothing is
            shared.
        seed: Seed of calibration and sampling.
        dtype: Data type of the weights that are not quantized and of the arithmetic; `auto` is bfloat16 on a GPU, else
            float32.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        device_map: Device map as in transformers, for example `auto` to spread the model over several devices.
        attn_implementation: Attention implementation as in transformers: `sdpa`, `eager`, `flash_attention_2`, ...; by
            default `sdpa`, on CPU and GPU, for every model that supports it.
        min_pixels: Smallest area in pixels to which an image is resized, for processors that resize by area.
        max_pixels: Largest such area in pixels.
        max_num_frames: Number of frames of a video that the model sees, evenly spaced.
        report: JSON file for the quantization report of every layer.
        save_quantized: New folder for the quantized checkpoint, which `quant_prequantized` loads.
        features: Folder for the features that a learned confidence is trained on (see
            `lmms_plugin.selector.features`); one per model.
        feature_layer: Layer whose hidden states are the features: -1 for the last, k for the input of layer k; by
            default the selector's layer or the last.
        selector: File of a learned confidence (see `lmms_plugin.selector.network`).
        selector_transfer: Whether the selector may have been trained for another model or quantization.
        samples: Number of additional answers sampled for each question whose task asks for confidence (boxes, VQA),
            used by the agreement estimators; 0 for none.
        sample_temperature: Temperature of that sampling.
        verbalised: Whether a second turn asks the model how sure it is of such an answer.
        system_prompt: System message, or a file that holds it.
        enable_thinking: Whether the model reasons first, where its chat template offers the choice; None keeps the
            template's default.
        template_args: Further variables of the chat template, as JSON: `template_args={"thinking_budget": 512}`.
        dialect: Name of the grounding dialect; by default that of the model's family.
        batch_size: Images answered together (requests, where there is no image), with all questions about each of them;
            `auto` for as many as fit, which is the default but with `static_cache`, where it is 1.
        share_prefix: Whether questions about one image share one encoding of it.
        static_cache: Whether the key-value cache has a fixed size, with which transformers compiles decoding on a GPU;
            it excludes shared prefixes and takes minutes before the first answer.
        parity: Whether evidence for `lmms-plugin parity` is kept: ids of every prompt's tokens with its answer, and
            answers to five trial questions.
        reference: Checkpoint whose answers are forced through this model, for its distance from it (docs/distance.md);
            `none` for `pretrained` itself, unquantized. Both are in memory together.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        use_safetensors: Whether weights must be stored as safetensors.
        options: Options of the quantization backend, each given as an argument of its own.
    """

    pretrained: _Str = "Qwen/Qwen2.5-VL-3B-Instruct"
    bits: _Any[_Bits] = None
    group_size: _Int = 128
    vision_bits: _Bits = 16
    connector_bits: _Bits = 16
    language_bits: _Any[_Bits] = None
    head_bits: _Bits = 16
    symmetric: Truth = False
    plan: _Any[_Str] = None
    storage: Annotated[Storage, Expected(f"one of {', '.join(STORAGES)}")] = "auto"
    kv_bits: _Any[_Bits] = None
    kv_image_bits: _Any[_Bits] = None
    kv_format: Annotated[CacheFormat, Expected(f"one of {', '.join(CACHE_FORMATS)}")] = "int"
    kv_group_size: _Any[_Count] = None
    kv_keys: Annotated[KeyAxis, Expected(f"one of {', '.join(KEY_AXES)}")] = "channel"
    kv_part: Annotated[CachePart, Expected(f"one of {', '.join(CACHE_PARTS)}")] = "both"
    kv_keep: _Str = NOTHING_KEPT
    kv_rotation: Annotated[CacheRotation, Expected(f"one of {', '.join(CACHE_ROTATIONS)}")] = "none"
    # `calibration=none` differs from no argument: a calibrated method refuses it.
    calibration: Annotated[_Str | None, BeforeValidator(lambda source: None if source == "" else source)] = None
    calibration_samples: _Any[_Count] = None
    resume: Truth = True
    resume_folder: _Any[_Str] = None
    shared_folder: _Any[_Str] = None
    seed: Annotated[_Int, Field(ge=0)] = 0
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], Expected(f"one of {', '.join(DTYPES)}")] = (
        "auto"
    )
    device: _Str = "auto"
    device_map: _Any[_Str] = None
    attn_implementation: _Any[_Str] = None
    min_pixels: _Any[_Count] = None
    max_pixels: _Any[_Count] = None
    max_num_frames: _Count = 32
    report: _Any[_Str] = None
    save_quantized: _Any[_Str] = None
    features: _Any[_Str] = None
    feature_layer: _Any[_Int] = None
    selector: _Any[_Str] = None
    selector_transfer: Truth = False
    samples: Annotated[
        Annotated[Whole, Field(ge=2)] | Annotated[Whole, Field(ge=0, le=0)],
        BeforeValidator(_whole),
        Expected("0 or at least 2, which can agree"),
    ] = 0
    sample_temperature: Annotated[Number, Field(gt=0)] = 1.0
    verbalised: Truth = False
    system_prompt: _Any[_Str] = None
    enable_thinking: _Any[Truth] = None
    template_args: Annotated[
        Mapping[str, Any] | None,
        BeforeValidator(_variables),
        Expected('a JSON object such as {"thinking_budget": 512}'),
    ] = None
    dialect: _Any[_Str] = None
    batch_size: Annotated[
        Annotated[Whole, Field(ge=1)] | None, BeforeValidator(_auto), Expected("a whole number from 1, or 'auto'")
    ] = None
    share_prefix: Truth = True
    static_cache: Truth = False
    parity: Truth = False
    # `reference=none` names the unquantized checkpoint.
    reference: Annotated[_Str | None, BeforeValidator(lambda name: name or None)] = None
    trust_remote_code: Truth = False
    use_safetensors: Truth = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        if self.feature_layer is not None and not (self.features or self.selector):
            raise ValueError("feature_layer says nothing without features or selector")
        if self.selector_transfer and not self.selector:
            raise ValueError("selector_transfer says nothing without selector")
        if self.parity and (self.features or self.selector):
            raise ValueError(
                "parity asks questions of its own, of which no features are kept: leave out features and selector"
            )
        if self.enable_thinking is not None and "enable_thinking" in (self.template_args or {}):
            raise ValueError("enable_thinking is given twice, by itself and in template_args; say it once")
        if self.cache_spec is not None:
            if self.static_cache:
                raise ValueError("static_cache: a quantized cache (kv_bits) grows; leave one of the two out")
            if self.features or self.selector:
                raise ValueError(
                    "features, selector: hidden states are those of a prompt that is read at once, which a quantized "
                    "cache (kv_bits) does not allow; leave one of the two out"
                )
        self._expect_places()

    def _expect_places(self) -> None:
        if self.resume_folder:
            if not self.resume:
                raise ValueError(f"resume=False keeps nothing, but resume_folder names {self.resume_folder}")
            if Path(self.resume_folder).expanduser().is_file():
                raise ValueError(f"resume_folder: {self.resume_folder} is a file")
        if self.shared_folder:
            expect_folder("shared_folder", Path(self.shared_folder).expanduser())
        if self.report:
            expect_file("report", Path(self.report).expanduser())
        if self.features:
            expect_folder("features", Path(self.features))
        if self.save_quantized:
            expect_free(self.save_quantized)

    @classmethod
    def parse(cls, given: Mapping[str, Any], option_types: Mapping[str, Any] | None = None) -> ModelArguments:
        """Validate names and types of arguments as lmms-eval passes them.

        Args:
            given: Name → value.
            option_types: Name → type of each option of the quantization backend (see
                `lmms_plugin.quant_backends.option_types`).

        Raises:
            ValueError: An argument is unknown (names the nearest and lists all), or a value has the wrong type.
        """
        kind = _options(tuple((option_types or {}).items()))
        own = [one.name for one in fields(cls) if one.name != "options"]
        known = [*own, *kind.model_fields]
        # lmms-eval always passes the first of these; it belongs to lmms-eval's own search for a batch size.
        if strange := sorted(given.keys() - {"max_batch_size", *known}):
            raise unknown("model argument", strange[0], known)
        try:
            options = kind(**{name: given[name] for name in kind.model_fields if name in given})
        except ValidationError as error:
            raise ValueError(Problem.of(error, kind).text) from error
        values = {name: given[name] for name in own if name in given}
        values["options"] = options.model_dump(exclude_unset=True)
        arguments = cls(**values)
        if arguments.static_cache and "batch_size" not in given:
            # Each size of a batch would compile anew.
            return cls(**values, batch_size=1)
        return arguments

    @classmethod
    def expect_possible(cls, given: Mapping[str, Any]) -> None:
        """Refuse what is impossible with any method, without importing a method, which imports torch.

        Args:
            given: Name → value, options of the method included, which are not looked at.

        Raises:
            ValueError: An argument has the wrong type or value, or the plan file is invalid.
            FileNotFoundError: The plan file or the checkpoint folder does not exist.
        """
        own = {one.name for one in fields(cls)} - {"options"}
        arguments = cls(**{name: value for name, value in given.items() if name in own})
        arguments.quant_plan(UNTOUCHED_BITS)
        arguments.calibration_spec()
        arguments.find_checkpoint()

    def quant_plan(self, default_bits: int) -> QuantPlan:
        """Return the quantization plan; without further arguments it sets the language model to `default_bits`."""
        return QuantPlan.from_arguments(
            bits=default_bits if self.bits is None else self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            vision_bits=self.vision_bits,
            connector_bits=self.connector_bits,
            language_bits=self.language_bits,
            head_bits=self.head_bits,
            plan=self.plan,
        )

    @cached_property
    def cache_spec(self) -> CacheSpec | None:
        """Return the storage of keys and values; None for a cache as the model has it.

        Raises:
            ValueError: An argument has no effect, or two contradict each other.
        """
        return CacheSpec.from_arguments(
            bits=self.kv_bits,
            image_bits=self.kv_image_bits,
            format=self.kv_format,
            group_size=self.kv_group_size,
            key_axis=self.kv_keys,
            part=self.kv_part,
            keep=self.kv_keep,
            rotation=self.kv_rotation,
        )

    def calibration_spec(self, default_samples: int = DEFAULT_SAMPLES) -> CalibrationSpec | None:
        """Return the source of the calibration inputs; None leaves the choice to the method.

        Args:
            default_samples: Number of samples if the user gave none.
        """
        if self.calibration is None and self.calibration_samples is None:
            return None
        samples = self.calibration_samples or default_samples
        return CalibrationSpec.parse(self.calibration or "self", samples=samples, seed=self.seed)

    def find_checkpoint(self) -> str:
        """Return the hub id or the folder to load from.

        Raises:
            FileNotFoundError: `pretrained` is written like a path, and no checkpoint is there.
            ValueError: `pretrained` is neither a folder nor an id, or one of its files is damaged.
        """
        return _located(self.pretrained, "pretrained")

    def find_reference(self) -> str:
        """Return the hub id or the folder of the reference.

        Raises:
            FileNotFoundError: `reference` is written like a path, and no checkpoint is there.
            ValueError: `reference` is neither a folder nor an id, or one of its files is damaged.
        """
        if str(self.reference).lower() == "none":
            return self.find_checkpoint()
        return _located(str(self.reference), "reference")

    @property
    def template_variables(self) -> dict[str, Any]:
        """Return all variables that the chat template receives."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**(self.template_args or {}), **thinking}

    def read_system_prompt(self) -> str | None:
        r"""Return the system message, read from its file if `system_prompt` names one; `\n` stands for a line break."""
        if not self.system_prompt:
            return None
        if len(self.system_prompt) < 256 and Path(self.system_prompt).is_file():
            return text_of(Path(self.system_prompt)).strip()
        return self.system_prompt.replace("\\n", "\n")


def read_arguments(text: str) -> dict[str, Any]:
    """Parse `name=value,name=value,...` as a user writes it.

    Commas within quotes and brackets do not separate arguments. Values that look like numbers or truth values are
    converted.

    Raises:
        ValueError: A part has no `=`, an unclosed quote or bracket swallows further parts, or a name is given twice (of
            which lmms-eval would silently take the last).
    """
    parts = _parts(text)
    wrong = [part for part in parts if "=" not in part]
    if wrong:
        raise ValueError(f"expected name=value,name=value,..., got {wrong[0]!r}")
    if parts and _is_open(parts[-1]):
        raise ValueError(
            f"expected quotes and brackets that are closed before the next argument, got {parts[-1]!r:.200}"
        )
    names = Counter(part.partition("=")[0].strip() for part in parts)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given {names[twice[0]]} times; say it once")
    return arguments_of(text)


def arguments_of(logged: object) -> dict[str, Any]:
    """Return the arguments of a finished run from its results file, which stores a mapping, a text or nothing.

    The text was accepted by lmms-eval or another, more lenient program: a part without `=` belongs to the value before
    it, and the last of several values for one name counts.
    """
    if isinstance(logged, Mapping):
        return dict(logged)
    found: dict[str, str] = {}
    last = None
    for part in _parts(str(logged or "")):
        name, equals, value = part.partition("=")
        if equals:
            last = name.strip()
            found[last] = value.strip()
        elif last is not None:
            found[last] += f",{part}"
    return {name: _value(value) for name, value in found.items()}


def shown(value: object) -> str:
    """Format the value of an argument as in `--model_args`; -1.0 becomes -1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _parts(text: str) -> list[str]:
    """Split a text at its commas, except those within quotes and brackets."""
    parts, start = [], 0
    for end in _commas(text):
        parts.append(text[start:end].strip())
        start = end + 1
    return [part for part in (*parts, text[start:].strip()) if part]


def _commas(text: str) -> Iterator[int]:
    for place, character, depth, quote in _nested(text):
        if character == "," and not depth and not quote:
            yield place


def _is_open(part: str) -> bool:
    """Return whether an unclosed quote or bracket swallows commas; a lone apostrophe swallows none."""
    *_, (_, _, depth, quote) = _nested(part)
    return bool(depth > 0 or quote) and "," in part


def _nested(text: str) -> Iterator[tuple[int, str, int, str]]:
    """Yield position, character, number of open brackets and open quote after it, for each character."""
    depth, quote = 0, ""
    for place, character in enumerate(text):
        if character in "\"'" and text[place - 1 : place] != "\\":
            quote = "" if quote == character else quote or character
        elif not quote:
            depth += (character in "{[") - (character in "}]")
        yield place, character, depth, quote


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def without_idle_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return model arguments without those that ask for the key-value cache that a model has anyway, in 16 bits."""
    of_cache = {name: arguments[name] for name in OF_THE_CACHE if name in arguments}
    is_idle = of_cache.keys() <= {"kv_bits", "kv_image_bits"} and all(
        one == UNTOUCHED_BITS for one in of_cache.values()
    )
    return {name: value for name, value in arguments.items() if not (is_idle and name in of_cache)}


def expect_effect(given: Mapping[str, Any], backend: Backend) -> None:
    """Refuse arguments about weights for a method that leaves all weights as they are, or whose options decide them.

    Args:
        given: Name → value, as the user gave them.
        backend: Quantization method.

    Raises:
        ValueError: An argument would have no effect.
    """
    plan = _nothing(given.get("plan"))
    planned = named_in(plan) if plan and backend.settled else frozenset()
    useless = [name for name in ("group_size", "symmetric") if name in given]
    if useless and backend.default_bits == UNTOUCHED_BITS:
        raise ValueError(f"{backend.name} takes weights as the checkpoint has them: leave out {useless[0]}")
    for name, reason in backend.settled.items():
        if name in given or name in planned:
            raise ValueError(f"{reason}: leave out {name}{'' if name in given else ' in the plan file'}")


def expect_of_weights(given: Mapping[str, Any]) -> None:
    """Refuse arguments about answers where a model is quantized and asked nothing.

    Args:
        given: Name → value, as the user gave them.

    Raises:
        ValueError: An argument would have no effect.
    """
    if useless := next((name for name in _OF_ANSWERS if name in given), None):
        raise ValueError(
            f"{useless} has no effect here, where weights are quantized and no question is answered: leave it out, and "
            "give it to lmms-eval when the model is evaluated"
        )


def _located(name: str, argument: str) -> str:
    """Return the folder or the hub id that a checkpoint's name leads to; a folder must be whole."""
    if name == DEMO:
        return CHECKPOINT
    path = checkpoints.find(name, argument)
    if Path(path).is_dir():
        _expect_whole(Path(path), argument)
    return path


def _expect_whole(folder: Path, argument: str) -> None:
    """Refuse incomplete weights, which an interrupted download or copy leaves behind."""
    from safetensors import SafetensorError, safe_open

    for file in (folder / name for name in _TOLD if (folder / name).is_file()):
        try:
            read_json(file)
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error
    for file in sorted(folder.glob("*.safetensors.index.json")):
        _expect_shards(file, argument)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{argument}: {file} is damaged or cut off ({error})") from error


def _expect_shards(index: Path, argument: str) -> None:
    """Refuse a weight index that names no files, or files that do not exist."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{argument}: expected the file of each weight under weight_map in {index}")
    for shard in sorted(set(shards.values())):
        if not (index.parent / expect_inside(shard)).is_file():
            raise ValueError(f"{argument}: {index} names {shard}, which is not there")


@cache
def _options(types: tuple[tuple[str, Any], ...]) -> type[Schema]:
    """Return a model class whose fields are the options of a method."""

    def taken(hint: Any) -> Any:
        kinds: list[Any] = [_GIVEN.get(kind, kind) for kind in get_args(hint) if kind is not type(None)]
        return Annotated[kinds[0] | None, BeforeValidator(_nothing)] if len(kinds) == 1 else _GIVEN.get(hint, hint)

    return create_model("Options", __base__=Schema, **{name: (taken(hint), left_out()) for name, hint in types})  # type: ignore[call-overload, no-any-return]
