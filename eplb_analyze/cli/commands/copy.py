"""`copy`: copy a run, or part of it, to another dump."""

from __future__ import annotations

import functools
import re
from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput, print_message
from eplb_analyze.cli.views.copy import render
from eplb_analyze.errors import EXIT_UNUSABLE


@functools.partial(options.about_a_run, phases=False)
def copy(
    out: RunOutput,
    destination: options.Destination,
    steps: options.Steps = None,
    ranks: Annotated[
        str | None,
        typer.Option("--ranks", help="Copy only these ranks, for example 0-3,7.", metavar="N,N-N…"),
    ] = None,
) -> None:
    """Copy a run or a part of it, and verify the copy. Existing files are never overwritten.

    Steps are copied in whole segments. To continue an interrupted copy, run the same command again.
    """
    chosen = _parse_ranks(ranks)
    from eplb_analyze.transfer.copy import copy_run

    report = copy_run(out.dump, destination, out.run_id, out.model, steps, chosen, out.progress)
    out.notes(report.notes)
    out.emit(report.to_json, lambda console: render(console, report))
    for text in report.damaged:
        print_message("error", text)
    if report.damaged:
        raise typer.Exit(EXIT_UNUSABLE)


def _parse_ranks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise typer.BadParameter(
                f"{text!r} is not a list of ranks; write, for example, 0-3,7", param_hint="--ranks"
            )
        found |= set(range(low, high + 1))
    return sorted(found)
