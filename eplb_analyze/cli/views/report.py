"""Shows which HTML file `report` wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_heading, print_line
from eplb_analyze.text import plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.report.write import WrittenReport


def render(console: Console, written: WrittenReport) -> None:
    print_heading(console, "report", f" · {written.model} · run {written.run_id}")
    counts = written.steps.to_json()
    bins = f", in {plural(written.bins, 'bin')} of time" if written.bins else ""
    console.print(f"{plural(counts['recorded'] or 0, 'complete step')}{bins}")
    print_line(console, f"written: {written.file}, {written.bytes:,} bytes", soft_wrap=True)
    if written.redacted:
        console.print("names of models, runs, hosts and files are left out of it")
