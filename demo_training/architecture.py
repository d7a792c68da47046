"""The untrained demo model: an Idefics3 small enough for one CPU core, its tokenizer and its processor.

Everything is built from the classes that load any Idefics3 checkpoint, so the demo takes the path real models take.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from lmms_plugin.demo.scenes import SIDE
from lmms_plugin.protocol.dialects import DIALECTS

DIALECT = DIALECTS["demo"]
PATCH = 16
SHUFFLE = 1
CELLS = SIDE // (PATCH * SHUFFLE)
WIDTH = 128
VOCABULARY = 512

PAD, END, IMAGE = "<pad>", "<end_of_utterance>", "<image>"
_SPECIAL = (PAD, END, IMAGE, "<fake_token_around_image>", "<global-img>", "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_utterance>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `corpus`; any text tokenizes, and every digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(_SPECIAL[2:]),
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    """Pair the tokenizer with an image processor that makes one square of SIDE pixels of any image."""
    images = Idefics3ImageProcessor(
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=CELLS**2, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Idefics3ForConditionalGeneration:
    """Build the model with random weights; the only numbers not random are the 2-D sine position embeddings."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = Idefics3Config(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "initializer_range": WIDTH**-0.5,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
            "initializer_range": WIDTH**-0.5,
            "pad_token_id": pad,
            "bos_token_id": None,
            "eos_token_id": end,
        },
        scale_factor=SHUFFLE,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=end,
        initializer_range=WIDTH**-0.5,
        grounding_dialect=DIALECT.name,
    )
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    positions = model.model.vision_model.embeddings.position_embedding.weight
    with torch.no_grad():
        positions.copy_(0.5 * torch.from_numpy(sine_positions(SIDE // PATCH, WIDTH)))
    model.generation_config.update(
        do_sample=False, max_new_tokens=32, eos_token_id=end, pad_token_id=pad, bos_token_id=None
    )
    return model


def sine_positions(side: int, width: int) -> NDArray[np.float32]:
    """Sines and cosines of the column, then of the row, of every cell of a grid.

    Args:
        side: Cells along each edge.
        width: Length of an embedding, a multiple of four.

    Returns:
        (side², width) float32, cells in row-major order.
    """
    frequency = np.pi / 2 * 2.0 ** np.linspace(0, np.log2(side), width // 4)
    centre = (np.arange(side) + 0.5) / side
    waves = centre[:, None] * frequency
    line = np.concatenate([np.sin(waves), np.cos(waves)], axis=1)
    grid = [np.tile(line, (side, 1)), np.repeat(line, side, axis=0)]
    return np.concatenate(grid, axis=1).astype(np.float32)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, expressions: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of the shared image prefix, and of each question after it up to where the answer starts."""
    block = "<fake_token_around_image><global-img>" + IMAGE * CELLS**2 + "<fake_token_around_image>"
    prefix = tokenizer.encode(f"<|user|>{block}", add_special_tokens=False)
    questions = [f"{DIALECT.ask(e)}{END}<|assistant|>" for e in expressions]
    return prefix, tokenizer(questions, add_special_tokens=False)["input_ids"]
