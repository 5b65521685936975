"""Options that several commands share, and what they all do first and last."""

from __future__ import annotations

import enum
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.errors import EXIT_UNUSABLE
from eplb_analyze.reader.step_range import NO_END, StepRange
from eplb_analyze.storage.path import StoragePath, storage_path

if TYPE_CHECKING:
    from eplb_analyze.reader.completeness import Completeness
    from eplb_analyze.reader.run import Run
    from eplb_analyze.replay.settings import Choices

Dump = Annotated[
    StoragePath,
    typer.Argument(
        help="The dump's folder or s3://… or gs://…, or one run=… folder in it.",
        parser=storage_path,
        metavar="DUMP",
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

# What replay and advise try: lists, all combined.
PolicyOption = Annotated[
    str | None,
    typer.Option("--policy", help="deepseek, sglang, vllm, static, or your module:function.", metavar="A,B…"),
]
RedundantOption = Annotated[
    str | None, typer.Option("--redundant", help="Numbers of redundant experts.", metavar="N,N…")
]
IntervalOption = Annotated[
    str | None, typer.Option("--interval", help="Steps between two rearrangements.", metavar="N,N…")
]
WindowOption = Annotated[
    str | None,
    typer.Option("--window", help="Steps before a rearrangement that it is made from.", metavar="N,N…"),
]
StartOption = Annotated[
    str | None,
    typer.Option("--start", help="Steps to the first rearrangement; default: as the engine.", metavar="N,N…"),
]
GroupsOption = Annotated[
    int, typer.Option("--num-groups", help="Groups of experts that the model has, for policies.", min=1)
]
CostOption = Annotated[
    float | None,
    typer.Option(
        "--cost-per-expert-ms",
        help="What a rank needs to fetch one expert of one layer; makes gains net.",
        min=0,
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", help="Threads; default: one a core.", min=1, max=1024)
]


def parse_choices(
    policy: str | None,
    redundant: str | None,
    interval: str | None,
    window: str | None,
    start: str | None,
    ep_size: str | None = None,
) -> Choices:
    """Lists of values, separated by commas; None where an option was not given."""
    from eplb_analyze.policies.policy import named
    from eplb_analyze.replay.settings import Choices

    names = None if policy is None else [name.strip() for name in policy.split(",")]
    for name in names or ():
        named(name)  # before anything is read
    return Choices(
        policies=names,
        redundant=_numbers(redundant, "--redundant", 0),
        intervals=_numbers(interval, "--interval", 1),
        windows=_numbers(window, "--window", 1),
        ep_sizes=_numbers(ep_size, "--ep-size", 1),
        starts=_numbers(start, "--start", 0),
    )


def _numbers(text: str | None, option: str, least: int) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) >= least for part in parts):
        raise typer.BadParameter(
            f"{text!r} is not whole numbers from {least} on, as 100,500", param_hint=option
        )
    return sorted({int(part) for part in parts})


class By(str, enum.Enum):
    rank = "rank"
    node = "node"


ByOption = Annotated[By, typer.Option("--by", help="Show ranks or nodes.")]
RanksPerNodeOption = Annotated[
    int | None, typer.Option("--ranks-per-node", help="Default: what the dump says.", min=1, max=65536)
]


def parse_steps(text: str | None) -> StepRange | None:
    """``A:B`` as a half-open range."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{0,18}):([0-9]{0,18})", text)
    if match is None or text == ":":
        raise typer.BadParameter(f"{text!r} is not A:B, for instance 100:200", param_hint="--steps")
    steps = StepRange(int(match[1] or 0), int(match[2] or NO_END))
    if steps.first >= steps.end:
        raise typer.BadParameter(f"{text!r} is an empty range", param_hint="--steps")
    return steps


def open_for(output: Output, dump: StoragePath, run: str | None, model: str | None) -> Run:
    """Open the run a command is about, and say what was chosen."""
    from eplb_analyze.reader.run import open_run

    opened = open_run(dump, run, model)
    opened.progress = output.progress
    output.notes(opened.notes)
    return opened


def finish(output: Output, run: Run, steps: Completeness | None = None, name: str = "") -> None:
    """Say what was wrong with the dump; where data was lost to it, exit 3 although figures are out.

    ``name``: which of two runs is meant.
    """
    from eplb_analyze.analysis.check import standing_findings, summary_findings

    findings = standing_findings(run) if steps is None else summary_findings(run, steps)
    told = [replace(f, text=f"{name}: {f.text}") for f in findings] if name else findings
    output.findings(told)
    if any(f.severity == "error" for f in findings):
        raise typer.Exit(EXIT_UNUSABLE)
