"""Where the work of a batch is done: in this process, in processes of this machine, or on Ray.

An executor maps a function over independent items. The function and the items travel by pickle, and the
function catches what it can: what still comes as :class:`Lost` took its worker with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from eplb_analyze.errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")

NAMES = ("local", "processes", "ray")
#: So many items a worker wait for it, so that it never waits for us; and not more, as results are kept.
AHEAD = 2


@dataclass(frozen=True)
class WorkerDied:
    """The worker died over an item: killed for its memory, say."""

    reason: str


class Executor(Protocol):
    #: True: there is a worker a core, so that each should keep to one thread.
    crowded: bool

    def map(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | WorkerDied]]:
        """Each item with its result, in the order of the items."""
        ...

    def close(self) -> None: ...


def executor(name: str, workers: int | None = None, ray_address: str | None = None) -> Executor:
    """The executor of a name; ``workers``: how many, default one a core.

    Raises UsageError where the name is unknown or Ray is not installed.
    """
    if name == "local":
        return Local()
    if name == "processes":
        return Processes(workers or os.cpu_count() or 1)
    if name == "ray":
        return Ray(workers, ray_address)
    raise UsageError(f"no executor {name!r}; there are: {', '.join(NAMES)}")


class Local:
    """One item after another in this process, whose threads share it."""

    crowded = False

    def map(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | WorkerDied]]:
        for item in items:
            yield item, work(item)

    def close(self) -> None:
        pass


class Processes:
    """Fresh processes of this machine, which hold nothing of ours but what they import."""

    crowded = True

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool = self._start()
        # A worker that dies closes its pipe, which is no reason for us to die.
        self._on_pipe = signal.signal(signal.SIGPIPE, signal.SIG_IGN) if hasattr(signal, "SIGPIPE") else None

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._workers, mp_context=multiprocessing.get_context("spawn"))

    def map(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | WorkerDied]]:
        def submit(item: Item) -> tuple[ProcessPoolExecutor, Future[Result] | None]:
            try:
                return self._pool, self._pool.submit(work, item)
            except BrokenProcessPool:
                return self._pool, None

        def result(
            item: Item, reference: tuple[ProcessPoolExecutor, Future[Result] | None]
        ) -> Result | WorkerDied:
            pool, future = reference
            try:
                if future is not None:
                    return future.result()
            except BrokenProcessPool:
                pass
            # One dead worker ends its pool, and all that was under way in it.
            if pool is self._pool:
                pool.shutdown(wait=False)
                self._pool = self._start()
            return _alone(work, item)

        return _in_order(submit, result, items, AHEAD * self._workers)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._on_pipe is not None:
            signal.signal(signal.SIGPIPE, self._on_pipe)


def _alone(work: Callable[[Item], Result], item: Item) -> Result | WorkerDied:
    """Once more, in a process of its own: it may have been another item that its worker died over."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(work, item).result()
        except BrokenProcessPool:
            return WorkerDied("its worker died twice; was it killed for its memory?")


class Ray:
    """Tasks of a Ray cluster: the one at an address, or one that is started here and ended with us."""

    crowded = True

    def __init__(self, workers: int | None, address: str | None) -> None:
        # Neither a dashboard nor reports of its use.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ModuleNotFoundError:
            raise UsageError("Ray is not installed: pip install 'eplb-dump[ray]'") from None
        self._ray: Any = ray
        # Without an address a fresh one, also where another runs on this machine.
        own = {"address": "local", "num_cpus": workers, "include_dashboard": False}
        options: dict[str, Any] = {"address": address} if address else own
        # What Ray has to say of its cluster it prints; stdout is for our document alone.
        self._stdout, sys.stdout = sys.stdout, sys.stderr
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is wrong is said below, in a line
                ray.init(log_to_driver=False, logging_level="ERROR", **options)
        except Exception as error:
            sys.stdout = self._stdout
            text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            remedy = "; is it the address of its head, and is the cluster's token here (docs/scale.md)?"
            raise UsageError(f"Ray cannot be had: {text}{remedy if address else ''}") from None
        self._ahead = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def map(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | WorkerDied]]:
        ray = self._ray
        task = ray.remote(num_cpus=1, max_retries=1)(work)

        def result(item: Item, reference: Any) -> Result | WorkerDied:
            try:
                found: Result = ray.get(reference)
                return found
            except ray.exceptions.RayError as error:
                return WorkerDied(str(error).splitlines()[0])

        return _in_order(task.remote, result, items, self._ahead)

    def close(self) -> None:
        self._ray.shutdown()
        sys.stdout = self._stdout


def _in_order(
    submit: Callable[[Item], Any],
    result: Callable[[Item, Any], Result | WorkerDied],
    items: Iterable[Item],
    ahead: int,
) -> Iterator[tuple[Item, Result | WorkerDied]]:
    """Submit items as results are taken, so that no more than ``ahead`` are under way."""
    under_way: deque[tuple[Item, Any]] = deque()
    for item in items:
        under_way.append((item, submit(item)))
        if len(under_way) > ahead:
            first, reference = under_way.popleft()
            yield first, result(first, reference)
    while under_way:
        first, reference = under_way.popleft()
        yield first, result(first, reference)
