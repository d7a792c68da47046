"""Requests that have texts scored against an image."""

from helpers.prefix import IMAGES
from lmms_eval.api.instance import Instance

TEXTS = ["a red circle", "The dog (on the left), by the man in white!", "two"]


def request(index, texts=TEXTS, **options):
    content = [{"type": "image", "url": IMAGES[index]}, {"type": "text", "text": "Describe the image briefly."}]
    messages = [{"role": "user", "content": content, "candidates": texts}]
    arguments = ("", lambda doc: messages, {"candidates": True, **options}, index, "toy", "test")
    return Instance("generate_until", arguments, 0, metadata={"task": "toy", "doc_id": index, "repeats": 1})
