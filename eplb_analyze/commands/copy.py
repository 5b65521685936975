"""`copy`: a run, or a part of it, to another place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eplb_analyze.commands.options import Dump, ModelOption, OutputOption, RunOption, StepsOption, parse_steps
from eplb_analyze.errors import EXIT_UNUSABLE, plural
from eplb_analyze.output import Output, OutputFormat, clean, say
from eplb_analyze.places import Place, place

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.copying import CopyReport


def copy(
    to: Annotated[
        Place,
        typer.Option(
            "--to", help="The dump to copy into: a folder, s3://… or gs://….", parser=place, metavar="PLACE"
        ),
    ],
    dump: Dump = Path("."),
    steps: StepsOption = None,
    ranks: Annotated[
        str | None, typer.Option("--ranks", help="Only these, as 0-3,7.", metavar="N,N-N…")
    ] = None,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """Bring a run or a part of it to another place, verified; what is there is never written over.

    Steps are copied in whole segments. The same copy once more goes on where one was interrupted.
    """
    wanted, chosen = parse_steps(steps), _ranks(ranks)
    from eplb_analyze.copying import copy_run

    out = Output(output)
    report = copy_run(dump, to, run, model, wanted, chosen, out.progress)
    out.notes(report.notes)
    out.emit(report.to_json(), lambda console: render(console, report))
    for text in report.damaged:
        say("error", text)
    if report.damaged:
        raise typer.Exit(EXIT_UNUSABLE)


def _ranks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise typer.BadParameter(f"{text!r} is not ranks, as 0-3,7", param_hint="--ranks")
        found |= set(range(low, high + 1))
    return sorted(found)


def render(console: Console, report: CopyReport) -> None:
    from rich.text import Text

    models = clean(", ".join(report.models))
    console.print(Text.assemble(("copied ", "bold"), f"run {clean(report.run_id)}, {models}"))
    console.print(f"into {clean(report.to)}", soft_wrap=True)
    there = f", {report.files_there:,} of them there already" if report.files_there else ""
    size = f"{report.bytes / 1e6:,.2f} MB"
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
        console.print(Text(text, style="bold red"))
