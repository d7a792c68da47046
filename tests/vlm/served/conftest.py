"""The embedded demo loaded here, and behind servers with the ways of several engines."""

import datasets
import pytest
from helpers.served import DemoModel
from lmms_eval.api.instance import Instance

from lmms_plugin.demo import DATA
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs

OPTIONS = {"max_new_tokens": 24, "temperature": 0, "until": []}


@pytest.fixture(scope="session")
def demo():
    return DemoModel()


@pytest.fixture(scope="session")
def documents():
    return {"toy": {"test": ExpressionDocs(datasets.load_dataset(DATA, split="test").select(range(10)))}}


@pytest.fixture(scope="session")
def instances():
    """A function from messages of a document to instances of lmms-eval."""

    def of(ask, count, options=OPTIONS):
        metadata = {"task": "toy", "doc_id": 0, "repeats": 1}
        given = [("", ask, options, index, "toy", "test") for index in range(count)]
        return [Instance("generate_until", one, 0, metadata=metadata) for one in given]

    return of
