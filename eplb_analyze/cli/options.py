"""Options that several commands share, each defined once, and the parsers of their values."""

from __future__ import annotations

import enum
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate

import typer

from eplb_analyze.cli.output import OutputFormat, RunOutput
from eplb_analyze.sessions.step_range import NO_END, StepRange
from eplb_analyze.storage.path import StoragePath, storage_path

if TYPE_CHECKING:
    from eplb_analyze.replay.settings import Choices


def parse_steps(text: str) -> StepRange:
    """Parse ``A:B``, a half-open range."""
    match = re.fullmatch(r"([0-9]{0,18}):([0-9]{0,18})", text)
    if match is None or text == ":":
        raise typer.BadParameter(f"{text!r} is not A:B, for instance 100:200", param_hint="--steps")
    steps = StepRange(int(match[1] or 0), int(match[2] or NO_END))
    if steps.first >= steps.end:
        raise typer.BadParameter(f"{text!r} is an empty range", param_hint="--steps")
    return steps


class GpuName(str, enum.Enum):
    """The keys of :data:`eplb_analyze.metrics.kernel_times.KERNELS`."""

    h100 = "h100"
    h200 = "h200"
    b200 = "b200"


class Grouping(str, enum.Enum):
    rank = "rank"
    node = "node"


# Which run, and what of it.
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
Run = Annotated[str | None, typer.Option("--run", help="A run's id; default: the newest run.")]
Model = Annotated[str | None, typer.Option("--model", help="A model's name, where the run has several.")]
Steps = Annotated[
    StepRange | None,
    typer.Option(
        "--steps",
        help="Steps A to B − 1, as A:B; either may be left out.",
        metavar="A:B",
        parser=parse_steps,
    ),
]
Layer = Annotated[int | None, typer.Option("--layer", help="One layer; default: all.")]

# What a step took, for the cost in milliseconds.
Timings = Annotated[
    Path | None,
    typer.Option(
        "--timings",
        help="Step times that another program measured: a log of vLLM, SGLang, Dynamo or TensorRT-LLM, or a "
        "table; default: those of the recording.",
        metavar="FILE",
    ),
]
Gpu = Annotated[
    GpuName | None,
    typer.Option(
        "--gpu", help="If the run does not show its cost, estimate it from this GPU's kernel times."
    ),
]

# How to show it.
Top = Annotated[int, typer.Option("--top", help="How many rows of a ranking to show.", min=1)]
Output = Annotated[
    OutputFormat, typer.Option("--output", "-o", help="text, or one JSON document.", case_sensitive=False)
]
By = Annotated[Grouping, typer.Option("--by", help="Show ranks or nodes.")]
RanksPerNode = Annotated[
    int | None, typer.Option("--ranks-per-node", help="Default: what the dump says.", min=1, max=65536)
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")]

# The settings that `replay` and `advise` try: lists, all combined.
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="deepseek, sglang, vllm, static, round_robin, or your module:function.",
        metavar="A,B…",
    ),
]
Redundant = Annotated[
    str | None, typer.Option("--redundant", help="Numbers of redundant experts.", metavar="N,N…")
]
Interval = Annotated[
    str | None, typer.Option("--interval", help="Steps between two rearrangements.", metavar="N,N…")
]
Window = Annotated[
    str | None,
    typer.Option("--window", help="Steps before a rearrangement that it is made from.", metavar="N,N…"),
]
Start = Annotated[
    str | None,
    typer.Option("--start", help="Steps to the first rearrangement; default: as the engine.", metavar="N,N…"),
]
NumGroups = Annotated[
    int | None,
    typer.Option(
        "--num-groups",
        help="Groups of experts that the model has; default: as recorded, else as the placements show.",
        min=1,
    ),
]
NumNodes = Annotated[
    int | None,
    typer.Option("--num-nodes", help="Nodes of the recorded ranks; default: as --num-groups.", min=1),
]


class SortBy(str, enum.Enum):
    tokens = "tokens"
    active = "active"
    ms = "ms"


Objective = Annotated[
    SortBy | None,
    typer.Option(
        "--objective",
        help="Judge by tokens, active experts or ms per step; default: ms if measured, else tokens.",
    ),
]
CostPerExpertMs = Annotated[
    float | None,
    typer.Option(
        "--cost-per-expert-ms",
        help="What a rank needs to fetch one expert of one layer; makes gains net.",
        min=0,
    ),
]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Threads; default: one a core.", min=1, max=1024)
]

#: The help of each command ends with these options, in this order.
_LAST = ("run", "model", "workers", "output")


def about_a_run(command: Callable[Concatenate[RunOutput, ...], None]) -> Callable[..., None]:
    """Add the argument DUMP and the options --run, --model and --output to a command.

    The command declares only what is its own, after a :class:`RunOutput`, which it gets for these four.
    """

    def run_command(
        dump: Dump = Path("."),
        run: Run = None,
        model: Model = None,
        output: Output = OutputFormat.text,
        **own: Any,
    ) -> None:
        command(RunOutput(output, dump, run, model), **own)

    def place(parameter: inspect.Parameter) -> tuple[bool, int]:
        last = _LAST.index(parameter.name) if parameter.name in _LAST else -1
        return parameter.default is not inspect.Parameter.empty, last

    *shared, _ = inspect.signature(run_command, eval_str=True).parameters.values()
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    # Typer reads the signature and the annotations.
    functools.update_wrapper(run_command, command)
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in sorted([*shared, *own], key=place)]
    run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run_command


def parse_choices(
    policy: str | None,
    redundant: str | None,
    interval: str | None,
    window: str | None,
    start: str | None,
    ep_size: str | None = None,
) -> Choices:
    """Parse comma-separated lists of values; None for an option that was not given."""
    from eplb_analyze.policies.policy import named
    from eplb_analyze.replay.settings import Choices

    names = None if policy is None else [name.strip() for name in policy.split(",")]
    for name in names or ():
        named(name)  # reject unknown policies before reading anything
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
