"""Where results go: tables on a terminal, plain text in a pipe, one JSON document on request."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

import typer

from eplb_analyze.cli.console import console
from eplb_analyze.cli.progress import Progress
from eplb_analyze.errors import EXIT_UNUSABLE
from eplb_analyze.json_report import versioned, with_times
from eplb_analyze.text import PROGRAM, clean, command_line

if TYPE_CHECKING:
    import datetime
    import enum
    from pathlib import Path

    from rich.console import Console

    from eplb_analyze.errors import Finding
    from eplb_analyze.reader.clock import RunClock
    from eplb_analyze.reader.completeness import Completeness
    from eplb_analyze.reader.run import Run
    from eplb_analyze.storage.path import StoragePath

#: More findings of one kind would push the result out of sight.
MAX_FINDINGS_OF_A_KIND = 10


def print_message(kind: str, text: object) -> None:
    """Print one line on stderr, wrapped on a terminal. If that fails, the exit code has to do."""
    line = f"{PROGRAM}: {kind}: {clean(text)}"
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(
            line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    try:
        print(line, file=sys.stderr)
    except OSError:
        discard(sys.stderr)


def print_json(document: dict[str, Any]) -> None:
    """Print a document of JSON types in pieces: one of all experts of a large model has hundreds of MB."""
    pieces = json.JSONEncoder(indent=2, allow_nan=False).iterencode(document)
    while text := "".join(itertools.islice(pieces, 1 << 16)):
        sys.stdout.write(text)
    sys.stdout.write("\n")


def discard(stream: IO[str]) -> None:
    """Let Python's last flush of what could not be written succeed: its failure changes the exit code."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Output:
    """Prints the result of a command, its notes and its findings."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        self.progress = Progress()
        #: Of the run whose steps are printed; None if there are several runs.
        self.clock: RunClock | None = None
        #: Of several runs: by the key of what a document says of each.
        self.clocks: dict[str, RunClock] = {}
        #: The dump that commands to paste have to name; None if they find it by themselves.
        self.named: str | None = None

    def paste(self, command: str) -> str:
        """A command, ``layer 12 --steps 10-19``, to paste into a shell: about what this output is about."""
        return command_line(command, self.named)

    def notes(self, notes: Iterable[str]) -> None:
        self.progress.end()
        for note in notes:
            print_message("note", note)

    def findings(self, findings: Iterable[Finding]) -> None:
        """Print errors and warnings, at most ``MAX_FINDINGS_OF_A_KIND`` of each kind."""
        self.progress.end()
        counts: dict[str, int] = {}
        for finding in findings:
            if finding.severity == "info":
                continue
            counts[finding.code] = counts.get(finding.code, 0) + 1
            if counts[finding.code] <= MAX_FINDINGS_OF_A_KIND:
                print_message(finding.severity, finding.text)
        for code, count in counts.items():
            if count > MAX_FINDINGS_OF_A_KIND:
                more = count - MAX_FINDINGS_OF_A_KIND
                print_message("warning", f"{more} more of {code}; `{self.paste('check')}` lists all")

    def emit(self, document: Callable[[], dict[str, Any]], render: Callable[[Console], None]) -> None:
        """Print the document as JSON, or what ``render`` prints for a person."""
        self.progress.end()
        if self.json:
            print_json(versioned(self._with_times(document())))
        elif sys.stdout.isatty():
            render(console(sys.stdout, self.clock, self.paste))
        else:
            # In a pipe nobody needs the blanks that fill a table's cells.
            text = io.StringIO()
            render(console(text, self.clock, self.paste))
            print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))

    def _with_times(self, document: dict[str, Any]) -> dict[str, Any]:
        if self.clock is not None:
            return with_times(document, self.clock.iso)
        for key, clock in self.clocks.items():
            document[key] = with_times(document[key], clock.iso)
        return document

    def open_run(self, dump: StoragePath, run: str | None, model: str | None, *, mixed: bool = False) -> Run:
        """Open the run that a command is about, and print how it was chosen."""
        from eplb_analyze.reader.run import open_run

        opened = open_run(dump, run, model, mixed=mixed)
        opened.progress = self.progress
        self.notes(opened.notes)
        return opened

    def join_times(self, run: Run, timings: Path | None, name: str = "") -> None:
        """Let the cost of imbalance in a run come from the times in a file."""
        if timings is not None:
            from eplb_analyze.transfer.step_times import read_step_times

            run.timings = read_step_times(run, timings)
            self.notes([f"{name}: {run.timings.note}" if name else run.timings.note])

    def lost_data(self, run: Run, steps: Completeness | None, name: str = "") -> bool:
        """Print what is wrong with the data of a run; whether figures lack data because of it.

        ``name`` says which of two runs is meant.
        """
        from eplb_analyze.analysis.findings import standing_findings, summary_findings

        findings = standing_findings(run) if steps is None else summary_findings(run, steps)
        prefix = f"{name}: " if name else ""
        self.findings(replace(finding, text=prefix + finding.text) for finding in findings)
        return any(finding.severity == "error" for finding in findings)


class RunOutput(Output):
    """The output of a command about one run, and which run that is."""

    #: Set by :meth:`open`.
    run: Run

    def __init__(
        self, dump: StoragePath, run_id: str | None, model: str | None, *, json: bool = False
    ) -> None:
        super().__init__(json=json)
        self.dump, self.run_id, self.model = dump, run_id, model
        #: The zone of printed times; None for UTC.
        self.zone: datetime.tzinfo | None = None
        #: The half-open range of steps that was asked for; None for all.
        self.asked: tuple[int, int] | None = None
        #: The only phase whose steps are in the figures.
        self.phase: str | None = None
        self._opened: Run | None = None

    def paste(self, command: str) -> str:
        if " --steps " in command:
            # Steps were found among those of the phase; the command prints their times.
            command += f" --phase {shlex.quote(self.phase)}" if self.phase else ""
            command += f" --tz {shlex.quote(str(self.zone))}" if self.zone else ""
        return command_line(command, self.named, run=self.run_id, model=self.model)

    def opened(self, *, mixed: bool = False) -> Run:
        """The run with all its steps, opened once."""
        if self._opened is None:
            self._opened = self.open_run(self.dump, self.run_id, self.model, mixed=mixed)
            if self.zone is not None:
                self._opened.clock.zone = self.zone
        return self._opened

    def open(
        self,
        *,
        mixed: bool = False,
        timings: Path | None = None,
        gpu: enum.Enum | None = None,
        with_loads: bool = False,
    ) -> Run:
        """The run that the figures are of: that of the phase, if one was asked for.

        ``with_loads``: the figures need experts' loads; see :meth:`Run.with_loads`.
        """
        self.run = self.opened(mixed=mixed)
        self.clock = self.run.clock
        self.run.gpu = None if gpu is None else gpu.value
        # Another program's times are matched with the steps of all phases.
        self.join_times(self.run, timings)
        if self.phase is not None:
            self.run = self.run.of_phase(self.phase)
        if with_loads:
            self.run = self.run.with_loads()
        return self.run

    def show(
        self,
        document: Callable[[], dict[str, Any]],
        render: Callable[[Console], None],
        steps: Completeness | None = None,
        without_loads: str = "",
        *,
        of_steps: bool = True,
        before: bool = True,
    ) -> None:
        """Print a report about the run. If its steps lost data, exit with 3 after printing it.

        Args:
            document: the report as JSON.
            render: prints the report for a person.
            steps: the steps that the report is about; None: check only what concerns the whole run.
            without_loads: which of its figures leave out steps without experts' loads.
            of_steps: whether it says which steps were retired, as it is about steps.
            before: whether that is printed before it; else ``render`` prints :meth:`retired_lines`.
        """
        if of_steps:
            self._show_retired(document, render, without_loads, before=before)
        else:
            self.emit(document, render)
        if self.lost_data(self.run, steps):
            raise typer.Exit(EXIT_UNUSABLE)

    def retired_lines(self, without_loads: str = "") -> list[str]:
        """What leaves out which steps that were thinned, a sentence each; see :meth:`show`."""
        lines = self.run.retired_notes(self.asked, without_loads)
        return [f"{line[0].upper()}{clean(line[1:])}." for line in lines]

    def _show_retired(
        self,
        document: Callable[[], dict[str, Any]],
        render: Callable[[Console], None],
        without_loads: str,
        *,
        before: bool,
    ) -> None:
        """Print a report and what leaves out which steps that were thinned."""
        from eplb_analyze.cli.console import print_line

        lines = self.retired_lines(without_loads)
        if not lines:
            self.emit(document, render)
            return

        def with_lines(console: Console) -> None:
            for line in lines:
                print_line(console, line)
            print_line(console)
            render(console)

        run = self.run.with_loads() if without_loads else self.run
        retired = [run.clock.timed(one).to_json() for one in run.left_out(self.asked)]
        self.emit(lambda: {**document(), "retired": retired}, with_lines if before else render)
