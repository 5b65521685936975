"""Where results go: rich tables on a terminal, plain text in a pipe, one JSON document on request.

What comes out of a dump may come from a stranger, so every text passes :func:`clean`, and rich's
markup is never interpreted in it.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING, Any

from eplb_analyze.text import clean, plain

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.table import Table

    from eplb_analyze.errors import Finding

PROGRAM = "eplb-analyze"
#: Work that takes longer shows how far it is.
PATIENCE_SECONDS = 1.0


class OutputFormat(str, enum.Enum):
    text = "text"
    json = "json"


def say(kind: str, text: object) -> None:
    """One line on stderr; where that cannot be written, the exit code must do."""
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {kind}: {clean(text)}", file=sys.stderr)


#: They end a program without what it has to do at its end.
_ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


class Progress:
    """A bar on stderr, where that is a terminal, for work that takes longer than ``PATIENCE_SECONDS``."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._bar: RichProgress | None = None

    def __call__(self, done: int, of: int) -> None:
        """So much is done; the bar goes when all is, and comes back where work begins anew."""
        if done >= of:
            self.end()
        elif self._bar is None and sys.stderr.isatty() and time.monotonic() - self._begun > PATIENCE_SECONDS:
            self._start(done, of)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=of)

    def _start(self, done: int, of: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = RichProgress(*columns, console=console(sys.stderr), transient=True)
        self._bar.add_task("", completed=done, total=of)
        self._bar.start()
        # It hides the cursor, which must be there again however the work ends.
        atexit.register(self.end)
        for number in _ENDINGS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _leave)

    def end(self) -> None:
        """Take the bar away, so that what follows stands alone."""
        if self._bar is not None:
            self._bar.stop()
            for number in _ENDINGS:
                if signal.getsignal(number) is _leave:
                    signal.signal(number, signal.SIG_DFL)
        self._bar = None


class Output:
    """The one way out of a command: a document, and how to show it to a person."""

    def __init__(self, output_format: OutputFormat) -> None:
        self.format = output_format
        self.progress = Progress()

    def notes(self, notes: list[str]) -> None:
        self.progress.end()
        for note in notes:
            say("note", note)

    def findings(self, findings: list[Finding]) -> None:
        """Say errors and warnings, at most ten of a kind, so that the result stays in sight."""
        self.progress.end()
        shown: dict[str, int] = {}
        for finding in findings:
            if finding.severity == "info":
                continue
            shown[finding.code] = shown.get(finding.code, 0) + 1
            if shown[finding.code] <= 10:
                say(finding.severity, finding.text)
        for code, count in shown.items():
            if count > 10:
                say("warning", f"{count - 10} more of {code}; `{PROGRAM} check` lists all")

    def emit(self, document: dict[str, Any], render: Callable[[Console], None]) -> None:
        self.progress.end()
        if self.format is OutputFormat.json:
            print(json.dumps(plain(document), indent=2))
        elif sys.stdout.isatty():
            render(console(sys.stdout))
        else:
            # In a pipe nobody needs the blanks that fill a table's cells.
            text = io.StringIO()
            render(console(text))
            print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


#: Nothing is drawn wider: a plot takes memory by its columns.
MAX_COLUMNS = 1000


def console(file: IO[str]) -> Console:
    """A console; in a pipe it is 80 columns wide unless COLUMNS says otherwise."""
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    width = None
    if not file.isatty():
        width = min(int(columns), MAX_COLUMNS) if re.fullmatch("0*[1-9][0-9]{0,8}", columns) else 80
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


def table(console: Console, *columns: str, title: str | None = None) -> Table:
    """Print the title, and make a table without frame; a column named ``<…`` is a text, else a number."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if title is not None:
        console.print(Text(clean(title), style="bold"))
    result = Table(
        box=box.SIMPLE_HEAD if console.is_terminal else box.SIMPLE,
        header_style="bold",
        pad_edge=False,
        show_edge=False,
        padding=(0, 1),
    )
    for name in columns:
        justify: Any = "left" if name.startswith("<") else "right"
        result.add_column(Text(clean(name.lstrip("<"))), justify=justify)
    return result


def heading(console: Console, name: str, rest: str = "") -> None:
    from rich.text import Text

    console.print(Text.assemble((clean(name), "bold"), clean(rest)))


def show_notes(console: Console, notes: Iterable[str]) -> None:
    """What to bear in mind of the figures that follow."""
    from rich.text import Text

    for note in notes:
        console.print(Text(f"note: {clean(note)}", style="yellow"))


# ---- figures as text


# ---- heat
