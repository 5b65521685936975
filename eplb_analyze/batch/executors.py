"""Where the work of a batch is done: in this process, in processes on this machine, or on Ray.

An executor maps a function over independent items. Function and items travel by pickle. The function
handles its own errors: :class:`WorkerDied` is the result of an item whose worker died.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, Protocol, TypeVar

from eplb_analyze.errors import UsageError
from eplb_analyze.parallel import limit_workers, num_cores, ordered_results
from eplb_analyze.processes import closed_pipes_ignored, process_pool
from eplb_dump.format.frozen import frozen

Item = TypeVar("Item")
Result = TypeVar("Result")

NAMES = ("local", "processes", "ray")
#: This many items per worker are submitted ahead, so that no worker waits; no more, as results are held.
AHEAD = 2


@frozen
class WorkerDied:
    """The worker of an item died: killed for its memory, for example."""

    reason: str


class Executor(Protocol):
    def map(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | WorkerDied]]:
        """Each item with its result, in the order of the items."""
        ...

    def close(self) -> None: ...


def create_executor(name: str, workers: int | None = None, ray_address: str | None = None) -> Executor:
    """The executor of this name; ``workers`` defaults to one per core.

    Raises UsageError if the name is unknown, or if Ray is not installed or cannot be reached.
    """
    if name == "local":
        return Local()
    if name == "processes":
        return Processes(workers or num_cores())
    if name == "ray":
        return Ray(workers, ray_address)
    raise UsageError(f"no executor {name!r}; choose one of: {', '.join(NAMES)}")


class Local:
    """One item after another in this process, with threads inside each."""

    def map(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | WorkerDied]]:
        for item in items:
            yield item, work(item)

    def close(self) -> None:
        pass


class Processes:
    """New processes on this machine; each keeps to one thread, as there is one for each core."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool = _pool(workers)
        self._held = contextlib.ExitStack()
        self._held.enter_context(closed_pipes_ignored())

    def map(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | WorkerDied]]:
        def submit(item: Item) -> _PoolResult[Item, Result]:
            return _PoolResult(self._submit(work, item), work, item)

        return ordered_results(submit, items, AHEAD * self._workers)

    def _submit(self, work: Callable[[Item], Result], item: Item) -> Future[Result]:
        try:
            return self._pool.submit(work, item)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = _pool(self._workers)
            return self._pool.submit(work, item)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._held.close()


def _pool(workers: int) -> ProcessPoolExecutor:
    return process_pool(workers, preload="eplb_analyze.batch.postmortem")


@frozen
class _PoolResult(Generic[Item, Result]):
    """A pending result of a process pool. One dead worker ends its pool, and all its pending results."""

    future: Future[Result]
    work: Callable[[Item], Result]
    item: Item

    def result(self) -> Result | WorkerDied:
        try:
            return self.future.result()
        except BrokenProcessPool:
            pass
        # Try again in a process of its own, because another item may have killed the worker.
        with _pool(1) as pool:
            try:
                return pool.submit(self.work, self.item).result()
            except BrokenProcessPool:
                return WorkerDied("its worker process died twice, perhaps because it ran out of memory")

    def cancel(self) -> object:
        return self.future.cancel()


class Ray:
    """Tasks of a Ray cluster: the one at an address, or one that is started here and ends with us."""

    def __init__(self, workers: int | None, address: str | None) -> None:
        # No dashboard and no usage reports.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ModuleNotFoundError:
            raise UsageError("Ray is not installed: pip install 'eplb-dump[ray]'") from None
        self._ray: Any = ray
        # Without an address always a new cluster, even if another runs on this machine.
        own = {"address": "local", "num_cpus": workers, "include_dashboard": False}
        options: dict[str, Any] = {"address": address} if address else own
        # Ray prints about its cluster; stdout is for our document only.
        self._stdout, sys.stdout = sys.stdout, sys.stderr
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error below says what is wrong, in one line
                ray.init(log_to_driver=False, logging_level="ERROR", **options)
        except Exception as error:
            sys.stdout = self._stdout
            text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            remedy = "; check the address and the token of the cluster's head (docs/investigate/many-runs.md)"
            raise UsageError(f"Ray does not start: {text}{remedy if address else ''}") from None
        self._ahead = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def map(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | WorkerDied]]:
        task = self._ray.remote(num_cpus=1, max_retries=1)(_on_one_thread)

        def submit(item: Item) -> _RayResult[Result]:
            return _RayResult(self._ray, task.remote(work, item))

        return ordered_results(submit, items, self._ahead)

    def close(self) -> None:
        self._ray.shutdown()
        sys.stdout = self._stdout


@frozen
class _RayResult(Generic[Result]):
    ray: Any
    reference: Any

    def result(self) -> Result | WorkerDied:
        try:
            found: Result = self.ray.get(self.reference)
            return found
        except self.ray.exceptions.RayError as error:
            return WorkerDied(str(error).splitlines()[0])

    def cancel(self) -> object:
        return None  # :meth:`Ray.close` ends the cluster's tasks


def _on_one_thread(work: Callable[[Item], Result], item: Item) -> Result:
    limit_workers(1)
    return work(item)
