"""Conversion of prompts to a model's input tensors by the checkpoint's own processor and chat template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.video_utils import VideoMetadata, load_video

from lmms_plugin.protocol import chat_templates
from lmms_plugin.protocol.prompts import Colour, Message, Prompt, RequestError, mean_colour, naming, placeholder
from lmms_plugin.protocol.reasoning import left_open
from lmms_plugin.protocol.response import Size
from lmms_plugin.vlm.generation.pooling import Pooled

_PROBE = "a system message of no other use"
_TURN_HEADER = 64
"""Characters at the end of a prompt within which a template opens reasoning, where its last words are not found."""


class Batch(NamedTuple):
    """Prompts ready for the model.

    Attributes:
        inputs: Keyword arguments of the model, one row per prompt, padded on the left, or on the right for an
            encoder-decoder.
        model_sizes: (width, height) in pixels of each prompt's only image as the model sees it; None where the
            processor does not tell or there is not exactly one image.
        read: Pooled states of the part of the prompts that has been read already; None where there are none.
    """

    inputs: dict[str, Tensor]
    model_sizes: list[Size | None]
    read: Pooled | None = None


@dataclass(frozen=True)
class Chat:
    """Processor of a checkpoint, set up for padded batches.

    Attributes:
        processor: Processor of any image-text-to-text checkpoint.
        max_num_frames: Largest number of frames of a video.
        answers_apart: Whether an answer does not continue the prompt, as with an encoder-decoder.
        template_variables: Variables of the chat template besides the messages.
    """

    processor: Any
    max_num_frames: int = 32
    answers_apart: bool = False
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    # A fast tokenizer sets its padding anew for each call; another thread must not see the intermediate state.
    _lock: Any = field(default_factory=RLock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Encoders may count positions from the first column, padding or not (BART in Florence-2); what a decoder
        # continues ends at the last one.
        self.tokenizer.padding_side = "right" if self.answers_apart else "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def tokenizer(self) -> Any:
        """Return the text half of the processor."""
        return self.processor.tokenizer

    @property
    def has_template(self) -> bool:
        """Return whether the checkpoint has a chat template; without one prompts are passed unchanged."""
        return chat_templates.text_of(self.processor) is not None

    @property
    def places_images(self) -> bool:
        """Return whether the processor itself puts an image's tokens before the text, as those of BLIP-2 do."""
        return hasattr(self.processor, "num_query_tokens")

    @property
    def background(self) -> Colour:
        """Return the image processor's mean colour, which normalisation turns into zeros."""
        return mean_colour(self.processor)

    def set_pixel_limits(self, least: int | None, most: int | None) -> None:
        """Set the smallest and largest area to which images are resized; None leaves a limit as it is.

        Raises:
            ValueError: This processor does not resize by area.
        """
        if least is None and most is None:
            return
        images = self.processor.image_processor
        if "max_pixels" not in getattr(getattr(images, "valid_kwargs", None), "__annotations__", {}):
            raise ValueError(
                f"min_pixels and max_pixels are of no use here: {type(images).__name__} has no such limits"
            )
        low, high = images.size["shortest_edge"], images.size["longest_edge"]
        images.size = type(images)(min_pixels=least or low, max_pixels=most or high).size

    def image_token_limits(self) -> tuple[int, int] | None:
        """Return the fewest and most tokens of an image; None where this processor does not resize by area."""
        images = self.processor.image_processor
        patch = getattr(images, "patch_size", None)
        if "max_pixels" not in getattr(getattr(images, "valid_kwargs", None), "__annotations__", {}) or not patch:
            return None
        pixels = (patch * getattr(images, "merge_size", 1)) ** 2
        return math.ceil(images.size["shortest_edge"] / pixels), images.size["longest_edge"] // pixels

    def expect_system_prompts(self) -> None:
        """Check that a system message reaches the model.

        Raises:
            ValueError: The chat template drops system messages.
        """
        if not self.has_template:
            return
        system = {"role": "system", "content": [{"type": "text", "text": _PROBE}]}
        user = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
        if _PROBE not in self._rendered([system, user]):
            raise ValueError("system_prompt: the chat template of this checkpoint drops system messages")

    def encode(self, prompts: Sequence[Prompt]) -> Batch:
        """Encode prompts of one kind (see `kind`) as model inputs on the CPU.

        Raises:
            RequestError: The processor refuses a prompt; the message names the documents.
        """
        names = "; ".join(prompt.name for prompt in prompts)
        try:
            with self._lock:
                inputs = self._raw(prompts) if prompts[0].raw else self._templated(prompts)
        except RequestError:
            raise
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise RequestError(f"{names}: {type(self.processor).__name__} refuses this: {error}") from error
        # PaliGemma's processor adds labels, with which the model would compute a loss.
        inputs.pop("labels", None)
        self.expect_images(prompts, inputs)
        return Batch(inputs, self._model_sizes(prompts, inputs))

    def expect_images(self, prompts: Sequence[Prompt], inputs: dict[str, Tensor]) -> None:
        """Check that every prompt holds the tokens that its images take."""
        token = getattr(self.processor, "image_token_id", None)
        if token is None or not prompts[0].images or prompts[0].videos:
            return
        grids = iter(inputs["image_grid_thw"].tolist()) if "image_grid_thw" in inputs else None
        merged = getattr(self.processor.image_processor, "merge_size", 1) ** 2
        for prompt, row in zip(prompts, inputs["input_ids"], strict=True):
            held = int((row == token).sum())
            # Where the processor does not tell how many tokens an image takes, it is one at least.
            images = len(prompt.images)
            takes = images if grids is None else sum(math.prod(next(grids)) // merged for _ in prompt.images)
            if held < takes or (grids is not None and held > takes):
                raise RequestError(
                    f"{prompt.name}: the prompt holds {held} image tokens where its {images} images take {takes}: "
                    "the chat template does not show them all"
                )

    def text_of(self, prompt: Prompt) -> str:
        """Return the prompt as the model reads it, with one placeholder per image."""
        if prompt.raw:
            return self._raw_text(prompt)
        return self._rendered(prompt.messages)

    def _rendered(self, messages: Sequence[Message]) -> str:
        text: str = self.processor.apply_chat_template(
            list(messages), add_generation_prompt=True, **self.template_variables
        )
        return text

    def continued_by(self, prompt: Prompt, answer: str) -> str:
        """Return the prompt with an answer as the template shows it, up to the answer's end and not closed.

        Raises:
            ValueError: The template does not show the answer as it is.
        """
        message = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        text: str = self.processor.apply_chat_template(
            [*prompt.messages, message], continue_final_message=True, **self.template_variables
        )
        return text

    def opened_by(self, prompt: Prompt) -> str:
        """Return the tag of a reasoning block that the template opens after a prompt's last words; "" if none."""
        if prompt.raw:
            return ""
        text = self.text_of(prompt)
        words = prompt.last_words
        asked = text.rfind(words) if words else -1
        # Tags within the words themselves open nothing.
        return left_open(text[asked + len(words) :] if asked >= 0 else text[-_TURN_HEADER:])

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens added."""
        with self._lock:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def spell(self, index: int) -> str:
        """Return the text of one token, special ones included."""
        text: str = self.tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def continuation_ids(self, prompt: Prompt, last: int, continuation: str) -> list[int]:
        """Return the token ids of a text that follows a prompt.

        Where the prompt ends in white space, the continuation's leading spaces (lmms-eval's delimiter between question
        and choice) are dropped: the model would not write them either.

        Args:
            prompt: Prompt as encoded.
            last: Last token of the prompt.
            continuation: Text that follows it.
        """
        if self.answers_apart:
            return self.ids(continuation.lstrip(" "))
        before = self.text_of(prompt)
        if self.tokenizer.decode([last])[-1:].isspace():
            continuation = continuation.lstrip(" ")
            # Some processors end a raw prompt with a line break that is not in its text.
            before = before if before[-1:].isspace() else before + "\n"
        context, whole = self.ids(before), self.ids(before + continuation)
        if whole[: len(context)] == context:
            return whole[len(context) :]
        return self.ids(continuation)

    def _templated(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        options: dict[str, Any] = {"padding": True}
        conversations = [[dict(message) for message in prompt.messages] for prompt in prompts]
        if prompts[0].videos:
            self._expect_video(prompts[0])
            conversations, metadata = self._with_frames(prompts)
            options |= {"video_metadata": metadata, "do_sample_frames": False}
        return dict(
            self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=options,
                **self.template_variables,
            )
        )

    def _expect_video(self, prompt: Prompt) -> None:
        if getattr(self.processor, "video_processor", None) is None:
            raise RequestError(
                f"{prompt.name}: {type(self.processor).__name__} has no way to show a video to its model"
            )

    def _with_frames(self, prompts: Sequence[Prompt]) -> tuple[list[list[dict[str, Any]]], list[list[VideoMetadata]]]:
        conversations, metadata = [], []
        for prompt in prompts:
            videos = [self.frames(path, prompt.name) for path in prompt.videos]
            frames = iter([frames for frames, _ in videos])
            conversations.append(
                [
                    {
                        "role": message["role"],
                        "content": [
                            {**part, "video": next(frames)} if part["type"] == "video" else part
                            for part in message["content"]
                        ],
                    }
                    for message in prompt.messages
                ]
            )
            metadata.append([about for _, about in videos])
        return conversations, metadata

    def frames(self, path: str, name: str) -> tuple[Any, VideoMetadata]:
        """Decode evenly spaced frames with PyAV, which lmms-eval installs, unlike transformers' default decoder."""

        def spaced(metadata: VideoMetadata, **_: Any) -> Any:
            count = min(self.max_num_frames, metadata.total_num_frames)
            return torch.linspace(0, metadata.total_num_frames - 1, count).round().long().numpy()

        with naming(name, "its video cannot be decoded", ValueError):
            frames, metadata = load_video(path, backend="pyav", sample_indices_fn=spaced)
        return frames, metadata

    def _raw(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        if self.places_images:
            return self._placed(prompts)
        texts = [self._raw_text(prompt) for prompt in prompts]
        if prompts[0].videos:
            raise RequestError(f"{prompts[0].name}: a prompt without chat template cannot hold a video")
        if prompts[0].images:
            images = [prompt.images for prompt in prompts]
            return dict(self.processor(text=texts, images=images, padding=True, return_tensors="pt"))
        begun = [(self.tokenizer.bos_token or "") + text for text in texts]
        inputs = dict(self.tokenizer(begun, add_special_tokens=False, padding=True, return_tensors="pt"))
        if "token_type_ids" in self.processor.model_input_names:
            # PaliGemma marks its prompt so; without it, transformers' attention is causal or bidirectional, by padding.
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def _placed(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        for prompt in prompts:
            if prompt.videos or len(prompt.images) > 1:
                raise RequestError(
                    f"{prompt.name}: {type(self.processor).__name__} shows its model one image, got "
                    f"{len(prompt.images)} and {len(prompt.videos)} videos"
                )
        texts = [prompt.text for prompt in prompts]
        if not prompts[0].images:
            return dict(self.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
        images = [prompt.images[0] for prompt in prompts]
        return _aligned(dict(self.processor(text=texts, images=images, padding=True, return_tensors="pt")))

    def _raw_text(self, prompt: Prompt) -> str:
        return self._placeholder * len(prompt.images) + prompt.text if prompt.images else prompt.text

    @cached_property
    def _placeholder(self) -> str:
        with self._lock:
            return placeholder(self.processor)

    def _model_sizes(self, prompts: Sequence[Prompt], inputs: dict[str, Tensor]) -> list[Size | None]:
        if "image_grid_thw" not in inputs:
            return [None] * len(prompts)
        patch = self.processor.image_processor.patch_size
        grids = iter(inputs["image_grid_thw"].tolist())
        sizes = [[next(grids) for _ in prompt.images] for prompt in prompts]
        return [(mine[0][2] * patch, mine[0][1] * patch) if len(mine) == 1 else None for mine in sizes]


def _aligned(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move padding to where it does not separate tokens.

    In a language model's prompt that is the left, and not the place between image and text. A Q-Former that reads the
    question is a BERT, which counts positions from the first column.
    """
    aligned = inputs | _moved(inputs, "input_ids", "attention_mask", to_right=False)
    if "qformer_input_ids" in inputs:
        aligned |= _moved(inputs, "qformer_input_ids", "qformer_attention_mask", to_right=True)
    return aligned


def _moved(inputs: dict[str, Tensor], ids: str, mask: str, *, to_right: bool) -> dict[str, Tensor]:
    order = inputs[mask].argsort(dim=1, descending=to_right, stable=True)
    return {name: inputs[name].gather(1, order) for name in (ids, mask)}


def kind(prompt: Prompt) -> tuple[Any, ...]:
    """Return the kind of a prompt; prompts of one batch share it, since processors take all rows with images or none.

    A prompt with a video goes alone, because families disagree on how to batch videos of different lengths.
    """
    alone = prompt.name if prompt.videos else ""
    return (prompt.raw, bool(prompt.images), alone)
