"""Requests as lmms-eval makes them, of seven documents with and without images, and a tiny model that answers them."""

import numpy as np
from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.running.batching import Budget

OPTIONS = {"max_new_tokens": 8, "until": ["\n\n"], "temperature": 0}


def photograph(seed, size=(120, 90)):
    """An image that no other seed gives, smooth enough to survive resizing."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def message(*images, text="What is this?", **extra):
    content = [*({"type": "image", "url": image} for image in images), {"type": "text", "text": text}]
    return {"role": "user", "content": content, **extra}


def ask_for_box(image, expression="the dog"):
    return [message(image, grounding={"expression": expression, "original_size": list(image.size)})]


DOCUMENTS = [
    [message(photograph(0))],
    [message(text="Say yes or no, and then something longer about it.")],
    [message(photograph(1, (64, 200)), photograph(2, (70, 70)), text="Compare.")],
    ask_for_box(photograph(3)),
    [message(text="Say no.")],
    ask_for_box(photograph(4, (200, 64)), "the red circle to the left of the blue square"),
    [message(photograph(5), text="?")],
]

ALL = range(len(DOCUMENTS))


def generation(index, options=None, messages=lambda doc: doc):
    metadata = {"task": "toy", "doc_id": index, "repeats": 1}
    return Instance("generate_until", ("", messages, options or OPTIONS, index, "toy", "test"), 0, metadata=metadata)


def choice(index, text, context="Which?", show=lambda doc: [part["url"] for part in doc[0]["content"][:-1]]):
    metadata = {"task": "toy", "doc_id": index, "repeats": 1}
    return Instance("loglikelihood", (context, text, show, index, "toy", "test"), 0, metadata=metadata)


def load(path, **arguments):
    vlm = models.QuantNone(pretrained=str(path), device="cpu", **arguments)
    vlm.task_dict = {"toy": {"test": DOCUMENTS}}
    return vlm.make_ready()


def answer(vlm, indices=ALL, *, batch_size=1, **changes):
    vlm.responder.engine.runner.budget = Budget.of(batch_size, None)
    return vlm.generate_until([generation(index, {**OPTIONS, **changes}) for index in indices])
