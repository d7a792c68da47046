"""Questions that share images, their answers with and without a shared prefix, and what the model was shown of them."""

from contextlib import contextmanager

import numpy as np
import pytest
from lmms_eval.api.instance import Instance
from loguru import logger
from PIL import Image

from lmms_plugin.protocol.response import Response
from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.running.batching import Budget

LOGPROB = 1e-4
OPTIONS = {"max_new_tokens": 8, "temperature": 0}
# Three images with four, one and three questions, and their order as scattered as datasets have it.
QUESTIONS = (
    (0, "dog"),
    (1, "red circle"),
    (0, "the man in the white shirt, not the other one"),
    (2, "a"),
    (0, "dog"),
    (2, "a blue square to the left of the dog"),
    (0, "x"),
    (2, "yes"),
)


def image(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize([(120, 90), (64, 200), (90, 90)][seed % 3], Image.Resampling.BICUBIC)


IMAGES = [image(seed) for seed in range(3)]


class Documents(list):
    """Documents as this package's tasks have them: they tell which are about one image."""

    def image_key(self, index):
        return self[index][0]


def ask(doc, with_box=True):
    shown, expression = IMAGES[doc[0]], doc[1]
    content = [{"type": "image", "url": shown}, {"type": "text", "text": f"Where is {expression}?"}]
    extra = {"grounding": {"expression": expression, "original_size": list(shown.size)}} if with_box else {}
    return [{"role": "user", "content": content, **extra}]


def instance(index, messages=ask, **options):
    metadata = {"task": "toy", "doc_id": index, "repeats": 1}
    arguments = ("", messages, {**OPTIONS, **options}, index, "toy", "test")
    return Instance("generate_until", arguments, 0, metadata=metadata)


def load(path, documents=QUESTIONS, **arguments):
    vlm = models.QuantNone(pretrained=str(path), device="cpu", **arguments)
    vlm.task_dict = {"toy": {"test": Documents(documents)}}
    return vlm.make_ready()


def answers(vlm, batch_size=1, messages=ask, cache_bytes=2**30, **options):
    vlm.responder.engine.runner.budget = Budget.of(batch_size, None)
    vlm.responder.engine.runner.budget.cache_bytes = cache_bytes
    requests = [instance(i, messages, **options) for i in range(len(vlm.task_dict["toy"]["test"]))]
    return vlm.generate_until(requests)


@contextmanager
def plainly(vlm):
    off, vlm.responder.engine.runner.sharing.off = (
        vlm.responder.engine.runner.sharing.off,
        "this test wants the plain way",
    )
    try:
        yield
    finally:
        vlm.responder.engine.runner.sharing.off = off


@contextmanager
def calls(vlm):
    """What the model's `generate` is called with: (rows, whether images are among the arguments)."""
    seen, original = [], vlm.model.generate

    def generate(*args, **kwargs):
        seen.append((len(kwargs["input_ids"]), "pixel_values" in kwargs))
        return original(*args, **kwargs)

    vlm.model.generate = generate
    try:
        yield seen
    finally:
        vlm.model.generate = original


@contextmanager
def log(level):
    lines = []
    sink = logger.add(lambda message: lines.append(str(message)), level=level, format="{level} {message}")
    try:
        yield lines
    finally:
        logger.remove(sink)


def assert_equal(ours, theirs):
    for one, other in zip(map(Response.decode, ours), map(Response.decode, theirs), strict=True):
        assert one.text == other.text
        assert (one.original_size, one.model_size, one.dialect) == (
            other.original_size,
            other.model_size,
            other.dialect,
        )
        assert [token.text for token in one.tokens] == [token.text for token in other.tokens]
        assert [token.logprob for token in one.tokens] == pytest.approx(
            [token.logprob for token in other.tokens], abs=LOGPROB
        )
