"""Tiny checkpoints of real vision-language architectures, built from config and saved like downloaded ones.

Each directory holds safetensors weights, a tokenizer trained here, the image (and video) processor and the chat
template of the family, so that everything that loads a checkpoint from disk can be run offline in a second. The
weights are random but wide: answers vary from token to token and depend on the image.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

IMAGE_SIZE = 56
PATCH = 14

QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>")
QWEN_TOKENS += ("<|box_start|>", "<|box_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
QWEN_TOKENS += ("<|image_pad|>", "<|video_pad|>")
TILE_TOKENS = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)))

CORPUS = (
    "Locate the red circle to the left of the blue square. Where is the man in the white shirt?",
    "Please provide the bounding box coordinate of the region this sentence describes: the dog on the right.",
    "Output a JSON list of objects with bbox_2d and label. Describe the image in one short sentence.",
    "What is shown here? Answer yes or no. The answer is 0 1 2 3 4 5 6 7 8 9 10 20 30 40 50 60 70 80 90 100.",
)


def chat_template(
    opening: str, closing: str, reply: str, *, start: str = "", turns: str = "", grouped: bool = False, **parts: str
) -> str:
    """A chat template in Jinja.

    Args:
        opening: what opens a turn.
        closing: what closes it.
        reply: what asks for an answer.
        start: what stands before all turns.
        turns: which of them are written, as a condition; all by default.
        grouped: whether all parts of one kind stand before those of the next.
        parts: kind of a part → what is written for it.
    """
    if grouped:
        body = "".join(
            f"{{% for part in parts if part.type == '{kind}' %}}{piece}{{% endfor %}}" for kind, piece in parts.items()
        )
    else:
        pieces = (f"{{% if part.type == '{kind}' %}}{piece}{{% endif %}}" for kind, piece in parts.items())
        body = f"{{% for part in parts %}}{''.join(pieces)}{{% endfor %}}"
    as_parts = "[{'type': 'text', 'text': turn.content}] if turn.content is string else turn.content"
    turn = f"{{% set parts = {as_parts} %}}{opening}{body}{closing}"
    ask = f"{{% if add_generation_prompt %}}{reply}{{% endif %}}"
    return f"{start}{{% for turn in messages {turns} %}}{turn}{{% endfor %}}{ask}"


TEXT = "{{ part.text }}"
ASSISTANT = "<|im_start|>assistant\n"
QWEN_OPENING, QWEN_CLOSING = "<|im_start|>{{ turn.role }}\n", "<|im_end|>\n"
UNTOLD = (
    "{% if loop.first and turn.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
QWEN_PARTS = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")} | {"text": TEXT}
QWEN_TEMPLATE = chat_template(UNTOLD + QWEN_OPENING, QWEN_CLOSING, ASSISTANT, **QWEN_PARTS)
QWEN3_TEMPLATE = chat_template(QWEN_OPENING, QWEN_CLOSING, ASSISTANT, **QWEN_PARTS)
INTERNVL_TEMPLATE = chat_template(
    QWEN_OPENING, QWEN_CLOSING, ASSISTANT, image="<IMG_CONTEXT>\n", video="<video>\n", text=TEXT
)
ONEVISION_TEMPLATE = chat_template(
    "<|im_start|>{{ turn.role }} ",
    "<|im_end|>",
    ASSISTANT,
    grouped=True,
    image="<image>",
    video="<video>",
    text="{{ '\n' ~ part.text }}",
)
LLAVA_TEMPLATE = chat_template(
    "{{ turn.role | upper ~ ': ' if turn.role != 'system' }}",
    "",
    "ASSISTANT:",
    grouped=True,
    image="<image>\n",
    text="{{ part.text ~ ' ' }}",
)
GEMMA_TEMPLATE = chat_template(
    "<start_of_turn>{{ 'model' if turn.role == 'assistant' else turn.role }}\n"
    "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content[0].text ~ '\n\n' }}{% endif %}",
    "<end_of_turn>\n",
    "<start_of_turn>model\n",
    start="{{ bos_token }}",
    turns="if turn.role != 'system'",
    image="<start_of_image>",
    text="{{ part.text | trim }}",
)


def idefics_template(start: str) -> str:
    opening = "{{ turn.role | capitalize }}:{{ ' ' if parts[0].type != 'image' }}"
    parts = {"text": TEXT, "image": "<image>", "video": "<video>"}
    return chat_template(opening, "<end_of_utterance>\n", "Assistant:", start=start, **parts)


def byte_level_tokenizer(special: Sequence[str], **roles: Any) -> hf.PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (the kind of GPT-2, Qwen and SmolLM)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_special_tokens(tokenizer, special, **roles)


def sentencepiece_tokenizer(special: Sequence[str], *, prefix_space: bool, **roles: Any) -> hf.PreTrainedTokenizerFast:
    """Return a BPE tokenizer with byte fallback and `▁` for spaces (the kind of Llama and Gemma)."""
    vocabulary, merges = _learn_pieces()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if prefix_space:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return _with_special_tokens(tokenizer, special, begins_with_bos=True, **roles)


def _learn_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=143, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    return {piece: index for index, piece in enumerate(pieces)}, [tuple(merge) for merge in learned["merges"]]


def _with_special_tokens(
    tokenizer: Tokenizer, special: Sequence[str], *, begins_with_bos: bool = False, **roles: Any
) -> hf.PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if begins_with_bos:
        bos = roles["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **roles)


def _text(tokenizer: hf.PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": math.ceil(len(tokenizer) / 32) * 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }


def _vision(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        **changes,
    }


def _square(side: int = IMAGE_SIZE) -> dict[str, int]:
    return {"height": side, "width": side}


def _pixels(patch: int) -> dict[str, int]:
    return {"shortest_edge": (4 * patch) ** 2, "longest_edge": (8 * patch) ** 2}


def _qwen_ids(tokenizer: hf.PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    names |= {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _qwen2_vl() -> tuple[Any, Any]:
    tokenizer = byte_level_tokenizer(QWEN_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
    config = hf.Qwen2VLConfig(
        text_config=_text(tokenizer, rope_parameters=rope), vision_config=vision, **_qwen_ids(tokenizer)
    )
    processor = hf.Qwen2VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=_pixels(PATCH)),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=_pixels(PATCH)),
        chat_template=QWEN_TEMPLATE,
    )
    return config, processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    tokenizer = byte_level_tokenizer(QWEN_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
    vision |= {"patch_size": PATCH, "window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(
        text_config=_text(tokenizer, rope_parameters=rope), vision_config=vision, **_qwen_ids(tokenizer)
    )
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=_pixels(PATCH)),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=_pixels(PATCH)),
        chat_template=QWEN_TEMPLATE,
    )
    return config, processor


def _qwen3_vl() -> tuple[Any, Any]:
    tokenizer = byte_level_tokenizer(QWEN_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
    vision |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = hf.Qwen3VLConfig(
        text_config=_text(tokenizer, rope_parameters=rope, head_dim=16),
        vision_config=vision,
        **_qwen_ids(tokenizer),
    )
    layout = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    processor = hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=_pixels(16), **layout),
        tokenizer=tokenizer,
        video_processor=hf.Qwen3VLVideoProcessor(size=_pixels(16), **layout),
        chat_template=QWEN3_TEMPLATE,
    )
    return config, processor


def _idefics3() -> tuple[Any, Any]:
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<pad>", "<fake_token_around_image>", "<image>")
    special += ("<end_of_utterance>", *TILE_TOKENS)
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<end_of_utterance>", "pad_token": "<pad>"}
    tokenizer = byte_level_tokenizer(special, **roles)
    config = hf.Idefics3Config(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config=_vision(),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(
            size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=idefics_template("<|begin_of_text|>"),
    )
    return config, processor


def _smolvlm() -> tuple[Any, Any]:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>")
    special += ("<end_of_utterance>", "<video>", *TILE_TOKENS)
    roles = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    tokenizer = byte_level_tokenizer(special, **roles)
    config = hf.SmolVLMConfig(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config=_vision(),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    tiles = {"size": {"longest_edge": 2 * IMAGE_SIZE}, "max_image_size": {"longest_edge": IMAGE_SIZE}}
    processor = hf.SmolVLMProcessor(
        image_processor=hf.SmolVLMImageProcessor(**tiles),
        tokenizer=tokenizer,
        video_processor=hf.SmolVLMVideoProcessor(
            size={"longest_edge": IMAGE_SIZE},
            max_image_size={"longest_edge": IMAGE_SIZE},
            video_sampling={"fps": 1, "max_frames": 8, "video_size": {"longest_edge": IMAGE_SIZE}},
        ),
        image_seq_len=4,
        chat_template=idefics_template("<|im_start|>"),
    )
    return config, processor


def _llava() -> tuple[Any, Any]:
    special = ("<s>", "</s>", "<image>", "<pad>")
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = sentencepiece_tokenizer(special, prefix_space=True, **roles)
    config = hf.LlavaConfig(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config={"model_type": "clip_vision_model", **_vision(projection_dim=64)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
    )
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=_square()),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return config, processor


def _llava_onevision() -> tuple[Any, Any]:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    tokenizer = byte_level_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    pinpoints = [[IMAGE_SIZE * rows, IMAGE_SIZE * columns] for rows in (1, 2) for columns in (1, 2)]
    config = hf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", **_vision(vision_use_head=False)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=_square(), image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=_square()),
        num_image_tokens=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
    )
    return config, processor


def _internvl() -> tuple[Any, Any]:
    media = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    media |= {"video_token": "<video>"}
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *media.values())
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": media}
    tokenizer = byte_level_tokenizer(special, **roles)
    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        vision_config=_vision(image_size=[IMAGE_SIZE, IMAGE_SIZE], patch_size=[PATCH, PATCH]),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=_square(), crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=_square()),
        image_seq_length=4,
        chat_template=INTERNVL_TEMPLATE,
    )
    return config, processor


def _paligemma() -> tuple[Any, Any]:
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = sentencepiece_tokenizer(("<pad>", "<eos>", "<bos>", "<image>"), prefix_space=False, **roles)
    processor = hf.PaliGemmaProcessor(
        image_processor=hf.SiglipImageProcessor(size=_square(), image_seq_length=(IMAGE_SIZE // PATCH) ** 2),
        tokenizer=tokenizer,
    )
    config = hf.PaliGemmaConfig(
        text_config={"model_type": "gemma", **_text(tokenizer, head_dim=16)},
        vision_config={"model_type": "siglip_vision_model", **_vision(projection_dim=64, vision_use_head=False)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=64,
        hidden_size=64,
    )
    return config, processor


def _gemma3() -> tuple[Any, Any]:
    media = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *media.values())
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = sentencepiece_tokenizer(special, prefix_space=False, extra_special_tokens=media, **roles)
    config = hf.Gemma3Config(
        text_config=_text(
            tokenizer,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config={"model_type": "siglip_vision_model", **_vision(vision_use_head=False)},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )
    processor = hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size=_square(), image_seq_length=4),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=GEMMA_TEMPLATE,
    )
    return config, processor


def _blip2(
    text: Mapping[str, Any], tokenizer: hf.PreTrainedTokenizerFast, **reading: Any
) -> tuple[hf.Blip2Config, hf.Blip2Processor]:
    config = hf.Blip2Config(
        text_config=dict(text),
        vision_config=_vision(),
        qformer_config=_vision(encoder_hidden_size=64, **{"vocab_size": 64, **reading}),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = hf.BlipImageProcessor(size=_square())
    return config, hf.Blip2Processor(image_processor=images, tokenizer=tokenizer, num_query_tokens=4)


def _framing(tokenizer: hf.PreTrainedTokenizerFast, single: str) -> hf.PreTrainedTokenizerFast:
    """Let a tokenizer put `</s>` where `single` says, as the tokenizers of OPT and T5 do."""
    end = [("</s>", tokenizer.convert_tokens_to_ids("</s>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=end)
    return tokenizer


def _blip2_opt() -> tuple[Any, Any]:
    roles = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = _framing(byte_level_tokenizer(("</s>", "<pad>", "<image>"), **roles), "</s> $A")
    # In the published checkpoints, too, an answer ends with its line and not with the tokenizer's token.
    text = _text(tokenizer, ffn_dim=128, word_embed_proj_dim=64, eos_token_id=tokenizer.convert_tokens_to_ids("Ċ"))
    return _blip2({"model_type": "opt", **text}, tokenizer)


def _blip2_t5() -> tuple[Any, Any]:
    roles = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = sentencepiece_tokenizer(("<pad>", "</s>", "<image>"), prefix_space=True, **roles)
    tokenizer = _framing(tokenizer, "$A </s>")
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}
    changes = {"decoder_start_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False}
    text = _text(tokenizer, feed_forward_proj="gated-gelu", **sizes, **changes)
    return _blip2({"model_type": "t5", **text}, tokenizer)


def _qwen3_vl_moe() -> tuple[Any, Any]:
    """Three blocks: dense, then two with eight experts, two of them for each token."""
    config, processor = _qwen3_vl()
    text = config.text_config.to_dict() | {"num_hidden_layers": 3, "mlp_only_layers": [0], "num_experts": 8}
    text |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
    vision = config.vision_config.to_dict()
    for part in (text, vision):
        del part["model_type"]
    return hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_qwen_ids(processor.tokenizer)), processor


def _deepseek_vl2() -> tuple[Any, Any]:
    """DeepSeek-VL2's decoder (DeepSeek-V2: latent attention, a shared expert, a dense first block) behind SigLIP."""
    special = ("<|begin|>", "<|end|>", "<|pad|>", "<image>")
    roles = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    tokenizer = byte_level_tokenizer(special, extra_special_tokens={"image_token": "<image>"}, **roles)
    experts = {"n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    latent = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    text = _text(tokenizer, num_hidden_layers=3, num_key_value_heads=4, first_k_dense_replace=1, **experts, **latent)
    config = hf.DeepseekVLConfig(
        text_config={"model_type": "deepseek_v2", **text},
        vision_config={"model_type": "siglip_vision_model", **_vision(vision_use_head=False)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        grounding_dialect="deepseek_vl2",
    )
    processor = hf.DeepseekVLProcessor(
        image_processor=hf.DeepseekVLImageProcessor(size=_square()),
        tokenizer=tokenizer,
        chat_template=LLAVA_TEMPLATE,
        num_image_tokens=(IMAGE_SIZE // PATCH) ** 2,
    )
    return config, processor


def _blip2_itm() -> tuple[Any, Any]:
    roles = {"pad_token": "[PAD]", "eos_token": "[SEP]"}
    tokenizer = byte_level_tokenizer(("[PAD]", "[CLS]", "[SEP]", "<image>"), **roles)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return _blip2({"model_type": "opt", **_text(tokenizer)}, tokenizer, vocab_size=384, use_qformer_text_input=True)


def _instructblip() -> tuple[Any, Any]:
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = sentencepiece_tokenizer(("<pad>", "<s>", "</s>", "<image>"), prefix_space=True, **roles)
    reading = byte_level_tokenizer(("[PAD]", "[SEP]"), pad_token="[PAD]", eos_token="[SEP]")
    config = hf.InstructBlipConfig(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config=_vision(),
        qformer_config=_vision(encoder_hidden_size=64, vocab_size=384),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = hf.BlipImageProcessor(size=_square())
    return config, hf.InstructBlipProcessor(images, tokenizer, reading, num_query_tokens=4)


def _kosmos2() -> tuple[Any, Any]:
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = sentencepiece_tokenizer(("<s>", "<pad>", "</s>"), prefix_space=True, **roles)
    processor = hf.Kosmos2Processor(hf.CLIPImageProcessor(size=_square(), crop_size=_square()), tokenizer)
    sizes = {"embed_dim": 64, "layers": 2, "ffn_dim": 128, "attention_heads": 4, "max_position_embeddings": 4096}
    ids = {key: _text(tokenizer)[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = hf.Kosmos2Config(text_config={**sizes, **ids}, vision_config=_vision(), latent_query_num=64)
    return config, processor


def _florence2() -> tuple[Any, Any]:
    places = tuple(f"<loc_{number}>" for number in range(1000))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = byte_level_tokenizer(
        ("<s>", "</s>", "<pad>", "<image>", *places), extra_special_tokens={"image_token": "<image>"}, **roles
    )
    ids = {key: _text(tokenizer)[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    sides = ("encoder", "decoder")
    text = {"model_type": "bart", "d_model": 64, "max_position_embeddings": 512, **ids}
    text |= {f"{side}_layers": 2 for side in sides} | {f"{side}_ffn_dim": 128 for side in sides}
    text |= {f"{side}_attention_heads": 4 for side in sides} | {"decoder_start_token_id": tokenizer.eos_token_id}
    stages = {"depths": [1] * 4, "embed_dim": [16, 32, 32, 64], "num_heads": [1, 2, 2, 2], "num_groups": [1, 2, 2, 2]}
    config = hf.Florence2Config(
        text_config=text,
        vision_config={**stages, "window_size": 2, "projection_dim": 64},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    # The tower shrinks a side of 64 pixels to 2 patches: 4 tokens, and 1 of their mean.
    images = hf.CLIPImageProcessor(size=_square(64), crop_size=_square(64), image_seq_length=5)
    return config, hf.Florence2Processor(images, tokenizer)


def _janus() -> tuple[Any, Any]:
    media = {"image_token": "<image>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special = ("<s>", "</s>", "<pad>", *media.values())
    tokenizer = sentencepiece_tokenizer(special, prefix_space=False, extra_special_tokens=media, **roles)
    drawing = {"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1, 1], "latent_channels": 32}
    drawing |= {"embed_dim": 8, "num_embeddings": 64, "image_token_embed_dim": 64, "projection_dim": 64}
    config = hf.JanusConfig(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config={**_vision(projection_dim=64), "depth": 2},
        vq_config=drawing,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = hf.JanusProcessor(
        image_processor=hf.JanusImageProcessor(size=_square(), min_size=PATCH),
        tokenizer=tokenizer,
        chat_template=LLAVA_TEMPLATE,
        num_image_tokens=(IMAGE_SIZE // PATCH) ** 2,
    )
    return config, processor


def _fuyu() -> tuple[Any, Any]:
    roles = {"bos_token": "<s>", "eos_token": "|ENDOFTEXT|", "pad_token": "|ENDOFTEXT|", "unk_token": "<unk>"}
    # A space begins every text, and an image's tokens are pieces of text: the processor takes off the space in front.
    pieces = [*_learn_pieces()[0], "|SPEAKER|", "|NEWLINE|"]
    model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = _with_special_tokens(backend, ("<s>", "|ENDOFTEXT|"), **roles)
    images = hf.FuyuImageProcessor(size=_square(), patch_size={"height": PATCH, "width": PATCH})
    config = hf.FuyuConfig(
        text_config={"model_type": "persimmon", **_text(tokenizer)},
        patch_size=PATCH,
        image_token_id=tokenizer.convert_tokens_to_ids("|SPEAKER|"),
    )
    return config, hf.FuyuProcessor(images, tokenizer)


BUILDERS: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "blip2_opt": _blip2_opt,
    "blip2_t5": _blip2_t5,
    "instructblip": _instructblip,
    "blip2_itm": _blip2_itm,
}
OTHERS: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "kosmos2": _kosmos2,
    "florence2": _florence2,
    "janus": _janus,
    "fuyu": _fuyu,
}
"""Families with a way of their own each, which have tests of their own."""

WITHOUT_BOXES = ("blip2_opt", "blip2_t5", "instructblip")
"""Families that were never taught to write one, nor to follow a chat template."""

WITHOUT_ANSWERS = ("blip2_itm",)
"""Retrieval checkpoints: they score captions and write none."""

FAMILIES: tuple[str, ...] = tuple(family for family in BUILDERS if family not in WITHOUT_BOXES + WITHOUT_ANSWERS)
MIXTURES: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "qwen3_vl_moe": _qwen3_vl_moe,
    "deepseek_vl2": _deepseek_vl2,
}
"""Families with experts, which have tests of their own."""
VIDEO_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "llava_onevision", "internvl")


def build(family: str, directory: str | Path, *, seed: int = 0) -> Path:
    """Write a tiny checkpoint of `family` into `directory` and return the directory.

    Args:
        family: one of `BUILDERS`, `MIXTURES` or `OTHERS`.
        directory: made if missing.
        seed: of the weights.
    """
    config, processor = {**BUILDERS, **MIXTURES, **OTHERS}[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family in WITHOUT_ANSWERS:
            model = hf.Blip2ForImageTextRetrieval(config)
        else:
            model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        widen(model)
    directory = Path(directory)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@torch.no_grad()
def widen(model: Any) -> None:
    """Redraw the weights so that activations keep their size and next-token distributions are peaked.

    The usual initialisation (standard deviation 0.02) gives a nearly uniform next token and repeats itself.
    Where the head is the input embedding, a large embedding would make every token predict itself: there the
    embedding is small and the final norm makes up for it.
    """
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if name.endswith(("language_model.norm.weight", "decoder.final_layer_norm.weight")) and tied:
            parameter.fill_(4.0)
        elif name.endswith(("q_norm.weight", "k_norm.weight", "post_feedforward_layernorm.weight")):
            parameter.fill_(1.0)
        elif "embed_tokens" in name or "lm_head" in name or name.endswith("shared.weight"):
            parameter.normal_(std=0.1 if tied else 0.4)
        elif parameter.ndim > 1:
            # Stacks of experts hold one matrix after another, all with their inputs in columns.
            columns = parameter.shape[-1] if "experts" in name else parameter.numel() // parameter.shape[0]
            parameter.normal_(std=1.5 / math.sqrt(columns))
