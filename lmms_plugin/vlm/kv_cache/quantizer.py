"""Quantized caches of one model: whether it can have one, new ones, and what the largest takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from loguru import logger
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmms_plugin.quant_backends.plans.cache_spec import CacheSpec
from lmms_plugin.quant_backends.plans.specs import UNTOUCHED_BITS
from lmms_plugin.utils.image_positions import image_positions, image_token_of
from lmms_plugin.vlm.kv_cache.cache_layers import StoredBits, quantizing
from lmms_plugin.vlm.kv_cache.timetable import Timetable

PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that keep keys and values and nothing else."""

_KEEPS_NOTHING = "DummyLayer"
"""Kind of layers without a state, by its name: transformers 5.17 has none."""


class QuantizedCache(DynamicCache):
    """Cache that quantizes what it keeps.

    Attributes:
        restart: Function that returns the same cache as it was before the first new token; None for an empty one.
    """

    restart: Callable[[], QuantizedCache] | None = None


class CacheSize(NamedTuple):
    """Size of the cache of one prompt when its answer begins.

    Attributes:
        tokens: Number of the prompt's tokens in it.
        elements: Number of elements of their keys and values.
        bits: Bits that these take as stored, scales and zero points included.
    """

    tokens: int
    elements: int
    bits: int

    @property
    def bits_per_element(self) -> float:
        """Return bits per element."""
        return self.bits / self.elements

    @property
    def bytes(self) -> float:
        """Return the size in bytes."""
        return self.bits / 8

    @property
    def dense_bits(self) -> int:
        """Return the size in bits of a cache in 16 bits per element."""
        return self.elements * UNTOUCHED_BITS

    @property
    def dense_bytes(self) -> float:
        """Return the size in bytes of a cache in 16 bits per element."""
        return self.dense_bits / 8


def expect_plain_cache(config: Any, spec: CacheSpec, name: str) -> None:
    """Refuse a model whose cache cannot be quantized as asked, by its configuration alone.

    Args:
        config: Configuration of the whole model.
        spec: Storage asked for.
        name: Name of the model, for messages.

    Raises:
        ValueError: Its cache is not one of keys and values per token, its image tokens are not known, or a group size
            does not divide the size of its heads.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"kv_bits: {name} is an encoder-decoder, which keeps its prompt in a cross-attention cache: that is never "
            "quantized here, and without it nothing of an image would be; leave out kv_* for it"
        )
    text = config.get_text_config(decoder=True)
    if strange := {type(layer).__name__ for layer in DynamicCache(config=text).layers} - {
        *(kind.__name__ for kind in PLAIN_LAYERS),
        _KEEPS_NOTHING,
    }:
        raise ValueError(
            f"kv_bits: expected a model that caches keys and values alone, but {name} has layers that keep other "
            f"states ({', '.join(sorted(strange))}); leave out kv_* for it"
        )
    if spec.image_bits != spec.bits and image_token_of(config) is None:
        raise ValueError(f"kv_image_bits: the configuration of {name} does not name its image token")
    if spec.scaled:
        for width in sorted(_widths(text)):
            spec.group_of(width)


def _widths(text: Any) -> set[int]:
    """Return the sizes of heads that a configuration tells; keys of latent attention have sizes of their own."""
    if getattr(text, "kv_lora_rank", None):
        return set()
    layers = getattr(text, "per_layer_config", None) or [text]
    if told := {width for one in layers if (width := getattr(one, "head_dim", None)) is not None}:
        return told
    hidden, heads = (getattr(text, key, None) for key in ("hidden_size", "num_attention_heads"))
    return {hidden // heads} if isinstance(hidden, int) and isinstance(heads, int) and heads else set()


@dataclass
class CacheQuantizer:
    """Maker of quantized caches.

    Attributes:
        spec: Storage.
        text_config: Configuration of the language model.
        image_token: Id of the image placeholder token; None if the model names none.
        reads_last_apart: Whether the last token of a prompt is read after the others, over their quantized cache; where
            a model cannot do so, the whole prompt is read before anything is quantized.
        settled: Whether it was tried if the model can.
        largest: Size of the cache of the longest prompt so far; None before the first.
    """

    spec: CacheSpec
    text_config: Any
    image_token: int | None
    reads_last_apart: bool
    settled: bool = False
    largest: CacheSize | None = field(default=None, init=False)

    @classmethod
    def of(cls, model: Any, spec: CacheSpec) -> CacheQuantizer:
        """Set up for a loaded model.

        Raises:
            ValueError: The model makes a cache of its own.
        """
        if not model._supports_default_dynamic_cache():
            raise ValueError(
                f"kv_bits: {type(model).__name__} makes a cache of its own, which cannot be quantized here"
            )
        text = model.config.get_text_config(decoder=True)
        # Where `generate` encodes images before it reads a prompt, it can read the prompt in parts.
        return cls(spec, text, image_token_of(model.config), model._supports_mm_encoder_outputs())

    @property
    def computed(self) -> CacheQuantizer:
        """Return a maker of caches that are filled in the same way and keep what the model computed."""
        return replace(self, spec=CacheSpec(UNTOUCHED_BITS, UNTOUCHED_BITS))

    def cache(
        self, input_ids: Tensor, attention_mask: Tensor, *, repeats: int = 1, columns: int | None = None
    ) -> QuantizedCache:
        """Return an empty cache for a batch of prompts.

        Args:
            input_ids: (rows, columns) prompts, the last column of which is no padding.
            attention_mask: (rows, columns) 1 at tokens, 0 at padding.
            repeats: Rows of the cache for each prompt (beams).
            columns: Number of columns for which there is room; None for a cache that grows.
        """
        width = input_ids.shape[1]
        is_image = image_positions(input_ids, self.image_token) & (attention_mask != 0)
        timetable = Timetable(self.spec, attention_mask, is_image, width - int(self.reads_last_apart))
        timetable = timetable if repeats == 1 else timetable.repeated(repeats)
        cache = QuantizedCache(config=self.text_config)
        cache.layers = [
            quantizing(layer, timetable, columns) if isinstance(layer, DynamicLayer) else layer
            for layer in cache.layers
        ]
        return cache

    def note(self, cache: DynamicCache) -> None:
        """Record the size of a cache with which an answer was generated."""
        found = [layer for layer in cache.layers if isinstance(getattr(layer, "stored", None), StoredBits)]
        if not found:
            return
        table = found[0].timetable
        tokens = table.tokens(table.longest, table.read_first)
        if self.largest is None or tokens > self.largest.tokens:
            stored = [layer.stored for layer in found]
            self.largest = CacheSize(tokens, sum(one.elements for one in stored), sum(one.bits for one in stored))

    def totals(self) -> dict[str, float | int]:
        """Return the numbers to log beside results; empty before the first prompt.

        A warning is logged where nothing of the longest prompt was quantized, and so nothing of any.
        """
        if self.largest is None:
            return {}
        if self.largest.bits == self.largest.dense_bits:
            logger.warning(
                "the cache of no prompt was quantized at all, although {} was asked for: the longest has {} tokens, of"
                " which kv_keep={}+{} keeps {}; give a smaller kv_keep or kv_group_size",
                self.spec.name,
                self.largest.tokens,
                self.spec.keep_first,
                self.spec.keep_last,
                min(self.largest.tokens, self.spec.keep_first + self.spec.keep_last),
            )
        return {
            "kv_bits_per_element": self.largest.bits_per_element,
            "kv_tokens": self.largest.tokens,
            "kv_bytes": self.largest.bytes,
            "kv_bytes_16_bits": self.largest.dense_bytes,
        }
