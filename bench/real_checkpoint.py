"""What `bench.real_weights` reads: a checkpoint with a trained language model, and texts to calibrate on.

    python -m bench.real_checkpoint GGUF FOLDER

GGUF is a Llama-like chat model of `<|im_start|>` turns, such as SmolLM2-135M-Instruct; nothing is downloaded. It gets a
made-up vision tower, whose features are mixtures of the embeddings of some words, and is written to FOLDER/model as a
LLaVA. FOLDER/captions holds pairs of a crop of scikit-learn's photographs and some paragraphs of the help that Python
comes with, shuffled: `calibration=dataset:FOLDER/captions:split=train:image=image:text=caption:n=64`.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

SIDE, PATCH, WIDTH = 112, 14, 64
VOCABULARY_STEP = 64
WORDS = (
    " red green blue white black dark bright tree sky temple roof flower petal pink leaf garden grass wall stone water"
    " cloud light shadow square circle triangle line corner left right top bottom photograph image picture"
)
CHARACTERS = (900, 1300)
"""A text has paragraphs until it is as long as the first number, and is cut at the second."""
SAMPLES = 128


def paragraphs() -> list[str]:
    """Return the paragraphs of plain prose in Python's help topics, each once."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for _, text in sorted(topics.items()):
        for part in re.split(r"\n\s*\n", text):
            line = re.sub(r"\s+", " ", part).strip()
            letters = sum(each.isalpha() or each == " " for each in line)
            if len(line.split()) >= 25 and letters > 0.93 * len(line) and line.endswith("."):
                found[line] = None
    return list(found)


def captions(samples: int, seed: int = 0) -> Iterator[str]:
    """Yield texts of about 1,000 characters, some paragraphs each."""
    pool = paragraphs()
    draw = random.Random(seed)
    for _ in range(samples):
        text = ""
        while len(text) < CHARACTERS[0]:
            text += draw.choice(pool) + "\n\n"
        yield text[: CHARACTERS[1]].strip()


def write_captions(folder: Path) -> None:
    """Write pairs of a crop and a text as a parquet file."""
    import datasets

    from lmms_plugin.quant_backends.calibration import photographs

    texts = list(captions(SAMPLES))
    shown = photographs.load()
    images = [photographs.crop(shown, np.random.default_rng(number))[0] for number in range(SAMPLES)]
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict({"image": images, "caption": texts}, features=features)
    rows.to_parquet(str(folder / "train.parquet"))


@torch.no_grad()
def with_vision(language: Any, tokenizer: Any) -> hf.LlavaForConditionalGeneration:
    """Return a LLaVA around a language model, with random vision weights and a projector onto embeddings of words."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = language.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "architectures", "transformers_version"):
        text.pop(key, None)
    text["vocab_size"] = -(-len(tokenizer) // VOCABULARY_STEP) * VOCABULARY_STEP
    vision = {"model_type": "clip_vision_model", "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
    config = hf.LlavaConfig(
        text_config=text,
        vision_config=vision | {"projection_dim": WIDTH},
        image_token_index=image,
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model = hf.LlavaForConditionalGeneration(config).eval()
    trained = dict(language.model.state_dict())
    known = trained.pop("embed_tokens.weight")
    model.model.language_model.load_state_dict(trained, strict=False)
    embedding = model.model.language_model.embed_tokens.weight
    embedding.copy_(known.mean(0).expand_as(embedding))
    embedding[: len(known)] = known
    model.tie_weights()
    for parameter in model.model.vision_tower.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5)
    ids = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    first.weight.normal_(0, WIDTH**-0.5)
    first.bias.fill_(-1.0)
    # A feature is a mixture of embeddings that the language model knows, about four times as long as one of them.
    second.weight.copy_(known[[ids[column % len(ids)] for column in range(second.in_features)]].T / 24)
    second.bias.zero_()
    return model


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """Write the checkpoint."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from helpers.families import ASSISTANT, QWEN_CLOSING, QWEN_OPENING, chat_template

    tokenizer = hf.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    language = hf.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.padding_side = "left"
    model = with_vision(language, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    size = {"height": SIDE, "width": SIDE}
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(QWEN_OPENING, QWEN_CLOSING, ASSISTANT, image="<image>\n", text="{{ part.text }}"),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def main() -> None:
    """Write checkpoint and texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    write_checkpoint(arguments.gguf.resolve(), arguments.folder / "model")
    write_captions(arguments.folder / "captions")


if __name__ == "__main__":
    main()
