"""Work shared by threads, with results in the order of the items."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

#: More threads than this are no faster, and each holds a few row groups.
MAX_WORKERS = 4


Item = TypeVar("Item")


Result = TypeVar("Result")


_at_most = MAX_WORKERS


def num_workers() -> int:
    """How many threads share the work of a run: numpy and Arrow leave the interpreter lock to others."""
    return min(_at_most, os.cpu_count() or 1)


def limit_workers(threads: int) -> None:
    """From now on; for a process that shares its machine with others like it."""
    global _at_most  # noqa: PLW0603 - it is a setting of the process
    _at_most = threads


def prefetch(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
    """Each item with what ``work`` made of it, in order; so many as there are workers are under way."""
    with ThreadPoolExecutor(num_workers()) as pool:
        under_way: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                under_way.append((item, pool.submit(work, item)))
                if len(under_way) > num_workers():
                    first, result = under_way.popleft()
                    yield first, result.result()
            while under_way:
                first, result = under_way.popleft()
                yield first, result.result()
        finally:
            for _, result in under_way:
                result.cancel()


def split_range(first: int, last: int) -> list[tuple[int, int]]:
    """A range of layers in as many ranges as there are workers."""
    edges = [first + i * (last - first) // num_workers() for i in range(num_workers() + 1)]
    return [(low, high) for low, high in itertools.pairwise(edges) if low < high]
