"""Questions about one image answered over one encoding of it.

The prompts of such questions begin alike: system message, image, and often the first words. That prefix goes through
vision tower and language model once; its keys and values are then given to every question, and `generate` continues
from there with what is left of the prompts. Rows look like this, columns being those of the attention mask:

    0 0 prefix of image A | 0 0 rest of question 1
    0 0 prefix of image A | rest of question 2 ...
    prefix of image B ... | 0 rest of question 3

Nothing here knows an architecture by name. The prefix is run by `generate` itself, so that positions (three-dimensional
ones too) and masks are those of the model's own code. Whether a model's answers may be computed in this way is found
out: see `PrefixSharing.verify`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmms_plugin.chat import Batch, Chat
from lmms_plugin.decoding import Answer, Decoder, explaining_out_of_memory
from lmms_plugin.prompts import Prompt
from lmms_plugin.settings import Settings

# Greatest difference of a log-probability between the two ways, and of the image's keys (relative norm), by the bits of
# the arithmetic: rounding in another order of additions stays well below, a wrong position or mask far above.
TOLERANCES = {torch.float64: (1e-6, 1e-6), torch.float32: (1e-3, 1e-3)}
LOW_PRECISION_TOLERANCE = (0.35, 0.1)
VERIFIED_ROWS = 8
VERIFIED_TOKENS = 32


class NotShareable(Exception):
    """Prompts or a model for which sharing is no way; the message completes "because ..."."""


class Shared(NamedTuple):
    """Prompts of several images, encoded for sharing, still on the CPU.

    Attributes:
        prefix: keyword arguments of the model, one row per image, padded on the left.
        owners: (rows,) for each prompt the row of its image in `prefix`.
        input_ids: (rows, columns) all prompts, laid out as the module's docstring shows.
        attention_mask: (rows, columns) 1 at tokens, 0 at padding.
    """

    prefix: dict[str, Tensor]
    owners: Tensor
    input_ids: Tensor
    attention_mask: Tensor


class Encoded(NamedTuple):
    """Groups of prompts, each about the images of its first.

    Attributes:
        batch: the first prompt of each group, encoded in full.
        ids: token ids of every prompt of every group.
    """

    batch: Batch
    ids: list[list[list[int]]]


def encode_groups(chat: Chat, groups: Sequence[Sequence[Prompt]]) -> Encoded:
    """Encode prompts while looking at the images of each group once.

    Raises:
        RequestError: the processor refuses a prompt.
    """
    batch = chat.encode([group[0] for group in groups])
    rows = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    ]
    return Encoded(batch, [_ids_of(chat, group, first) for group, first in zip(groups, rows, strict=True)])


def _ids_of(chat: Chat, group: Sequence[Prompt], first: list[int]) -> list[list[int]]:
    """Return the token ids of a group's prompts, given those of its first with the image's many placeholders.

    Tokenizers never join text across a special token. So behind the last special token that all texts share, which is
    the image's own or a later one, tokens depend on the remaining text alone. The first prompt is the proof: put
    together in this way it must come out as the processor made it, else every prompt goes through the processor. So
    do they where a question holds a token that is no text, an image's placeholder perhaps, which processors refuse.
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
    """Return how many leading elements all rows share."""
    shortest = min(map(len, rows))
    first = rows[0][:shortest]
    for row in rows[1:]:
        while first != row[: len(first)]:
            # Bisecting would be faster and is not needed: prompts of one task part ways in one place.
            first = first[: _differ(first, row)]
    return len(first)


def _differ(first: Sequence[Any], second: Sequence[Any]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def lay_out(encoded: Encoded, image_token: int, pad: int) -> Shared:
    """Part encoded prompts into what a group shares and the rest.

    Args:
        encoded: the prompts.
        image_token: id of the token that stands for a piece of image.
        pad: id that fills rows up.

    Raises:
        NotShareable: the images of a group lie behind text in which its prompts differ.
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
    """Cut every row to its prefix and pad on the left again; what is not one value per token stays as it is."""
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
    """Answers prompts over shared prefixes, for one model.

    Attributes:
        decoder: the model.
        image_token: id of the token that stands for a piece of image.
        verified: whether the answers were once compared with those of the plain way.
        off: why the plain way is taken; None while prefixes are shared.
    """

    decoder: Decoder
    image_token: int | None
    verified: bool = False
    off: str | None = None
    _said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, decoder: Decoder, wanted: bool = True) -> PrefixSharing:
        """Find out what can be found out without running the model."""
        token = getattr(decoder.model.config, "image_token_id", None)
        sharing = cls(decoder, token)
        if not wanted:
            sharing.off = "share_prefix=False"
        elif decoder.static_cache:
            sharing.off = "static_cache=True, where nothing can be put in front of a prompt"
        elif token is None:
            sharing.off = f"the configuration of {type(decoder.model).__name__} does not name its image token"
        elif strange := {type(layer).__name__ for layer in sharing._new_cache().layers} - _KNOWN_LAYERS:
            sharing.off = f"its cache is not made of keys and values alone ({', '.join(sorted(strange))})"
        return sharing

    def lay_out(self, encoded: Encoded, settings: Settings) -> Shared:
        """Part prompts into what is shared and the rest.

        Args:
            encoded: the prompts.
            settings: of the generation to follow.

        Raises:
            NotShareable: not in the case of these prompts.
        """
        assert self.image_token is not None
        shared = lay_out(encoded, self.image_token, int(self.decoder.model.generation_config.pad_token_id))
        self._check_windows(shared.input_ids.shape[1] + settings.max_new_tokens)
        return shared

    def parts(self, shared: Shared, settings: Settings, cache_bytes: int) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """Run the prefixes, and yield which rows to answer next with the arguments of the model for them.

        The keys and values of a part are the caller's; dropped before the next is asked for, they make room for it.

        Args:
            shared: on the model's device.
            settings: of the generation to follow.
            cache_bytes: how large the keys and values of a part may be; a part is one row at least.

        Raises:
            OutOfMemory: the prefixes do not fit.
        """
        cache, deltas = self._run_prefix(shared.prefix)
        columns = shared.input_ids.shape[1] + settings.max_new_tokens
        rows = len(shared.owners)
        size = max(1, min(rows, cache_bytes // max(1, _bytes_per_token(cache) * columns)))
        parts = -(-rows // size)
        ends = [rows * part // parts for part in range(parts + 1)]
        for start, end in pairwise(ends):
            owners = shared.owners[start:end].to(cache.layers[0].keys.device)
            for module, delta in deltas:
                module.rope_deltas = delta[owners.to(delta.device)]
            yield (
                range(start, end),
                {
                    "input_ids": shared.input_ids[start:end],
                    "attention_mask": shared.attention_mask[start:end],
                    "past_key_values": self._expanded(cache, owners, columns),
                },
            )

    def _check_windows(self, columns: int) -> None:
        windows = [layer.sliding_window for layer in self._new_cache().layers if hasattr(layer, "sliding_window")]
        # Padding between prefix and rest would push tokens out of a window in which the plain way keeps them.
        if windows and columns > min(windows):
            raise NotShareable(
                f"prompt and answer may take {columns} tokens, and some layers see the last {min(windows)} only"
            )

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.decoder.model.config.get_text_config(decoder=True))

    def _run_prefix(self, prefix: Mapping[str, Tensor]) -> tuple[DynamicCache, list[tuple[Any, Tensor]]]:
        cache = self._new_cache()
        config = GenerationConfig(max_new_tokens=1, do_sample=False)
        with explaining_out_of_memory(len(prefix["input_ids"])):
            self.decoder.model.generate(**prefix, generation_config=config, past_key_values=cache)
        modules = self.decoder.model.modules()
        return cache, [(m, m.rope_deltas) for m in modules if isinstance(getattr(m, "rope_deltas", None), Tensor)]

    def _expanded(self, cache: DynamicCache, owners: Tensor, columns: int) -> DynamicCache:
        expanded = self._new_cache()
        for index, layer in enumerate(cache.layers):
            if layer.is_initialized:
                if not layer.is_sliding:
                    expanded.layers[index] = _RoomyLayer(columns)
                rows = owners.to(layer.keys.device)
                expanded.update(layer.keys.index_select(0, rows), layer.values.index_select(0, rows), index)
        return expanded

    def verify(self, shared: Shared, plain: Mapping[str, Tensor], settings: Settings, cache_bytes: int) -> str | None:
        """Answer a few prompts in both ways and compare; done once per run.

        Args:
            shared: on the model's device.
            plain: the arguments of the plain way for the first rows of `shared`, on the device.
            settings: of the task; compared are the beginnings of greedy answers.
            cache_bytes: as in `parts`.

        Returns:
            None if the ways agree, else what differs.

        Raises:
            NotShareable: the model looks ahead: the states of the prefix depend on what follows it.
        """
        rows = len(plain["input_ids"])
        short = min(settings.max_new_tokens, VERIFIED_TOKENS)
        settings = replace(settings, sampling=None, num_beams=1, max_new_tokens=short)
        few = shared._replace(
            owners=shared.owners[:rows],
            input_ids=shared.input_ids[:rows],
            attention_mask=shared.attention_mask[:rows],
        )
        cache = self._new_cache()
        expected = self.decoder.generate({**plain, "past_key_values": cache}, settings)
        logprob, keys = TOLERANCES.get(self.decoder.model.dtype, LOW_PRECISION_TOLERANCE)
        found: list[Answer] = []
        for part, inputs in self.parts(few, settings, cache_bytes):
            if not part.start and (ahead := _drift(cache, plain, inputs["past_key_values"], few)) > keys:
                raise NotShareable(
                    "its attention looks ahead: what it keeps of an image depends on the question "
                    f"(keys differ by {ahead:.2g})"
                )
            found += self.decoder.generate(inputs, settings)
            del inputs
        differences = [_difference(a, b, logprob) for a, b in zip(expected, found, strict=True)]
        return next((difference for difference in differences if difference), None)

    def is_news(self, reason: str) -> bool:
        """Return whether a reason not to share has not been given before, whatever the numbers in it."""
        words = "".join(letter for letter in reason if not letter.isdigit())
        is_news = words not in self._said
        self._said.add(words)
        return is_news


class _RoomyLayer(DynamicLayer):
    """Keys and values with room for the answer: a new token is written behind the others, which stay in place."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self._columns = columns

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, _ = key_states.shape
            self._keys = key_states.new_empty(rows, heads, self._columns, key_states.shape[3])
            self._values = value_states.new_empty(rows, heads, self._columns, value_states.shape[3])
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._columns:
            return super().update(key_states, value_states, *args, **kwargs)
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values


_KNOWN_LAYERS = {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}


def _bytes_per_token(cache: DynamicCache) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(
        states[0, :, 0].numel() * states.element_size() for layer in layers for states in (layer.keys, layer.values)
    )


def _drift(plain: DynamicCache, inputs: Mapping[str, Tensor], shared: DynamicCache, layout: Shared) -> float:
    """Return how far a whole prompt's last keys are from those of its prefix alone, as a share of their norm."""
    full = [i for i, layer in enumerate(plain.layers) if layer.is_initialized and not layer.is_sliding]
    if not full:
        return 0.0
    prefix_mask = layout.prefix["attention_mask"][layout.owners[0]].bool()
    size, width = int(prefix_mask.sum()), len(prefix_mask)
    start = int((inputs["attention_mask"][0] == 0).sum())
    ours = shared.layers[full[-1]].keys[0, :, width - size : width].float()
    theirs = plain.layers[full[-1]].keys[0, :, start : start + size].float()
    return float((ours - theirs).norm() / theirs.norm())


def _difference(expected: Answer, found: Answer, tolerance: float) -> str | None:
    """Compare two answers up to the first token in which they differ.

    There the two chosen tokens must be about equally likely: then rounding may decide between them.
    """
    pairs = zip(expected.tokens, found.tokens, strict=False)
    for position, (a, b) in enumerate(pairs):
        if not abs(a.logprob - b.logprob) <= tolerance:
            return (
                f"token {position + 1} is {a.text!r} with log-probability {a.logprob:.6f} by the plain way and "
                f"{b.text!r} with {b.logprob:.6f} over the shared prefix (tolerance {tolerance:g})"
            )
        if a.text != b.text:
            return None
    if len(expected.tokens) != len(found.tokens):
        return f"answers {expected.text!r} and {found.text!r} differ in length"
    return None
