"""`report`: one HTML file to send around, which works offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eplb_analyze.commands.options import (
    Dump,
    ModelOption,
    OutputOption,
    RunOption,
    StepsOption,
    finish,
    open_for,
    parse_steps,
)
from eplb_analyze.errors import plural
from eplb_analyze.output import Output, OutputFormat, clean, heading

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.report.writing import WrittenReport


def report(
    to: Annotated[
        Path, typer.Option("--to", help="The file to write.", metavar="FILE.html", show_default=False)
    ],
    dump: Dump = Path("."),
    steps: StepsOption = None,
    top: Annotated[
        int, typer.Option("--top", help="How many rows of a ranking to show at first.", min=1)
    ] = 10,
    redact: Annotated[
        bool, typer.Option("--redact", help="Leave out names of models, runs, hosts and files.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """Write one HTML file that works offline: the summary in words, charts over time, heat maps, tables."""
    wanted = parse_steps(steps)
    from eplb_analyze.report.writing import write_report

    out = Output(output)
    opened = open_for(out, dump, run, model)
    written = write_report(opened, to, wanted, top=top, redact=redact, force=force)
    out.emit(written.to_json(), lambda console: render(console, written))
    finish(out, opened, written.steps)


def render(console: Console, written: WrittenReport) -> None:
    heading(console, "report", f" · {written.model} · run {written.run_id}")
    counts = written.steps.to_json()
    bins = f", in {plural(written.bins, 'bin')} of time" if written.bins else ""
    console.print(f"{plural(counts['recorded'] or 0, 'complete step')}{bins}")
    console.print(f"written: {clean(written.file)}, {written.bytes:,} bytes", soft_wrap=True)
    if written.redacted:
        console.print("names of models, runs, hosts and files are left out of it")
