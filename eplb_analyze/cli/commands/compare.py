"""`compare`: is run B significantly better than run A on a comparable workload?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output, OutputFormat, print_message
from eplb_analyze.cli.views.compare import render
from eplb_analyze.errors import EXIT_CHECK_FAILED, EXIT_DONE, EXIT_UNUSABLE
from eplb_analyze.storage.path import StoragePath, storage_path

if TYPE_CHECKING:
    from eplb_analyze.reader.run import Run


def compare(
    a: Annotated[str, typer.Argument(help="A dump's folder, or a run's id in DUMP.", metavar="A")],
    b: Annotated[str, typer.Argument(help="The same, of the run to judge.", metavar="B")],
    dump: options.Dump = Path("."),
    steps: options.Steps = None,
    top: options.Top = 5,
    run_a: Annotated[
        str | None, typer.Option("--run-a", help="The run in folder A; default: newest.")
    ] = None,
    run_b: Annotated[
        str | None, typer.Option("--run-b", help="The run in folder B; default: newest.")
    ] = None,
    timings_a: Annotated[
        Path | None, typer.Option("--timings-a", help="As --timings of `summary`, of run A.", metavar="FILE")
    ] = None,
    timings_b: Annotated[
        Path | None, typer.Option("--timings-b", help="The same, of run B.", metavar="FILE")
    ] = None,
    model: options.Model = None,
    output: options.Output = OutputFormat.text,
) -> None:
    """Is run B better than run A, beyond chance, and are the two comparable at all?"""
    from eplb_analyze.analysis.compare import compare_runs

    out = Output(output)
    one, other = _open(out, a, dump, run_a, model), _open(out, b, dump, run_b, model)
    out.join_times(one, timings_a, "A")
    out.join_times(other, timings_b, "B")
    result = compare_runs(one, other, steps)
    out.emit(result.to_json, lambda console: render(console, result, top))
    if output is OutputFormat.json:  # the text has them
        for warning in result.warnings:
            print_message("warning", warning)
    code = EXIT_DONE if result.comparable else EXIT_CHECK_FAILED
    for name, opened, side in (("A", one, result.a), ("B", other, result.b)):
        if out.lost_data(opened, side.steps, name):
            code = EXIT_UNUSABLE
    raise typer.Exit(code)


def _open(out: Output, name: str, dump: StoragePath, run: str | None, model: str | None) -> Run:
    """Open the newest or named run of a folder; a name that is no folder is a run's id in ``dump``."""
    if run is None and "/" not in name and not Path(name).exists():
        return out.open_run(dump, name, model)
    return out.open_run(storage_path(name), run, model)
