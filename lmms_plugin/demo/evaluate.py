"""Score a checkpoint on demo scenes through its own processor and `generate`, as any user would."""

import torch
from PIL import Image
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

from lmms_plugin.boxes import Box, iou
from lmms_plugin.demo.architecture import DIALECT
from lmms_plugin.demo.scenes import Scene


def conversation(expression: str) -> list[dict[str, object]]:
    """Chat messages that ask where `expression` is."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DIALECT.ask(expression)}]}]


@torch.inference_mode()
def generate(
    model: Idefics3ForConditionalGeneration,
    processor: Idefics3Processor,
    images: list[Image.Image],
    expressions: list[str],
) -> list[str]:
    """Answer one expression per image, greedily, as one left-padded batch."""
    prompts = [
        processor.apply_chat_template(conversation(e), add_generation_prompt=True, tokenize=False) for e in expressions
    ]
    inputs = processor(text=prompts, images=[[i] for i in images], padding=True, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def overlaps(
    model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, scenes: list[Scene], batch_size: int = 64
) -> list[float]:
    """IoU of the generated box with the true one, per expression in scene order; 0 when the answer is no box."""
    asked = [(Image.fromarray(s.image), e, o.box) for s in scenes for o in s.objects for e in o.expressions]
    found: list[float] = []
    for start in range(0, len(asked), batch_size):
        images, expressions, boxes = zip(*asked[start : start + batch_size], strict=True)
        texts = generate(model, processor, list(images), list(expressions))
        for text, image, box in zip(texts, images, boxes, strict=True):
            parsed = DIALECT.parse(text, original_size=image.size, model_size=None)
            found.append(iou(parsed.box, Box.from_xywh(box, image.size)) if parsed.box else 0.0)
    return found
