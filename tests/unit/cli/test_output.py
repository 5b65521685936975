"""The progress bar, messages, and durations as text."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from clocks import steady_clock
from helpers import LAYERS, SLOTS, cli, map_of, open_writer

from eplb_analyze import text as text_
from eplb_analyze.cli import progress as progress_
from eplb_analyze.cli.console import console, print_hidden
from eplb_analyze.cli.output import Output, print_message
from eplb_analyze.cli.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace stderr. Call this in the test: pytest replaces the streams after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def test_bar_shows_the_progress_of_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(progress_, "DELAY_SECONDS", 0.0)
    progress = Progress()
    progress(300, 1000)
    assert "300/1000" in terminal.getvalue()
    progress(1000, 1000)
    # The bar hides the cursor and shows it again.
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l") > -1


def test_bar_is_gone_before_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(progress_, "DELAY_SECONDS", 0.0)
    out = Output(json=True)
    out.progress(1, 2)
    out.emit(dict, lambda console: None)
    drawn = terminal.getvalue()
    assert "1/2" in drawn
    assert drawn.rfind("\x1b[?25h") > drawn.rfind("\x1b[?25l")


def test_short_work_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    progress = Progress()
    progress(1, 2)
    progress(2, 2)
    assert terminal.getvalue() == ""


def test_bar_is_not_drawn_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress_, "DELAY_SECONDS", 0.0)
    Progress()(1, 2)
    assert stream.getvalue() == ""


def test_signal_handlers_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_duration_uses_the_largest_unit_with_at_least_two(seconds: float | None, text: str) -> None:
    assert text_.duration(seconds) == text


def test_messages_wrap_at_words_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "steps " * 40
    print_message("note", text.strip())
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    print_message("note", text.strip())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert all(len(line) <= 60 and line.endswith("steps") for line in lines)


def test_columns_without_room_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    print_hidden(console(sys.stdout), ["<began, UTC", "p5"], 150)
    print_hidden(console(sys.stdout), [], 150)
    assert capsys.readouterr().out == (
        "hidden at this width: began, p5 (use --json, or a terminal of 150 columns)\n"
    )


def test_summary_says_what_is_missing_and_when_placements_changed(tmp_path: Path) -> None:
    for rank in range(2):
        with steady_clock(1000), open_writer(tmp_path, ep_rank=rank, run_id="r") as writer:
            for step in range(60 - 10 * rank):
                if step == 7:
                    writer.skip("dropped")
                else:
                    writer.record(step, np.ones((LAYERS, SLOTS), int), map_of(step // 10))
    text = " ".join(cli("summary", tmp_path).stdout.split())
    what = "2 of 2 ranks recorded; of 60 steps, 10 lack rank 1, from step 50 (22:14:12) on; 1 was dropped"
    assert f"data incomplete: {what}" in text
    assert "5 rearrangements in steps 10-50 (22:13:32-22:14:12)" in text
