import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmms_plugin.tasks.sources.recent import Recent
from lmms_plugin.vlm.running.pipeline import ahead


@pytest.fixture
def pool():
    with ThreadPoolExecutor(3) as pool:
        yield pool


class TestAhead:
    def test_results_come_in_order_whichever_thread_is_faster(self, pool):
        def slow_at_first(i):
            time.sleep(0.02 if i % 3 == 0 else 0)
            return i * i

        assert list(ahead(pool, slow_at_first, range(20), 4)) == [i * i for i in range(20)]

    def test_no_more_than_its_depth_is_taken_in_advance(self, pool):
        taken = []

        def items():
            for i in range(20):
                taken.append(i)
                yield i

        for done, _ in enumerate(ahead(pool, lambda i: i, items(), 3), start=1):
            assert len(taken) <= done + 2

    def test_work_goes_on_while_the_consumer_is_busy(self, pool):
        second = threading.Event()
        results = ahead(pool, lambda i: second.set() if i == 1 else None, range(2), 2)
        next(results)
        assert second.wait(10)

    def test_an_error_comes_where_its_item_would(self, pool):
        results = ahead(pool, lambda i: 1 // (2 - i), range(5), 5)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_what_is_not_needed_any_more_is_not_begun(self):
        begun = []
        gate = threading.Event()

        def work(i):
            begun.append(i)
            if i == 1:
                gate.wait(10)
            return i

        with ThreadPoolExecutor(1) as pool:
            results = ahead(pool, work, range(10), 5)
            assert next(results) == 0
            results.close()
            gate.set()
        assert set(begun) <= {0, 1}

    def test_depth_must_be_positive(self, pool):
        with pytest.raises(ValueError, match="depth"):
            next(ahead(pool, abs, [1], 0))


class TestRecent:
    def test_a_result_is_made_once(self):
        calls = []
        recent = Recent(2)
        assert [recent.get("a", lambda: calls.append(1) or len(calls)) for _ in range(3)] == [1, 1, 1]

    def test_the_least_recently_used_goes_first(self):
        recent = Recent(2)
        recent.get("a", lambda: 1)
        recent.get("b", lambda: 2)
        recent.get("a", lambda: 0)
        recent.get("c", lambda: 3)
        assert [recent.get("a", lambda: 9), recent.get("b", lambda: 9)] == [1, 9]

    def test_threads_wait_for_one_another(self):
        calls, recent, gate = [], Recent(2), threading.Event()

        def make():
            calls.append(1)
            gate.wait(10)
            return "made"

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(recent.get, "key", make) for _ in range(4)]
            gate.set()
            assert [future.result(10) for future in futures] == ["made"] * 4
        assert calls == [1]

    def test_a_failure_is_passed_on_and_tried_again(self):
        recent = Recent(2)
        with pytest.raises(KeyError):
            recent.get("a", lambda: {}["missing"])
        assert recent.get("a", lambda: 1) == 1
