"""Maps over threads, processes or a cluster: ordered results, a bounded number of items under way."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

#: More threads than this are no faster, and each holds a few row groups.
MAX_WORKERS = 4

Item = TypeVar("Item")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)

_max_workers = MAX_WORKERS


class Pending(Protocol[Result_co]):
    """A result that is being computed. :class:`concurrent.futures.Future` is one."""

    def result(self) -> Result_co: ...
    def cancel(self) -> object: ...


def num_workers() -> int:
    """Threads that share the work of a run: numpy and Arrow release the interpreter lock."""
    return min(_max_workers, num_cores())


def limit_workers(threads: int) -> None:
    """Set the limit of :func:`num_workers`, for a process that shares its machine with others like it."""
    global _max_workers  # noqa: PLW0603 - it is a setting of the process
    _max_workers = threads


def thread_pool(threads: int) -> ThreadPoolExecutor:
    """A pool of threads. Its module is imported only by a command that needs one."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(threads)


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Generator[tuple[Item, Result], None, None]:
    """Each item with ``work(item)``, in the order of the items.

    Args:
        threads: default :func:`num_workers`. At most one more item is under way or done but not yet
            taken. With one thread the work is done by the caller's, item by item.
    """
    threads = num_workers() if threads is None else threads
    if threads <= 1:
        yield from ((item, work(item)) for item in items)
        return
    with thread_pool(threads) as pool:
        yield from ordered_results(lambda item: pool.submit(work, item), items, threads)


def ordered_results(
    submit: Callable[[Item], Pending[Result]], items: Iterable[Item], limit: int
) -> Generator[tuple[Item, Result], None, None]:
    """Each item with its result, in the order of the items; items are submitted as results are taken.

    While the caller waits for a result, at most ``limit`` others are under way. When it stops early, or
    an item fails, those not yet started are canceled.
    """
    under_way: deque[tuple[Item, Pending[Result]]] = deque()

    def first() -> tuple[Item, Result]:
        item, pending = under_way.popleft()
        return item, pending.result()

    try:
        for item in items:
            under_way.append((item, submit(item)))
            if len(under_way) > limit:
                yield first()
        while under_way:
            yield first()
    finally:
        for _, pending in under_way:
            pending.cancel()


def one_ahead(
    work: Callable[[Item], Result], items: Iterable[Item]
) -> Generator[tuple[Item, Result], None, None]:
    """Each item with ``work(item)``, in the order of the items, while a thread works on the next one."""
    if num_workers() == 1:
        yield from ordered_map(work, items)
        return
    with thread_pool(1) as pool:
        yield from ordered_results(lambda item: pool.submit(work, item), items, 1)


def prefetch(items: Iterable[Item]) -> Generator[Item, None, None]:
    """The items, in order, while a thread takes the next one."""
    iterator, end = iter(items), object()
    for _, item in one_ahead(lambda _: next(iterator, end), itertools.repeat(None)):
        if item is end:
            return
        yield item  # type: ignore[misc]


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_range(first: int, end: int) -> list[tuple[int, int]]:
    """Split ``range(first, end)`` into one half-open range for each worker."""
    edges = [first + i * (end - first) // num_workers() for i in range(num_workers() + 1)]
    return [(low, high) for low, high in itertools.pairwise(edges) if low < high]
