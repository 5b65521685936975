"""Options that several commands share, and what they all do first and last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eplb_analyze.errors import EXIT_UNUSABLE
from eplb_analyze.output import Output, OutputFormat

if TYPE_CHECKING:
    from eplb_analyze.completeness import Completeness
    from eplb_analyze.run import Run

Dump = Annotated[
    Path,
    typer.Argument(
        help="The dump's folder, or one run=… folder in it.",
        envvar="EXPERT_LOAD_DUMP_DIR",
        show_default="the current folder",
    ),
]
RunOption = Annotated[str | None, typer.Option("--run", help="A run's id; default: the newest run.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="A model's name, where the run has several.")
]
StepsOption = Annotated[
    str | None,
    typer.Option("--steps", help="Steps A to B − 1, as A:B; either may be left out.", metavar="A:B"),
]
TopOption = Annotated[int, typer.Option("--top", help="How many rows of a ranking to show.", min=1)]
OutputOption = Annotated[
    OutputFormat, typer.Option("--output", "-o", help="text, or one JSON document.", case_sensitive=False)
]


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """``A:B`` as a half-open range."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if match is None or text == ":":
        raise typer.BadParameter(f"{text!r} is not A:B, for instance 100:200", param_hint="--steps")
    low, high = int(match[1] or 0), int(match[2] or 2**62)
    if low >= high:
        raise typer.BadParameter(f"{text!r} is an empty range", param_hint="--steps")
    return low, high


def open_for(output: Output, dump: Path, run: str | None, model: str | None) -> Run:
    """Open the run a command is about, and say what was chosen."""
    from eplb_analyze.run import open_run

    opened = open_run(dump, run, model)
    opened.progress = output.progress
    output.notes(opened.notes)
    return opened


def finish(output: Output, run: Run, steps: Completeness | None = None) -> None:
    """Say what was wrong with the dump; where data was lost to it, exit 3 although figures are out."""
    from eplb_analyze.check import standing_findings, summary_findings

    findings = standing_findings(run) if steps is None else summary_findings(run, steps)
    output.findings(findings)
    if any(f.severity == "error" for f in findings):
        raise typer.Exit(EXIT_UNUSABLE)
