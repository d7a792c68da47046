"""A Llama language model with a byte-level tokenizer as GGUF."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from lmms_plugin.quant_backends.checkpoints.gguf.gguf_content import GgufContent, Tensor, Value
from lmms_plugin.quant_backends.checkpoints.gguf.stored_weights import StoredWeights
from lmms_plugin.quant_backends.checkpoints.gguf.tensor_types import package
from lmms_plugin.utils.files import read_json

ARCHITECTURE = "llama"
_LAYER = {
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Name of a layer's tensor in llama.cpp -> in transformers; queries and keys are turned besides."""
_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_PRE_TOKENIZERS = {"smollm": (_DIGITS, _BYTES), "gpt-2": (_BYTES,)}
"""llama.cpp's name of a way to split text -> the steps of `tokenizers` that split in the same way."""


def text_content(config: Any, weights: StoredWeights, prefix: str, head: str, ends: tuple[int, ...]) -> GgufContent:
    """Return the content of a language model's file.

    Args:
        config: Configuration of the language model, a `LlamaConfig`.
        weights: Of the checkpoint.
        prefix: What the names of its weights begin with.
        head: Name of the output projection's weight; not read where it is that of the embedding.
        ends: Ids of the tokens that end an answer, the first one above all.

    Raises:
        ValueError: It has something that is not written here, or its tokenizer splits in an unknown way.
    """
    _expect_plain(config)
    tied = bool(config.tie_word_embeddings)
    return GgufContent(
        ARCHITECTURE,
        {**_header(config, weights), **_tokenizer(config, weights, ends)},
        [*_tensors(config, weights, prefix, None if tied else head)],
    )


def _expect_plain(config: Any) -> None:
    wanted = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, value in wanted.items():
        if (found := getattr(config, name, value)) != value:
            raise ValueError(f"text_config.{name}: expected {value!r} of what is written as GGUF here, got {found!r}")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_type: expected 'default' of what is written as GGUF here, got {kind!r}")


def _header(config: Any, weights: StoredWeights) -> dict[str, Value]:
    values = {
        "general.type": "model",
        "general.name": weights.folder.name,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.vocab_size": config.vocab_size,
    }
    return {name: Value.of(value) for name, value in values.items()}


def _tokenizer(config: Any, weights: StoredWeights, ends: tuple[int, ...]) -> dict[str, Value]:
    gguf = package()
    told = read_json(weights.folder / "tokenizer.json")
    model, added = told["model"], told["added_tokens"]
    if model.get("type") != "BPE" or told.get("normalizer") is not None:
        raise ValueError(f"{weights.folder}: expected a byte-level BPE without normalizer, got {model.get('type')}")
    texts = {index: text for text, index in model["vocab"].items()} | {one["id"]: one["content"] for one in added}
    controls = {one["id"] for one in added if one["special"]}
    own = {one["id"] for one in added}

    def kind(index: int) -> int:
        known = gguf.TokenType.USER_DEFINED if index in own else gguf.TokenType.NORMAL
        known = known if index in texts else gguf.TokenType.UNUSED
        return int(gguf.TokenType.CONTROL if index in controls else known)

    count = range(config.vocab_size)
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(told),
        "tokenizer.ggml.tokens": [texts.get(index, f"[PAD{index}]") for index in count],
        "tokenizer.ggml.token_type": [kind(index) for index in count],
        "tokenizer.ggml.merges": [one if isinstance(one, str) else " ".join(one) for one in model["merges"]],
        # What begins a prompt stands in the prompt, which is rendered before it is sent.
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    values |= {"tokenizer.ggml.eos_token_id": ends[0]} if ends else {}
    if config.pad_token_id is not None:
        values["tokenizer.ggml.padding_token_id"] = config.pad_token_id
    template = weights.folder / "chat_template.jinja"
    if template.is_file():
        values["tokenizer.chat_template"] = template.read_text(encoding="utf-8")
    return {name: Value.of(value) for name, value in values.items()}


def _pre_tokenizer(told: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a tokenizer splits text."""
    found = told.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    for name, wanted in _PRE_TOKENIZERS.items():
        if len(steps) == len(wanted) and all(
            one.items() <= step.items() for one, step in zip(wanted, steps, strict=True)
        ):
            return name
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise ValueError(f"tokenizer.json: expected a pre-tokenizer of {', '.join(_PRE_TOKENIZERS)}, got {kinds}")


def _tensors(config: Any, weights: StoredWeights, prefix: str, head: str | None) -> Iterator[Tensor]:
    def plain(name: str, source: str) -> Tensor:
        return Tensor(f"{name}.weight", weights.shape(f"{source}.weight"), partial(weights.load, f"{source}.weight"))

    def turned(name: str, source: str, heads: int) -> Tensor:
        one = plain(name, source)
        return one._replace(load=lambda: interleaved(one.load(), heads))

    yield plain("token_embd", f"{prefix}embed_tokens")
    yield plain("output_norm", f"{prefix}norm")
    if head is not None:
        yield plain("output", head.removesuffix(".weight"))
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"blk.{layer}.", f"{prefix}layers.{layer}."
        yield turned(f"{ours}attn_q", f"{theirs}self_attn.q_proj", config.num_attention_heads)
        yield turned(f"{ours}attn_k", f"{theirs}self_attn.k_proj", config.num_key_value_heads)
        for name, source in _LAYER.items():
            yield plain(ours + name, theirs + source)


def interleaved(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Return rows of queries or keys as llama.cpp rotates them: neighbours, where transformers pairs halves of a head.

    Args:
        values: Of shape (heads * size of a head, columns).
        heads: Number of heads.
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
