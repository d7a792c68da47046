"""What lmms-eval is answered does not depend on the engine's ways: on the order of its records, or on where it runs."""

from dataclasses import replace

import datasets
import pytest
from lmms_eval.api.instance import Instance

from lmms_plugin.demo import DATA
from lmms_plugin.protocol.dialects import DIALECTS
from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import Response
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.contracts.requests import Job, read
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.jobs import Generation

OPTIONS = {"max_new_tokens": 24, "temperature": 0, "until": []}


class Backwards:
    """The records of another engine, last ones first."""

    def __init__(self, engine):
        self.engine, self.traits, self.batch_size = engine, engine.traits, engine.batch_size
        self.count_tokens = engine.count_tokens
        self.closed = 0

    def answers(self, jobs, *, evidence=True):
        yield from self._backwards(self.engine.answers(jobs, evidence=evidence))

    def scores(self, jobs):
        yield from self._backwards(self.engine.scores(jobs))

    def _backwards(self, records):
        try:
            yield from reversed(list(records))
        finally:
            self.closed += 1


@pytest.fixture(scope="module")
def vlm():
    vlm = models.QuantNone(pretrained="demo", device="cpu", samples=2, verbalised=True)
    vlm.task_dict = {"toy": {"test": ExpressionDocs(datasets.load_dataset(DATA, split="test").select(range(3)))}}
    return vlm


def requests(vlm, ask, options=OPTIONS, count=3):
    metadata = {"task": "toy", "doc_id": 0, "repeats": 1}
    given = [("", ask, options, index, "toy", "test") for index in range(count)]
    return read([Instance("generate_until", one, 0, metadata=metadata) for one in given], vlm.task_dict)


def plain(doc):
    return [{"role": "user", "content": [{"type": "image", "url": doc["image"]}, {"type": "text", "text": "What?"}]}]


def candidates(doc):
    return [{**plain(doc)[0], "candidates": ["a red circle", "two", doc["expression"]]}]


@pytest.mark.parametrize(
    ("ask", "options"),
    [(comprehension.doc_to_messages, OPTIONS), (candidates, {**OPTIONS, "candidates": True})],
    ids=["boxes", "candidates"],
)
def test_answers_are_in_the_order_of_the_requests_whatever_the_engine_does(vlm, ask, options):
    engine = Backwards(vlm.responder.engine)
    asked = requests(vlm, ask, options)
    answers = replace(vlm.responder, engine=engine).generate(asked)
    assert answers == vlm.responder.generate(asked)
    assert len(set(answers)) == len(answers)


def test_a_record_becomes_a_response_with_everything_in_it(vlm):
    (answer,) = dict(vlm.responder.engine.answers(_jobs(vlm))).values()
    (response,) = map(Response.decode, vlm.responder.generate(requests(vlm, comprehension.doc_to_messages, count=1)))
    assert [token.text for token in response.tokens] == [token.text for token in answer.generated.tokens]
    assert response.samples == tuple("".join(t.text for t in sample.tokens) for sample in answer.samples)
    assert (response.model_size, response.dialect) == (answer.model_size, vlm.dialect.name)
    assert response.original_size == answer.prompt.grounding.original_size
    assert response.records_digits
    assert response.statement is not None
    assert answer.generated.ids


def test_usage_counts_every_token_that_was_generated(vlm):
    fresh = Generation(vlm.responder.engine, vlm.responder.assembler)
    fresh.generate(requests(vlm, plain))
    counted = [len(answer.generated.tokens) for _, answer in vlm.responder.engine.answers(_jobs(vlm, plain, 3))]
    assert fresh.usage.tokens == sum(counted)
    assert fresh.usage.speed == fresh.usage.tokens / fresh.usage.seconds > 0


class Blind(Backwards):
    """An engine that does not tell what size it saw an image in."""

    def answers(self, jobs, *, evidence=True):
        yield from self._backwards((i, replace(one, model_size=None)) for i, one in self.engine.answers(jobs))


def test_an_answer_that_cannot_be_assembled_ends_the_engines_work(vlm):
    engine = Blind(vlm.responder.engine)
    pixels = next(dialect for dialect in DIALECTS.values() if dialect.requires_model_size)
    blind = replace(vlm.responder, engine=engine, assembler=replace(vlm.responder.assembler, dialect=pixels))
    with pytest.raises(RequestError, match=r"task toy, document 2: .* counts pixels of the resized image") as error:
        blind.generate(requests(vlm, comprehension.doc_to_messages))
    # While the error, and with it every frame on the way, is still held.
    assert error.tb is not None
    assert engine.closed == 1


def test_beams_are_refused_by_name_whatever_else_is_asked_for(vlm):
    with pytest.raises(RequestError, match=r"task toy, document \d: .*beam search has none"):
        vlm.responder.generate(requests(vlm, comprehension.doc_to_messages, {**OPTIONS, "num_beams": 2}))


def _jobs(vlm, ask=comprehension.doc_to_messages, count=1):
    return [
        Job(request.first, request, GenerationSettings.from_kwargs(OPTIONS))
        for request in requests(vlm, ask, count=count)
    ]
