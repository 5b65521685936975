"""Shows what `copy` copied, and what it left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_line
from eplb_analyze.text import plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.transfer.copy import CopyReport


def render(console: Console, report: CopyReport) -> None:
    models = ", ".join(report.models)
    print_line(console, ("copied ", "bold"), f"run {report.run_id}, {models}")
    print_line(console, f"into {report.to}", soft_wrap=True)
    there = f", {report.files_there:,} of them already there" if report.files_there else ""
    size = f"{plural(report.rows, 'row')}, {report.bytes:,} bytes"
    console.print(
        f"{plural(report.sessions, 'session')}, {plural(report.files, 'file')}{there}, {size}, all verified"
    )
    if report.first_step is not None:
        end = "the end" if report.last_step is None else str(report.last_step)
        console.print(
            f"a part: the segments that touch steps {report.first_step} to {end}; "
            f"{plural(report.segments_left_out, 'other segment')} left out"
        )
    if report.ranks is not None:
        console.print(f"a part: {plural(len(report.ranks), 'rank')} of the run")
    if report.damaged:
        text = f"{len(report.damaged):,} left out, damaged or missing in the source"
        print_line(console, (text, "bold red"))
