"""A progress bar on stderr for long work."""

from __future__ import annotations

import atexit
import signal
import sys
import time
from typing import TYPE_CHECKING

from eplb_analyze.cli.console import console

if TYPE_CHECKING:
    from types import FrameType

    from rich.progress import Progress as RichProgress

#: Work that takes longer than this shows a bar.
DELAY_SECONDS = 1.0
#: These end a process without its atexit handlers.
_TERMINATING_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _exit_on_signal(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


class Progress:
    """Shows a bar if stderr is a terminal and the work takes longer than ``DELAY_SECONDS``."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._bar: RichProgress | None = None

    def __call__(self, done: int, total: int) -> None:
        """Update the bar. It disappears when all is done, and comes back if the work starts over."""
        if done >= total:
            self.end()
        elif self._bar is None and sys.stderr.isatty() and time.monotonic() - self._started > DELAY_SECONDS:
            self._start(done, total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def _start(self, done: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = RichProgress(*columns, console=console(sys.stderr), transient=True)
        self._bar.add_task("", completed=done, total=total)
        self._bar.start()
        # The bar hides the cursor. Show it again however the work ends.
        atexit.register(self.end)
        for number in _TERMINATING_SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _exit_on_signal)

    def end(self) -> None:
        """Remove the bar, so that the output that follows stands alone."""
        if self._bar is not None:
            self._bar.stop()
            for number in _TERMINATING_SIGNALS:
                if signal.getsignal(number) is _exit_on_signal:
                    signal.signal(number, signal.SIG_DFL)
        self._bar = None
