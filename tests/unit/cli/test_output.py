"""What the way out of the commands does apart from any of them: the progress bar."""

from __future__ import annotations

import io
import signal
import sys

import pytest

from eplb_analyze import text as text_
from eplb_analyze.cli import progress as progress_
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called in the test: pytest puts a stream of its own in place after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def test_a_bar_shows_how_far_long_work_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(progress_, "DELAY_SECONDS", 0.0)
    progress = Progress()
    progress(300, 1000)
    assert "300/1000" in terminal.getvalue()
    progress(1000, 1000)
    # The cursor, which it hid, is shown again.
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l") > -1


def test_a_result_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(progress_, "DELAY_SECONDS", 0.0)
    out = Output(OutputFormat.json)
    out.progress(1, 2)
    out.emit({}, lambda console: None)
    drawn = terminal.getvalue()
    assert "1/2" in drawn
    assert drawn.rfind("\x1b[?25h") > drawn.rfind("\x1b[?25l")


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    progress = Progress()
    progress(1, 2)
    progress(2, 2)
    assert terminal.getvalue() == ""


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress_, "DELAY_SECONDS", 0.0)
    Progress()(1, 2)
    assert stream.getvalue() == ""


def test_afterwards_signals_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_of(monkeypatch)
    monkeypatch.setattr(progress_, "DELAY_SECONDS", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    progress = Progress()
    progress(1, 2)
    assert signal.getsignal(signal.SIGTERM) is not before
    progress(2, 2)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.0, "0.0 s"),
        (119.9, "119.9 s"),
        (120.0, "2.0 min"),
        (7199.0, "120.0 min"),
        (7200.0, "2.0 h"),
        (172_800.0, "2.0 d"),
        (1e8, "1,157.4 d"),
    ],
)
def test_durations_are_written_in_one_way(seconds: float | None, text: str) -> None:
    assert text_.duration(seconds) == text
