"""The arguments of our models: what `--model_args` may say, checked before anything is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import BeforeValidator, Field, ValidationError, create_model

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.plans.plan import UNTOUCHED_BITS, QuantPlan
from lmms_plugin.quant_backends.plans.specs import DEFAULT_SAMPLES, Bits
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
_TOLD = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
"""What a checkpoint says of itself; each is a JSON object."""


def _whole(value: Any) -> Any:
    """Undo what lmms-eval does to whole numbers: `-1` arrives as a float, others as text."""
    try:
        return int(float(value)) if isinstance(value, float | str) and float(value).is_integer() else value
    except ValueError:
        return value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float | Path) and not isinstance(value, bool) else value


def _nothing(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() in ("", "none") else value


def _auto(value: Any) -> Any:
    """Take None for `auto` alone: a batch size of nothing is a mistake."""
    if value is None:
        raise ValueError(value)
    return None if value == "auto" else _whole(value)


def _variables(value: Any) -> Any:
    """Read variables by name from JSON, or take them as they are."""
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
"""Type of a method's option → what is taken for it."""


@validated
class ModelArguments:
    """What a user may set with `--model_args name=value,...`.

    Attributes:
        pretrained: id on the Hugging Face hub, path of a checkpoint's folder, or `demo` for the embedded one; an id
            that the hub does not give and the cache does not hold is refused after one question.
        bits: bits per weight of the language model, 2 to 8; 16 for untouched.
        group_size: columns of a weight that share a scale; -1 for a whole row.
        vision_bits: bits of the vision tower.
        connector_bits: bits of the projector between vision tower and language model.
        language_bits: bits of the language model, if not `bits`.
        head_bits: bits of the output projection.
        symmetric: whether zero points are fixed in the middle.
        plan: YAML file with rules per module; replaces the above.
        calibration: where a calibrated method's inputs come from: `self` (the model writes them itself), `noise`,
            `demo`, `photographs` or `dataset:...`; `self` if nothing is said. An error for methods that take none.
        calibration_samples: how many of them.
        resume: whether an interrupted calibration goes on at its last finished block when it is called for again.
        resume_folder: where finished blocks are kept until a calibration is over; by default below the environment
            variable `LMMS_PLUGIN_CACHE`, or beside the Hugging Face cache.
        seed: of calibration and sampling.
        dtype: of the weights that are not quantized and of the arithmetic; `auto` is bfloat16 on a GPU, else float32.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        device_map: as in transformers, for instance `auto` to spread the model over several devices.
        attn_implementation: as in transformers: `sdpa`, `eager`, `flash_attention_2`, ...; by default `sdpa`, on CPU
            and GPU alike, for every model that supports it.
        min_pixels: smallest area to which an image is resized, for processors that resize by area.
        max_pixels: largest such area.
        max_num_frames: how many frames of a video are shown to the model, evenly spaced.
        report: file for the account of every layer, as JSON.
        save_quantized: new folder for the quantized checkpoint, which `quant_prequantized` loads again.
        features: folder for what a learned confidence is trained on (see `lmms_plugin.selector.features`); one per
            model.
        feature_layer: which hidden states those are: -1 for the last, k for those that go into layer k; by default
            the selector's or the last.
        selector: file of a learned confidence (see `lmms_plugin.selector.network`).
        selector_transfer: whether it may have been trained for another model or quantization.
        samples: how many further answers are sampled for each question whose task asks for confidence (boxes, VQA),
            for the estimators of agreement; 0 for none.
        sample_temperature: at which they are drawn.
        verbalised: whether the model is asked in a second turn how sure it is of such an answer.
        system_prompt: the system message, or a file that holds it.
        enable_thinking: whether the model reasons first, where its chat template lets one choose; None leaves it.
        template_args: further variables of the chat template, as JSON: `template_args={"thinking_budget": 512}`.
        dialect: name of the grounding dialect, if not the one of the model's family.
        batch_size: images answered together (requests, where there is none), with all questions about each of them;
            `auto` as many as fit.
        share_prefix: whether questions about one image are answered over one encoding of it.
        static_cache: whether keys and values get a fixed place, with which transformers compiles decoding on a GPU; it
            excludes shared prefixes and takes minutes before the first answer.
        trust_remote_code: whether code that comes with the checkpoint may run.
        use_safetensors: whether weights must come as safetensors.
        options: what the quantization backend alone understands, each given as an argument of its own.
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
    # `calibration=none` says something else than nothing: a calibrated method refuses it.
    calibration: Annotated[_Str | None, BeforeValidator(lambda source: None if source == "" else source)] = None
    calibration_samples: _Any[_Count] = None
    resume: Truth = True
    resume_folder: _Any[_Str] = None
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
    ] = 1
    share_prefix: Truth = True
    static_cache: Truth = False
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
        if self.enable_thinking is not None and "enable_thinking" in (self.template_args or {}):
            raise ValueError("enable_thinking is given twice, by itself and in template_args; say it once")
        self._expect_places()

    def _expect_places(self) -> None:
        if self.resume_folder:
            if not self.resume:
                raise ValueError(f"resume=False keeps nothing, but resume_folder names {self.resume_folder}")
            if Path(self.resume_folder).expanduser().is_file():
                raise ValueError(f"resume_folder: {self.resume_folder} is a file")
        if self.report:
            expect_file("report", Path(self.report).expanduser())
        if self.features:
            expect_folder("features", Path(self.features))
        if self.save_quantized:
            expect_free(self.save_quantized)

    @classmethod
    def parse(cls, given: Mapping[str, Any], option_types: Mapping[str, Any] | None = None) -> ModelArguments:
        """Check names and types of arguments as lmms-eval hands them over.

        Args:
            given: name -> value.
            option_types: what the quantization backend understands besides (see
                `lmms_plugin.quant_backends.option_types`).

        Raises:
            ValueError: an argument is unknown (names the nearest and lists all), or a value is of the wrong kind.
        """
        kind = _options(tuple((option_types or {}).items()))
        own = [one.name for one in fields(cls) if one.name != "options"]
        known = [*own, *kind.model_fields]
        # lmms-eval always passes the first one along; it concerns its own search for a batch size.
        if strange := sorted(given.keys() - {"max_batch_size", *known}):
            raise unknown("model argument", strange[0], known)
        try:
            options = kind(**{name: given[name] for name in kind.model_fields if name in given})
        except ValidationError as error:
            raise ValueError(Problem.of(error, kind).text) from error
        return cls(
            **{name: given[name] for name in own if name in given}, options=options.model_dump(exclude_unset=True)
        )

    def quant_plan(self, default_bits: int) -> QuantPlan:
        """Return what is to be quantized: the language model to `default_bits` if nothing else is said."""
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

    def calibration_spec(self, default_samples: int = DEFAULT_SAMPLES) -> CalibrationSpec | None:
        """Return where calibration inputs come from; None leaves the choice to the method.

        Args:
            default_samples: how many of them if the user named no number.
        """
        if self.calibration is None and self.calibration_samples is None:
            return None
        samples = self.calibration_samples or default_samples
        return CalibrationSpec.parse(self.calibration or "self", samples=samples, seed=self.seed)

    def find_checkpoint(self) -> str:
        """Return the hub id or the folder to load from.

        Raises:
            FileNotFoundError: `pretrained` is written like a path, and no checkpoint is there.
            ValueError: it is neither a folder nor an id, or one of its files is damaged.
        """
        if self.pretrained == DEMO:
            return CHECKPOINT
        path = checkpoints.find(self.pretrained)
        if Path(path).is_dir():
            _expect_whole(Path(path))
        return path

    @property
    def template_variables(self) -> dict[str, Any]:
        """Every variable that the chat template is handed."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**(self.template_args or {}), **thinking}

    def read_system_prompt(self) -> str | None:
        r"""Return the system message, read from its file if it names one; `\n` stands for a line break."""
        if not self.system_prompt:
            return None
        if len(self.system_prompt) < 256 and Path(self.system_prompt).is_file():
            return text_of(Path(self.system_prompt)).strip()
        return self.system_prompt.replace("\\n", "\n")


def read_arguments(text: str) -> dict[str, Any]:
    """Read `name=value,name=value,...` as a user gives it.

    Commas within quotes and brackets part nothing. Values are numbers and truth values where they look like such.

    Raises:
        ValueError: a part has no `=`, a quote or bracket that is never closed swallows further parts, or a name comes
            twice, of which lmms-eval would silently take the last.
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
    """Return the arguments of a finished run as its results file has them: as a mapping, as text, or none at all.

    The text has been through lmms-eval, or another program that let more pass: what has no `=` of its own belongs to
    the value before it, and of several values for one name the last one counts.
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
    """Write the value of an argument as one writes it after `--model_args`; -1.0 is -1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _parts(text: str) -> list[str]:
    """Part a text at its commas, but for those within quotes and brackets."""
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
    """Say whether a quote or bracket swallows commas because nothing closes it; an apostrophe alone swallows none."""
    *_, (_, _, depth, quote) = _nested(part)
    return bool(depth > 0 or quote) and "," in part


def _nested(text: str) -> Iterator[tuple[int, str, int, str]]:
    """Place and character, and how many brackets and which quote are open behind it."""
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


def expect_effect(given: Mapping[str, Any], backend: Backend) -> None:
    """Refuse arguments about weights for a method that leaves all of them as the checkpoint has them.

    Args:
        given: name -> value, as the user gave them.
        backend: the method.

    Raises:
        ValueError: one of them would have no effect.
    """
    useless = [name for name in ("group_size", "symmetric") if name in given]
    if useless and backend.default_bits == UNTOUCHED_BITS:
        raise ValueError(f"{backend.name} takes weights as the checkpoint has them: leave out {useless[0]}")


def _expect_whole(folder: Path) -> None:
    """Refuse weights of which a part is missing, which a download or a copy that broke off leaves behind."""
    from safetensors import SafetensorError, safe_open

    for file in (folder / name for name in _TOLD if (folder / name).is_file()):
        try:
            read_json(file)
        except ValueError as error:
            raise ValueError(f"pretrained: {error}") from error
    for file in sorted(folder.glob("*.safetensors.index.json")):
        _expect_shards(file)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"pretrained: {file} is damaged or cut off ({error})") from error


def _expect_shards(index: Path) -> None:
    """Refuse an index of weights that names none, or files that are not there."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"pretrained: expected the file of each weight under weight_map in {index}")
    for shard in sorted(set(shards.values())):
        if not (index.parent / expect_inside(shard)).is_file():
            raise ValueError(f"pretrained: {index} names {shard}, which is not there")


@cache
def _options(types: tuple[tuple[str, Any], ...]) -> type[Schema]:
    """The options of a method as a model."""

    def taken(hint: Any) -> Any:
        kinds: list[Any] = [_GIVEN.get(kind, kind) for kind in get_args(hint) if kind is not type(None)]
        return Annotated[kinds[0] | None, BeforeValidator(_nothing)] if len(kinds) == 1 else _GIVEN.get(hint, hint)

    return create_model("Options", __base__=Schema, **{name: (taken(hint), left_out()) for name, hint in types})  # type: ignore[call-overload, no-any-return]
