"""Set-up from arguments: device, precision, processor and prompts, and the kind of responder for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from loguru import logger
from transformers import AutoProcessor

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.protocol import chat_templates
from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.protocol.plain_prompts import TEMPLATES, template_for
from lmms_plugin.protocol.prompts import PromptReader
from lmms_plugin.quant_backends.layers.kernels import default_dtype
from lmms_plugin.utils.checkpoints import config_of
from lmms_plugin.utils.reading.readable import readable
from lmms_plugin.vlm.assembling import Assembler
from lmms_plugin.vlm.contracts.responding import Responder
from lmms_plugin.vlm.generation.observer import Wanted
from lmms_plugin.vlm.generation.processor import Chat
from lmms_plugin.vlm.jobs import Generation
from lmms_plugin.vlm.kv_cache.quantizer import CacheQuantizer
from lmms_plugin.vlm.local_engine import LocalEngine
from lmms_plugin.vlm.reference_model import ReferenceModel
from lmms_plugin.vlm.retrieval import AT_ONCE, Matcher, Retrieval, is_matcher


def responder_of(
    model: Any,
    chat: Chat,
    reader: PromptReader,
    *,
    arguments: ModelArguments,
    wanted: Wanted | None = None,
    cache_quantizer: CacheQuantizer | None = None,
    rank: int = 0,
    processes: int = 1,
    facts: Mapping[str, Any] | None = None,
    reference: Any = None,
) -> Responder:
    """Return the responder of a loaded model: it generates text, or it scores captions.

    Args:
        model: Model as loaded by transformers.
        chat: Processor of the model.
        reader: Reader that converts messages to prompts.
        arguments: Arguments of the model.
        wanted: Requested use of hidden states; None for none.
        cache_quantizer: Maker of quantized caches; None for caches as the model has them.
        rank: Rank of this process; the first one logs.
        processes: Number of processes that share the requests.
        facts: Facts about the model, which travel with answers of the first process.
        reference: Loaded model whose answers are forced through this one; None for none.

    Raises:
        ValueError: The model can do neither, or does not support the requested use of hidden states.
    """
    if is_matcher(model):
        expect_uses(arguments, hidden_states=wanted is not None)
        matcher = Matcher(model, chat.processor, arguments.batch_size or AT_ONCE)
        return Retrieval(matcher, reader, str(arguments.pretrained), processes)
    engine = LocalEngine.of(
        model, chat, reader, arguments=arguments, wanted=wanted, cache_quantizer=cache_quantizer, rank=rank
    )
    speaks = rank == 0
    assembler = Assembler(
        engine.traits,
        reader.dialect,
        str(arguments.pretrained),
        warns=speaks,
        facts=facts if facts and speaks else {},
        keeps_ids=arguments.parity,
        spell=chat.spell,
    )
    forced = None if reference is None else ReferenceModel.of(reference, engine, chat, reader, arguments).forced
    return Generation(engine, assembler, verbalised=arguments.verbalised, shows_progress=speaks, forced=forced)


def expect_uses(arguments: ModelArguments, *, hidden_states: bool) -> None:
    """Refuse what a retrieval checkpoint cannot do.

    Args:
        arguments: Arguments of the model.
        hidden_states: Whether a use of hidden states is requested.

    Raises:
        ValueError: One of the arguments asks for it.
    """
    named = f"{arguments.pretrained} is a retrieval checkpoint"
    if hidden_states:
        raise ValueError(f"features, selector: {named}, which writes no answers")
    if arguments.cache_spec is not None:
        raise ValueError(f"kv_bits: {named}, which caches nothing")
    if arguments.reference is not None:
        raise ValueError(f"reference: {named}, which writes no answers")


def device_of(arguments: ModelArguments, accelerator: Accelerator) -> torch.device:
    """Choose the device: with several processes each has its own, and alone the user's choice or the best one."""
    if accelerator.num_processes > 1 and arguments.device_map is not None:
        raise ValueError(
            f"device_map spreads one model over all devices and cannot be combined with {accelerator.num_processes} "
            "processes, which have one each"
        )
    if accelerator.num_processes > 1 or arguments.device == "auto":
        return torch.device(accelerator.device)
    return torch.device(arguments.device)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of that name; `auto` is the device's own."""
    if name == "auto":
        return default_dtype(device.type)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def chat_of(path: str, arguments: ModelArguments) -> tuple[Chat, PromptReader]:
    """Load a checkpoint's processor and determine its prompt format.

    Raises:
        ValueError: A file of it is damaged, or it cannot be asked as the arguments say.
    """
    name = str(arguments.pretrained)
    remote = {"trust_remote_code": arguments.trust_remote_code}
    config = config_of(path, **remote)
    declared = arguments.dialect or getattr(config, "grounding_dialect", None)
    dialect = dialect_for(config.model_type, declared)
    with readable(f"{path}: its processor or tokenizer"):
        processor = AutoProcessor.from_pretrained(path, **remote)
    plain, apart = template_for(processor), bool(getattr(config, "is_encoder_decoder", False))
    templated = chat_templates.is_for(processor, dialect)
    chat_templates.adopt(processor, dialect, name)
    if apart and plain is None:
        raise ValueError(
            f"{name} is an encoder-decoder ({config.model_type}), none of those that are supported: "
            f"{', '.join(TEMPLATES)}"
        )
    variables = arguments.template_variables
    chat_templates.expect_variables(processor, variables, name)
    chat = Chat(processor, arguments.max_num_frames, answers_apart=apart, template_variables=variables)
    if templated and chat.has_template:
        chat_templates.expect_images_shown(processor, variables, name)
    elif templated:
        logger.warning(
            "{} brings no chat template: it is asked in plain words behind the tokens of its images. If it was "
            "taught to chat, its answers say little; put its template into the folder as chat_template.jinja",
            name,
        )
    if chat.places_images and None in (processor.num_query_tokens, config.image_token_id):
        raise ValueError(
            f"{name} is of the time before processors put images into prompts: expected num_query_tokens in its "
            "processor_config.json and image_token_index in its config.json"
        )
    chat.set_pixel_limits(arguments.min_pixels, arguments.max_pixels)
    system_prompt = arguments.read_system_prompt()
    if system_prompt:
        chat.expect_system_prompts()
    if system_prompt and plain is not None:
        raise ValueError(f"system_prompt: {name} has no chat template, and its family knows no system message")
    return chat, PromptReader(dialect, system_prompt, chat.background, raw=not chat.has_template, plain=plain)
