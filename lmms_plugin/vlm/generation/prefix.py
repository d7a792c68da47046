"""Prefix cache: questions about one image share the encoding of their common prefix.

The prompts of such questions begin alike: system message, image, and often the first words. That prefix goes through
vision tower and language model once; its keys and values are then copied to every question, and `generate` continues
from there with the rest of the prompts. Rows look like this, columns being those of the attention mask:

    0 0 prefix of image A | 0 0 rest of question 1
    0 0 prefix of image A | rest of question 2 ...
    prefix of image B ... | 0 rest of question 3

Nothing here depends on an architecture. `generate` itself runs the prefix, so that positions (three-dimensional ones
too) and masks are those of the model's own code. A comparison of answers decides whether a model may use this: see
`PrefixSharing.verify`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from lmms_plugin.protocol.prompts import Prompt
from lmms_plugin.utils.image_positions import image_token_of
from lmms_plugin.utils.processes.out_of_memory import while_answering
from lmms_plugin.vlm.contracts.engine import Generated
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.generation.decoding import Decoder, generate_of
from lmms_plugin.vlm.generation.pooling import Pooled, Pooling
from lmms_plugin.vlm.generation.processor import Batch, Chat
from lmms_plugin.vlm.generation.self_check import LOW_PRECISION_TOLERANCE, Tolerances, difference, tolerances_of
from lmms_plugin.vlm.kv_cache.cache_layers import RoomyLayer
from lmms_plugin.vlm.kv_cache.quantizer import PLAIN_LAYERS, QuantizedCache

VERIFIED_ROWS = 8
VERIFIED_TOKENS = 32
_FEW = GenerationSettings(max_new_tokens=VERIFIED_TOKENS)


class NotShareable(Exception):
    """Error for prompts or a model that cannot share a prefix; the message completes "because ..."."""


class Shared(NamedTuple):
    """Prompts of several images, encoded for sharing, still on the CPU.

    Attributes:
        prefix: Keyword arguments of the model, one row per image, padded on the left.
        owners: (rows,) row in `prefix` of each prompt's image.
        input_ids: (rows, columns) all prompts, laid out as the module's docstring shows.
        attention_mask: (rows, columns) 1 at tokens, 0 at padding.
    """

    prefix: dict[str, Tensor]
    owners: Tensor
    input_ids: Tensor
    attention_mask: Tensor


class PrefilledPrompts(NamedTuple):
    """Prompts whose prefix has been read.

    Attributes:
        rows: Indices of the prompts.
        inputs: Keyword arguments of the model for them.
        read: Pooled states of their prefixes; None without pooling.
    """

    rows: range
    inputs: dict[str, Any]
    read: Pooled | None


class Encoded(NamedTuple):
    """Groups of prompts, each about the images of its first.

    Attributes:
        batch: First prompt of each group, encoded in full.
        ids: Token ids of every prompt of every group.
    """

    batch: Batch
    ids: list[list[list[int]]]

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of every prompt, images included."""
        return [len(ids) for group in self.ids for ids in group]


def encode_groups(chat: Chat, groups: Sequence[Sequence[Prompt]]) -> Encoded:
    """Encode prompts, processing the images of each group once.

    Raises:
        RequestError: The processor refuses a prompt.
    """
    batch = chat.encode([group[0] for group in groups])
    rows = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    ]
    return Encoded(batch, [_ids_of(chat, group, first) for group, first in zip(groups, rows, strict=True)])


def _ids_of(chat: Chat, group: Sequence[Prompt], first: list[int]) -> list[list[int]]:
    """Return the token ids of a group's prompts, given those of its first with all image placeholders.

    Tokenizers never join text across a special token. So after the last special token that all texts share, which is
    the image's own or a later one, tokens depend on the remaining text alone. The first prompt verifies this: composed
    in this way it must equal the processor's result, otherwise every prompt goes through the processor. So do prompts
    where a question holds a special token, perhaps an image placeholder, which processors refuse.
    """
    texts = [chat.text_of(prompt) for prompt in group]
    cut = _after_last_special(chat.tokenizer, texts[0][: _common(texts)])
    tails = [chat.ids(text[cut:]) for text in texts]
    head = first[: len(first) - len(tails[0])]
    added = chat.tokenizer.added_tokens_decoder
    alike = len({tuple(token for token in tail if token in added) for tail in tails}) == 1
    if cut and alike and head + tails[0] == first:
        return [head + tail for tail in tails]
    encoded = (chat.encode([prompt]).inputs["input_ids"][0].tolist() for prompt in group[1:])
    return [first, *encoded]


def _after_last_special(tokenizer: Any, text: str) -> int:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [position + len(token) for token in special if (position := text.rfind(token)) >= 0]
    return max(ends, default=0)


def _common(rows: Sequence[Sequence[Any]]) -> int:
    """Return the number of leading elements that all rows share."""
    shortest = min(map(len, rows))
    first = rows[0][:shortest]
    for row in rows[1:]:
        while first != row[: len(first)]:
            # Bisecting would be faster and is not needed: prompts of one task diverge in one place.
            first = first[: _differ(first, row)]
    return len(first)


def _differ(first: Sequence[Any], second: Sequence[Any]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def lay_out(encoded: Encoded, image_token: int, pad: int) -> Shared:
    """Split encoded prompts into the prefix that a group shares and the rest.

    Args:
        encoded: Encoded prompts.
        image_token: Id of the image placeholder token.
        pad: Padding id.

    Raises:
        NotShareable: The images of a group come after text in which its prompts differ.
    """
    sizes = [_shared_length(rows, image_token) for rows in encoded.ids]
    prefix = _prefixes(encoded.batch.inputs, sizes, pad)
    width = max(sizes)
    rests = [(g, ids[size:]) for g, (rows, size) in enumerate(zip(encoded.ids, sizes, strict=True)) for ids in rows]
    longest = max(len(rest) for _, rest in rests)
    owners = torch.tensor([owner for owner, _ in rests])
    tails = torch.tensor([[pad] * (longest - len(rest)) + rest for _, rest in rests])
    masks = torch.tensor([[0] * (longest - len(rest)) + [1] * len(rest) for _, rest in rests])
    assert prefix["input_ids"].shape[1] == width
    return Shared(
        prefix,
        owners,
        torch.cat([prefix["input_ids"][owners], tails], dim=1),
        torch.cat([prefix["attention_mask"][owners], masks], dim=1),
    )


def _shared_length(rows: Sequence[list[int]], image_token: int) -> int:
    # At least one token is left over: its logits choose the first token of the answer.
    size = min(_common(rows), min(map(len, rows)) - 1)
    positions = [position for position, token in enumerate(rows[0]) if token == image_token]
    if not positions or positions[-1] >= size:
        raise NotShareable("the prompts differ before the image ends")
    return size


def _prefixes(inputs: Mapping[str, Tensor], sizes: Sequence[int], pad: int) -> dict[str, Tensor]:
    """Cut every row to its prefix and pad on the left again; values that are not one per token stay as they are."""
    mask = inputs["attention_mask"].bool()
    width = max(sizes)
    prefix = {}
    for name, value in inputs.items():
        if value.shape != mask.shape:
            prefix[name] = value
            continue
        prefix[name] = value.new_full((len(sizes), width), pad if name == "input_ids" else 0)
        for row, size in enumerate(sizes):
            prefix[name][row, width - size :] = value[row, mask[row]][:size]
    return prefix


@dataclass
class PrefixSharing:
    """Prefix cache of one model.

    Attributes:
        decoder: Decoder of the model.
        image_token: Id of the image placeholder token.
        verified: Whether the answers have been compared with those computed without sharing.
        off: Reason why prefixes are not shared; None while they are.
        pooling: Pooling of the prefix's hidden states; None if they are not used.
    """

    decoder: Decoder
    image_token: int | None
    pooling: Pooling | None = None
    verified: bool = False
    off: str | None = None
    _said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, decoder: Decoder, wanted: bool = True, pooling: Pooling | None = None) -> PrefixSharing:
        """Set up, checking all that can be checked without running the model."""
        token = image_token_of(decoder.model.config)
        sharing = cls(decoder, token, pooling)
        if not wanted:
            sharing.off = "share_prefix=False"
        elif decoder.static_cache:
            sharing.off = "static_cache=True, where nothing can be put in front of a prompt"
        elif decoder.answers_apart:
            sharing.off = "an encoder-decoder reads the whole prompt before it answers, the question with the image"
        elif "qformer_input_ids" in inspect.signature(decoder.model.forward).parameters:
            sharing.off = "its Q-Former reads the question together with the image"
        elif token is None:
            sharing.off = f"the configuration of {type(decoder.model).__name__} does not name its image token"
        elif strange := {type(layer).__name__ for layer in sharing._new_cache().layers} - _KNOWN_LAYERS:
            sharing.off = f"its cache is not made of keys and values alone ({', '.join(sorted(strange))})"
        return sharing

    def lay_out(self, encoded: Encoded, settings: GenerationSettings) -> Shared:
        """Split prompts into shared prefixes and the rest.

        Args:
            encoded: Encoded prompts.
            settings: Settings of the generation to follow.

        Raises:
            NotShareable: These prompts cannot share a prefix.
        """
        assert self.image_token is not None
        shared = lay_out(encoded, self.image_token, int(self.decoder.model.generation_config.pad_token_id))
        self._check_windows(shared.input_ids.shape[1] + max(settings.max_new_tokens, VERIFIED_TOKENS))
        return shared

    def parts(self, shared: Shared, settings: GenerationSettings, cache_bytes: int) -> Iterator[PrefilledPrompts]:
        """Run the prefixes, and yield which rows to answer next with the keyword arguments of the model for them.

        The keys and values of a part belong to the caller, who should drop them before requesting the next part, to
        make room for it.

        Args:
            shared: Prompts on the model's device.
            settings: Settings of the generation to follow.
            cache_bytes: Largest size of the keys and values of a part; a part is one row at least.

        Raises:
            OutOfMemory: The prefixes, or a part's copies of them, do not fit.
        """
        cache, deltas, read = self._run_prefix(shared.prefix)
        columns = shared.input_ids.shape[1] + settings.max_new_tokens
        rows = len(shared.owners)
        size = max(1, min(rows, cache_bytes // max(1, _bytes_per_token(cache) * columns)))
        parts = -(-rows // size)
        ends = [rows * part // parts for part in range(parts + 1)]
        for start, end in pairwise(ends):
            for module, delta in deltas:
                module.rope_deltas = delta[shared.owners[start:end].to(delta.device)]
            # The yielded value gets no name, which would keep keys and values alive until the next part has its own.
            yield PrefilledPrompts(
                range(start, end),
                self._continuing(shared, slice(start, end), cache, columns),
                read.rows(shared.owners[start:end]) if read is not None else None,
            )

    @staticmethod
    def rewind(inputs: dict[str, Any], columns: int) -> None:
        """Drop the generated tokens from the cache, so that the same arguments of the model can generate again.

        Args:
            inputs: Inputs from `parts`, with which answers were generated; a quantized cache in them is replaced.
            columns: Length of their keys and values before.
        """
        cache = inputs["past_key_values"]
        if isinstance(cache, QuantizedCache) and cache.restart is not None:
            inputs["past_key_values"] = cache.restart()
        else:
            cache.crop(columns - cache.get_seq_length())

    def _continuing(self, shared: Shared, part: slice, cache: DynamicCache, columns: int) -> dict[str, Any]:
        owners = shared.owners[part].to(cache.layers[0].keys.device)
        inputs = {"input_ids": shared.input_ids[part], "attention_mask": shared.attention_mask[part]}
        with while_answering(len(owners)):
            return {**inputs, "past_key_values": self.expanded(cache, owners, columns, inputs)}

    def _check_windows(self, columns: int) -> None:
        windows = [layer.sliding_window for layer in self._new_cache().layers if hasattr(layer, "sliding_window")]
        # Padding between prefix and rest would push tokens out of a sliding window that holds them without sharing.
        if windows and columns > min(windows):
            raise NotShareable(
                f"prompt and answer may take {columns} tokens, and some layers see the last {min(windows)} only"
            )

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.decoder.model.config.get_text_config(decoder=True))

    def _run_prefix(self, prefix: Mapping[str, Tensor]) -> tuple[DynamicCache, list[tuple[Any, Tensor]], Pooled | None]:
        cache = self._new_cache()
        config = GenerationConfig(max_new_tokens=1, do_sample=False)
        pooled = nullcontext([None]) if self.pooling is None else self.pooling.watching(prefix)
        with while_answering(len(prefix["input_ids"])), pooled as found:
            generate_of(self.decoder.model)(**prefix, generation_config=config, past_key_values=cache)
        modules = self.decoder.model.modules()
        deltas = [(m, m.rope_deltas) for m in modules if isinstance(getattr(m, "rope_deltas", None), Tensor)]
        return cache, deltas, found[0]

    def expanded(self, cache: DynamicCache, owners: Tensor, columns: int, inputs: Mapping[str, Tensor]) -> DynamicCache:
        """Return a cache with one copy of a prefix per question; it is quantized once the question is read.

        Args:
            cache: Cache with one row per prefix.
            owners: (questions,), the row of each.
            columns: Number of columns for which each layer has room, those of the prefix included.
            inputs: Whole prompts of the questions: `input_ids` and `attention_mask`.
        """
        quantizer = self.decoder.cache_quantizer
        if quantizer is None:
            expanded = self._new_cache()
        else:
            expanded = quantizer.cache(inputs["input_ids"], inputs["attention_mask"], columns=columns)
            expanded.restart = partial(self.expanded, cache, owners, columns, inputs)
        for index, layer in enumerate(cache.layers):
            if layer.is_initialized:
                if quantizer is None and not layer.is_sliding:
                    expanded.layers[index] = RoomyLayer(columns)
                rows = owners.to(layer.keys.device)
                expanded.update(layer.keys.index_select(0, rows), layer.values.index_select(0, rows), index)
        return expanded

    def verify(self, shared: Shared, plain: Iterable[Mapping[str, Tensor]], cache_bytes: int) -> str | None:
        """Answer a few prompts without sharing, and compare with the scores of the same answers with sharing.

        Where caches are quantized, both are compared without quantization first, and then both with it.

        Args:
            shared: Prompts on the model's device.
            plain: Unshared batches for the first rows of `shared`, in order, on the device.
            cache_bytes: Largest size of a part's cache, as in `parts`.

        Returns:
            None if both agree, otherwise what differs.

        Raises:
            NotShareable: The model looks ahead: its encoding of an image depends on the question about it.
        """
        tolerances = tolerances_of(self.decoder.model)
        if self.decoder.cache_quantizer is None:
            return self._difference(shared, plain, cache_bytes, tolerances)
        plain = list(plain)
        computed = replace(self, decoder=self.decoder.with_plain_cache)
        return computed._difference(shared, plain, cache_bytes, tolerances) or self._quantized_difference(
            shared, plain, cache_bytes
        )

    def _difference(
        self, shared: Shared, plain: Iterable[Mapping[str, Tensor]], cache_bytes: int, tolerances: Tolerances
    ) -> str | None:
        sizes = shared.prefix["attention_mask"].sum(1)[shared.owners.to(shared.input_ids.device)].tolist()
        expected: list[Generated] = []
        keys: list[Tensor] = []
        for inputs in plain:
            cache = self._new_cache()
            answers = self.decoder.generate({**inputs, "past_key_values": cache}, _FEW)
            keys += _prefix_keys(cache, inputs["attention_mask"], sizes[len(expected) :])
            expected += answers
        few = _first(shared, len(expected))
        if (ahead := _ahead(keys, few)) > tolerances.keys:
            raise NotShareable(
                "its attention looks ahead: what it keeps of an image depends on the question "
                f"(keys differ by {ahead:.2g})"
            )
        for part, inputs, _ in self.parts(few, _FEW, cache_bytes):
            found = _prefix_keys(inputs["past_key_values"], inputs["attention_mask"], sizes[part.start :])
            apart = max(_apart(one, keys[row]) for row, one in zip(part, found, strict=True))
            if not apart <= tolerances.keys:
                return f"the keys of the prefix differ by {apart:.2g} of their norm (tolerance {tolerances.keys:g})"
            if told := self._scored_apart(inputs, [expected[row] for row in part], tolerances):
                return told
            del inputs
        return None

    def _quantized_difference(
        self, shared: Shared, plain: Iterable[Mapping[str, Tensor]], cache_bytes: int
    ) -> str | None:
        """Compare answers over quantized caches, where the last bit of a sum can become a step of the grid."""
        expected = [answer for inputs in plain for answer in self.decoder.generate(inputs, _FEW)]
        for part, inputs, _ in self.parts(_first(shared, len(expected)), _FEW, cache_bytes):
            if told := self._scored_apart(inputs, [expected[row] for row in part], LOW_PRECISION_TOLERANCE):
                return told
            del inputs
        return None

    def _scored_apart(
        self, inputs: Mapping[str, Any], expected: Sequence[Generated], tolerances: Tolerances
    ) -> str | None:
        scores = self.decoder.score(inputs, [answer.ids for answer in expected])
        ways = ("by the plain way", "over the shared prefix")
        pairs = zip(expected, scores, strict=True)
        return next(filter(None, (difference(*pair, tolerances.logprob, ways) for pair in pairs)), None)

    def is_news(self, reason: str) -> bool:
        """Return whether a reason not to share is new, whatever the numbers in it."""
        words = "".join(letter for letter in reason if not letter.isdigit())
        is_news = words not in self._said
        self._said.add(words)
        return is_news


_KNOWN_LAYERS = {kind.__name__ for kind in PLAIN_LAYERS}


def _first(shared: Shared, rows: int) -> Shared:
    return shared._replace(
        owners=shared.owners[:rows],
        input_ids=shared.input_ids[:rows],
        attention_mask=shared.attention_mask[:rows],
    )


def _bytes_per_token(cache: DynamicCache) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(
        states[0, :, 0].numel() * states.element_size() for layer in layers for states in (layer.keys, layer.values)
    )


def _prefix_keys(cache: DynamicCache, mask: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return a copy of the keys of each row's prefix, in the last layer that keeps them all; empty if none does.

    Args:
        cache: Cache of rows that begin with padding and then their prefix.
        mask: (rows, columns) attention mask.
        sizes: Numbers of tokens of each row's prefix; more than rows do not matter.
    """
    full = [layer for layer in cache.layers if layer.is_initialized and not layer.is_sliding]
    if not full:
        return [torch.empty(0)] * len(mask)
    starts = (mask != 0).int().argmax(1).tolist()
    rows = zip(full[-1].keys, starts, sizes, strict=False)
    return [keys[:, start : start + size].float().clone() for keys, start, size in rows]


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference as a share of the norm; 0 for nothing."""
    return float((ours - theirs).norm() / theirs.norm()) if len(theirs) else 0.0


def _ahead(keys: Sequence[Tensor], shared: Shared) -> float:
    """Return the relative difference of a prefix's keys under two different questions; 0 if there are no such two."""
    for i, j in combinations(range(len(keys)), 2):
        if shared.owners[i] == shared.owners[j] and not torch.equal(shared.input_ids[i], shared.input_ids[j]):
            return _apart(keys[i], keys[j])
    return 0.0
