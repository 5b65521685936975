"""`seal`: turn the journals that dead writers left into sealed segments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from eplb_analyze.cli.options import Dump, ModelOption, OutputOption, RunOption
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.errors import EXIT_CHECK_FAILED
from eplb_analyze.text import clean

if TYPE_CHECKING:
    from rich.console import Console


def seal(
    dump: Dump = Path("."),
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """Turn the journals of killed writers into Parquet, for other programs to read.

    All runs, unless --run or --model says otherwise. The only command that changes a run; a
    journal whose writer is alive is left alone. Exit 1 if one was skipped.
    """
    from eplb_analyze.transfer.recover import seal_dump

    report = seal_dump(dump, run, model)

    def render(console: Console) -> None:
        for s in report.sealed:
            steps = "no step" if s.first_step is None else f"steps {s.first_step} to {s.last_step}"
            size = f"{s.journal_bytes / 1e6:.2f} MB → {s.sealed_bytes / 1e6:.2f} MB"
            console.print(f"sealed {clean(s.journal)}: {steps}, {size}")
        for k in report.skipped:
            console.print(f"left {clean(k.journal)}: {clean(k.reason)}")
        if not report.sealed and not report.skipped:
            console.print("no journal to seal: all writers closed or sealed theirs")

    Output(output).emit(report.to_json(), render)
    if report.skipped:
        raise typer.Exit(EXIT_CHECK_FAILED)
