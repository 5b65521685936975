"""A map over forked processes: they inherit what the work needs, and only its results travel.

Threads cannot share work that consists of short calls, after each of which the interpreter lock changes
hands. Processes can, and a fork takes a hundredth of the time in which a new one imports what it needs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from eplb_analyze.parallel import limit_workers, num_workers, ordered_map

Item = TypeVar("Item")
Result = TypeVar("Result")

#: A process that is ahead of its turn can leave a result of this size in its pipe.
PIPE_BYTES = 1 << 20

#: jemalloc, which Arrow includes, puts its own thread in order in a forked process.
FORK_SAFE_THREADS = (b"jemalloc_bg_thd",)

#: These end a forked process at once, as it has nothing to clean up.
ENDING = (signal.SIGINT, signal.SIGTERM)

_allowed = False


def allow_forks() -> None:
    """Let this process fork. For a program of its own: a library cannot know what else its process runs."""
    global _allowed  # noqa: PLW0603 - it is a setting of the process
    if hasattr(signal, "SIGCHLD"):
        # A launcher may have left it ignored. Then a process that ended could not be told from another one.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _allowed = True


def _can_fork() -> bool:
    """Whether a copy of this process is whole: of several threads, only one would be in it."""
    if not _allowed or sys.platform != "linux":
        return False
    try:
        threads = [Path(folder, "comm").read_bytes().strip() for folder in Path("/proc/self/task").iterdir()]
    except OSError:  # a thread has just ended
        return False
    return len(threads) - sum(map(threads.count, FORK_SAFE_THREADS)) == 1


def forked_map(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Generator[tuple[Item, Result], None, None]:
    """Each item with ``work(item)``, in the order of the items; forked processes share the work.

    Each of them iterates over the items, too, which should cost little, and works on every n-th. Where
    processes cannot be forked, and if there is only one item, it is :func:`ordered_map
    <eplb_analyze.parallel.ordered_map>`.

    Args:
        work: its result, or what it raises, must be pickled; nothing else that it changes has an effect here.
        threads: of ``ordered_map``.
    """
    items = iter(items)
    helpers: list[_Helper] = []
    try:
        if num_workers() > 1 and _can_fork():
            first = [*itertools.islice(items, 2)]
            items = itertools.chain(first, items)
            if len(first) > 1:
                _fork(helpers, work, items)
        if not helpers:
            yield from ordered_map(work, items, threads)
            return
        for item, helper in zip(items, itertools.cycle(helpers), strict=False):
            yield item, helper.result(work, item)
    finally:
        for helper in helpers:
            helper.end()


def _fork(helpers: list[_Helper], work: Callable[[Any], Any], items: Iterable[Any]) -> None:
    """Add a helper for each worker; or none, if there cannot be so many."""
    # A signal that raised in a new process would make it go on as its parent.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        for number in range(num_workers()):
            own = itertools.islice(items, number, None, num_workers())
            helpers.append(_Helper(work, own, helpers, mask))
    except OSError:  # too many processes, files or pages
        while helpers:
            helpers.pop().end()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Helper:
    """A forked process that works on some items, one after another, and sends the results."""

    def __init__(
        self, work: Callable[[Any], Any], items: Iterable[Any], others: list[_Helper], mask: Iterable[int]
    ) -> None:
        """``others``: those that were forked before; ``mask``: the signals that the process is to block."""
        import fcntl

        receiver, sender = os.pipe()
        with contextlib.suppress(OSError):  # it is above what an unprivileged user may have
            fcntl.fcntl(sender, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            with warnings.catch_warnings():
                # Python warns of any other thread, from 3.12 on.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process = os.fork()
        except OSError:
            os.close(receiver)
            os.close(sender)
            raise
        if not self._process:
            _work(work, items, sender, [receiver, *(other.results.fileno() for other in others)], mask)
        os.close(sender)
        self.results: BinaryIO = os.fdopen(receiver, "rb")

    def result(self, work: Callable[[Item], Result], item: Item) -> Result:
        """The next result, or what was raised in its place. What the process did not finish is done here."""
        import pickle

        try:
            done, result = pickle.load(self.results)  # noqa: S301 - of a copy of this process
        except (EOFError, pickle.UnpicklingError):
            return work(item)
        if not done:
            error, text = result
            raise error from RuntimeError(f"in a forked process:\n{text}")
        found: Result = result
        return found

    def end(self) -> None:
        self.results.close()
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


def _work(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    sender: int,
    readers: list[int],
    mask: Iterable[int],
) -> None:
    """What a forked process does. It ends there: all else that it inherited is its parent's to finish.

    Args:
        readers: the ends of pipes that only the parent may hold, or they would not break when it ends.
        mask: the signals to block.
    """
    try:
        import pickle

        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for reader in readers:
            os.close(reader)
        limit_workers(1)
        with os.fdopen(sender, "wb") as results:
            for item in items:
                try:
                    answer = pickle.dumps((True, work(item)), pickle.HIGHEST_PROTOCOL)
                except Exception as error:
                    answer = pickle.dumps((False, (error, traceback.format_exc())))
                results.write(answer)
                results.flush()
    finally:
        os._exit(0)
