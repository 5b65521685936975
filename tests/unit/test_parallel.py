"""Ordered maps over threads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from eplb_analyze.parallel import one_ahead, ordered_map, ordered_results, prefetch, split_range


def test_results_come_in_the_order_of_the_items() -> None:
    done: list[int] = []
    first_may_end = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert first_may_end.wait(30)
        done.append(item)
        if item == 2:
            first_may_end.set()
        return item * item

    assert list(ordered_map(work, range(20), threads=3)) == [(i, i * i) for i in range(20)]
    assert done.index(0) > done.index(2)


def test_one_thread_works_lazily_in_the_thread_of_the_caller() -> None:
    found = ordered_map(lambda _: threading.get_ident(), itertools.count(), threads=1)
    assert [next(found) for _ in range(3)] == [(i, threading.get_ident()) for i in range(3)]


def test_items_are_submitted_only_as_results_are_taken() -> None:
    submitted: list[int] = []

    def submit(item: int) -> Future[int]:
        submitted.append(item)
        future: Future[int] = Future()
        future.set_result(-item)
        return future

    found = ordered_results(submit, itertools.count(), limit=4)
    for taken in range(10):
        assert next(found) == (taken, -taken)
        assert len(submitted) == taken + 5


def test_an_error_cancels_the_rest() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        if item == 1:
            raise ValueError("one")
        time.sleep(0.001)
        return item

    with pytest.raises(ValueError, match="one"):
        list(ordered_map(work, range(1000), threads=2))
    assert len(started) < 10


def test_closing_the_iterator_cancels_what_is_under_way() -> None:
    futures: list[Future[int]] = []

    def submit(item: int) -> Future[int]:
        futures.append(Future())
        if item == 0:
            futures[0].set_result(0)
        return futures[-1]

    found = ordered_results(submit, range(100), limit=3)
    assert next(found) == (0, 0)
    found.close()
    assert [future.cancelled() for future in futures] == [False, True, True, True]


def test_a_range_is_split_without_gaps_or_empty_parts() -> None:
    for first, end in ((0, 58), (3, 4), (5, 5)):
        parts = split_range(first, end)
        assert [i for low, high in parts for i in range(low, high)] == list(range(first, end))
        assert all(low < high for low, high in parts)


@pytest.mark.parametrize("threads", [1, 4])
def test_at_most_the_next_item_is_worked_on_ahead(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eplb_analyze.parallel._max_workers", threads)
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        return -item

    for taken, (item, result) in enumerate(one_ahead(work, range(20))):
        assert (item, result) == (taken, -taken)
        assert len(started) <= taken + 2
    assert started == [*range(20)]


def test_items_are_taken_ahead_by_one_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eplb_analyze.parallel.num_cores", lambda: 4)
    takers: list[int] = []
    second_is_taken = threading.Event()

    def items() -> Iterator[int]:
        for item in range(20):
            takers.append(threading.get_ident())
            if item == 1:
                second_is_taken.set()
            yield item

    for count, item in enumerate(prefetch(items())):
        assert second_is_taken.wait(30)  # although the first one is still in use
        assert item == count
        assert len(takers) <= count + 2
    assert len(takers) == 20
    assert threading.get_ident() not in takers
    assert len(set(takers)) == 1


def test_error_of_an_item_that_is_taken_ahead_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ValueError("one")

    found = prefetch(items())
    assert next(found) == 0
    with pytest.raises(ValueError, match="one"):
        next(found)
