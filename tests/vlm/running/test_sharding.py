from collections import Counter

import numpy as np
import pytest
from helpers import photographs
from lmms_eval import utils

from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.vlm.running.sharding import deal, deal_by_image


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_document_is_dealt_once_and_images_stay_whole(processes):
    rng = np.random.default_rng(processes)
    images = [f"image {number}" for number in rng.integers(0, 40, 200)]
    shares = deal(images, processes)
    assert sorted(i for share in shares for i in share) == list(range(200))
    assert all(share == sorted(share) for share in shares)
    owners = {image: {p for p, share in enumerate(shares) for i in share if images[i] == image} for image in images}
    assert {len(owner) for owner in owners.values()} == {1}
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= max(Counter(images).values())


def test_more_processes_than_images():
    assert deal(["a", "b", "a"], 4) == [[0, 2], [1], [], []]


class TestThroughTheHarness:
    @pytest.fixture(scope="class")
    def docs(self):
        deal_by_image()
        deal_by_image()
        return ExpressionDocs(photographs.rows("testA")).remove_columns("image")

    @pytest.mark.parametrize(("limit", "offset"), [(None, 0), (7, 0), (5, 3), (100, 4)])
    def test_processes_together_see_what_one_sees(self, docs, limit, offset):
        def seen(rank, world_size):
            return list(utils.create_iterator(enumerate(docs), rank, world_size, limit, offset))

        (alone,) = [seen(0, 1)]
        together = [seen(rank, 2) for rank in range(2)]
        assert sorted((i for share in together for i, _ in share)) == [i for i, _ in alone]
        assert {i: doc["expression_id"] for share in together for i, doc in share} == {
            i: doc["expression_id"] for i, doc in alone
        }
        first, second = ({doc["image_id"] for _, doc in share} for share in together)
        assert not first & second

    @pytest.mark.parametrize(
        ("limit", "offset", "message"),
        [(-1, 0, "limit must be >= 0"), (2.5, 0, "fractional"), (None, -3, "offset must be >= 0")],
    )
    def test_limits_that_lmms_eval_refuses_stay_refused(self, docs, limit, offset, message):
        with pytest.raises(ValueError, match=message):
            utils.create_iterator(enumerate(docs), 0, 2, limit, offset)

    @pytest.mark.parametrize(("limit", "offset"), [(0, 0), (1, 0), (3.0, 0), (None, 10_000)])
    def test_processes_without_a_document_get_an_empty_share(self, docs, limit, offset):
        shares = [list(utils.create_iterator(enumerate(docs), rank, 64, limit, offset)) for rank in range(64)]
        alone = list(utils.create_iterator(enumerate(docs), 0, 1, None if limit is None else int(limit), offset))
        assert sorted(i for share in shares for i, _ in share) == [i for i, _ in alone]
        assert [] in shares

    def test_other_documents_are_dealt_as_ever(self):
        deal_by_image()
        assert list(utils.create_iterator(enumerate("abcde"), 1, 2)) == [(1, "b"), (3, "d")]
        assert list(utils.create_iterator(range(5), 0, 2, 3)) == [0, 2]
