"""`compare`: is B better than A, by how much, and why? Two runs, or two parts of one run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output, print_message
from eplb_analyze.errors import EXIT_CHECK_FAILED, EXIT_DONE, EXIT_UNUSABLE
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.storage.path import StoragePath, storage_path

if TYPE_CHECKING:
    from eplb_analyze.reader.run import Run


def _side(text: str) -> StoragePath:
    """A dump; a range of steps in its place is an error that names the options for it."""
    if re.fullmatch("[0-9]+-[0-9]*", text) and not Path(text).exists():
        raise typer.BadParameter(f"{text!r} is not a dump; ranges of steps go in --steps-a and --steps-b")
    return storage_path(text)


def compare(
    a: Annotated[
        StoragePath | None,
        typer.Argument(
            help="The baseline: a dump, or one run=… folder in it.",
            parser=_side,
            metavar="A",
            envvar="EXPERT_LOAD_DUMP_DIR",
            show_default="the current folder",
        ),
    ] = None,
    b: Annotated[
        StoragePath | None,
        typer.Argument(
            help="The dump, or run=… folder, to compare with A; default: A.", parser=_side, metavar="B"
        ),
    ] = None,
    run_a: Annotated[
        str | None,
        typer.Option("--run-a", metavar="ID", help="Select a run of A by its id; default: the newest run."),
    ] = None,
    run_b: Annotated[
        str | None,
        typer.Option(
            "--run-b",
            metavar="ID",
            help="Select a run of B by its id; default: the same run if B is A, else the newest.",
        ),
    ] = None,
    steps: options.Steps = None,
    steps_a: Annotated[
        StepRange | None,
        typer.Option("--steps-a", help="Select steps of A only.", metavar="M-N", parser=options.parse_steps),
    ] = None,
    steps_b: Annotated[
        StepRange | None,
        typer.Option("--steps-b", help="Select steps of B only.", metavar="M-N", parser=options.parse_steps),
    ] = None,
    since: options.Since = None,
    until: options.Until = None,
    phase: options.Phase = None,
    phase_a: Annotated[
        str | None, typer.Option("--phase-a", help="Select steps of this phase in A only.", metavar="NAME")
    ] = None,
    phase_b: Annotated[
        str | None, typer.Option("--phase-b", help="Select steps of this phase in B only.", metavar="NAME")
    ] = None,
    tz: options.TimeZone = None,
    top: options.Top = 5,
    timings_a: Annotated[
        Path | None,
        typer.Option(
            "--timings-a", help="Use this file's step times for A; see `summary --help`.", metavar="FILE"
        ),
    ] = None,
    timings_b: Annotated[
        Path | None,
        typer.Option(
            "--timings-b", help="Use this file's step times for B; see `summary --help`.", metavar="FILE"
        ),
    ] = None,
    model: options.Model = None,
    json: options.Json = False,
) -> None:
    """Compare two runs, or two parts (phases or ranges of steps) of one run: is B better than A, and why?

    The verdict states whether the difference is statistically significant, how large it is, and which layers
    and experts cause it.
    """
    from eplb_analyze.analysis.compare import compare_runs
    from eplb_analyze.cli.views.compare import render

    out = Output(json=json)
    a = options.find_dump() if a is None else a
    if b is None and run_b is None:
        run_b = run_a

    def opened(
        name: str, dump: StoragePath, run_id: str | None, timings: Path | None,
        own: StepRange | None, phase: str | None,
    ) -> tuple[Run, StepRange | None]:  # fmt: skip
        run = out.open_run(dump, run_id, model)
        if tz is not None:
            run.clock.zone = tz
        # Another program's times are matched with the steps of all phases.
        out.join_times(run, timings, name)
        chosen = options.in_time(run.clock, own or steps, since, until)
        return run if phase is None else run.of_phase(phase), chosen

    one, in_a = opened("A", a, run_a, timings_a, steps_a, phase if phase_a is None else phase_a)
    other, in_b = opened(
        "B", a if b is None else b, run_b, timings_b, steps_b, phase if phase_b is None else phase_b
    )
    result = compare_runs(one, other, steps_a=in_a, steps_b=in_b)
    out.clocks = {"a": one.clock, "b": other.clock}
    for name, run, chosen in (("A", one, in_a), ("B", other, in_b)):
        out.notes(
            f"{name}: {text}"
            for text in run.retired_notes(chosen, "the experts' part, cost and causes of incidents")
        )
    out.emit(result.to_json, lambda console: render(console, result, (one.clock, other.clock), top))
    if json:  # the text has them
        for warning in result.warnings:
            print_message("warning", warning)
    code = EXIT_DONE if result.comparable else EXIT_CHECK_FAILED
    sides = {"A": (one, result.a), "B": (other, result.b)}
    for name, (run, side) in sides.items():
        if out.lost_data(run, side.steps, name):
            code = EXIT_UNUSABLE
    raise typer.Exit(code)
