"""Options that several commands share, each defined once, and the parsers of their values."""

from __future__ import annotations

import enum
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Literal, TypeVar

import typer

from eplb_analyze.cli.output import RunOutput
from eplb_analyze.errors import UsageError
from eplb_analyze.sessions.step_range import NO_END, StepRange
from eplb_analyze.storage.path import StoragePath, full_text, storage_path
from eplb_analyze.text import PROGRAM

T = TypeVar("T")

#: The engine's variable names the dump, so a command needs not.
DUMP_VARIABLE = "EXPERT_LOAD_DUMP_DIR"

if TYPE_CHECKING:
    import datetime

    from eplb_analyze.reader.clock import RunClock
    from eplb_analyze.reader.moment import Moment
    from eplb_analyze.replay.settings import Choices


def parse_steps(text: str) -> StepRange:
    """Parse ``M-N``: steps M to N, both included; either may be left out."""
    match = re.fullmatch(r"([0-9]{0,18})-([0-9]{0,18})", text)
    if match is None or text == "-":
        raise typer.BadParameter(_instead_of(text))
    steps = StepRange(int(match[1] or 0), int(match[2]) + 1 if match[2] else NO_END)
    if steps.first >= steps.end:
        raise typer.BadParameter(f"{text!r} selects no steps, because its end is before its start")
    return steps


def _instead_of(text: str) -> str:
    """What to write instead of a range of steps that is not one."""
    if re.fullmatch(r"[0-9]{1,18}", text):
        return f"{text!r} is one step; write --step {text}"
    half_open = re.fullmatch(r"([0-9]{0,18}):([0-9]{0,18})", text)
    if text != ":" and half_open and (not half_open[2] or int(half_open[2]) > int(half_open[1] or 0)):
        steps = StepRange(int(half_open[1] or 0), int(half_open[2] or NO_END))
        return f"{text!r} is not a range of steps; write --steps {steps}, which includes both ends"
    return f"{text!r} is not a range of steps; write M-N, M- or -N, for example 100-199"


def parse_step(text: str) -> int:
    """The number of one step."""
    if re.fullmatch(r"[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[0-9]{0,18}-[0-9]{0,18}", text) and text != "-":
        raise typer.BadParameter(f"{text!r} is a range of steps; write --steps {text}")
    raise typer.BadParameter(f"{text!r} is not the number of a step")


def one_range(steps: StepRange | None, step: int | None) -> StepRange | None:
    """The range that --steps or --step asks for; None for all steps."""
    if step is None:
        return steps
    if steps is not None:
        raise typer.BadParameter(
            "--step and --steps cannot be combined; use one of them", param_hint="--step"
        )
    return StepRange(step, step + 1)


class GpuName(str, enum.Enum):
    """The keys of :data:`eplb_analyze.metrics.kernel_times.KERNELS`."""

    h100 = "h100"
    h200 = "h200"
    b200 = "b200"


class Grouping(str, enum.Enum):
    rank = "rank"
    node = "node"


class TierName(str, enum.Enum):
    """What figures are from: :mod:`eplb_analyze.reader.rolled_up`."""

    steps = "steps"
    minutes = "minutes"


def tier_name(tier: TierName | None) -> Literal["steps", "minutes"] | None:
    return None if tier is None else tier.value


# Which run, and what of it.
Dump = Annotated[
    StoragePath | None,
    typer.Argument(
        help="A dump: a folder, s3://… or gs://…, or one run=… folder in it.",
        parser=storage_path,
        metavar="DUMP",
        envvar=DUMP_VARIABLE,
        show_default="the current folder",
    ),
]
Source = Annotated[
    StoragePath,
    typer.Argument(
        help="A dump: a folder, s3://… or gs://…, or one run=… folder in it.",
        parser=storage_path,
        metavar="SRC",
        show_default=False,
    ),
]
Destination = Annotated[
    StoragePath,
    typer.Argument(
        help="The dump to write into: a folder, s3://… or gs://….",
        parser=storage_path,
        metavar="DST",
        show_default=False,
    ),
]
Run = Annotated[
    str | None,
    typer.Option(
        "--run", metavar="ID", help="Select a run by its id or a unique prefix; default: the newest run."
    ),
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Select a model, if the run has several.")
]
OneRun = Annotated[
    str | None,
    typer.Option("--run", metavar="ID", help="Select a run by its id or a unique prefix; default: all runs."),
]
OneModel = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Select a model; default: all models.")
]
Steps = Annotated[
    StepRange | None,
    typer.Option(
        "--steps",
        help="Select steps M to N, both included; M- and -N leave one end open.",
        metavar="M-N",
        parser=parse_steps,
    ),
]


def parse_moment(text: str) -> Moment:
    """A time of a run; see :mod:`eplb_analyze.reader.moment`."""
    from eplb_analyze.reader.moment import Moment

    try:
        return Moment.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_zone(name: str) -> datetime.tzinfo:
    """A time zone by its IANA name."""
    import zoneinfo

    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise typer.BadParameter(
            f"{name!r} is not a known time zone; write an IANA name, for example Europe/Berlin",
            param_hint="--tz",
        ) from None


Since = Annotated[
    Any,
    typer.Option(
        "--since",
        help="Select steps from this time on: 03:12, 03:12:30, ISO 8601, or -10m (10 minutes before "
        "the run ends).",
        metavar="T",
        parser=parse_moment,
    ),
]
Until = Annotated[
    Any,
    typer.Option(
        "--until",
        help="Select steps up to the end of this second, including the step in progress.",
        metavar="T",
        parser=parse_moment,
    ),
]
At = Annotated[
    Any,
    typer.Option("--at", help="Select the step in progress at this time.", metavar="T", parser=parse_moment),
]
TimeZone = Annotated[
    Any,
    typer.Option(
        "--tz",
        help="Read and print times in this zone, for example Europe/Berlin; default: UTC.",
        metavar="NAME",
        parser=parse_zone,
    ),
]
Phase = Annotated[
    str | None,
    typer.Option("--phase", help="Select steps of this phase, for example decode.", metavar="NAME"),
]
Step = Annotated[int | None, typer.Option("--step", help="Select one step.", metavar="N", parser=parse_step)]
Layer = Annotated[int | None, typer.Option("--layer", metavar="N", help="Show one layer; default: all.")]

Tier = Annotated[
    TierName | None,
    typer.Option(
        "--tier",
        help="Compute figures from steps, or from sums per minute; default: minutes if steps of the range "
        "are no longer kept.",
    ),
]

# What a step took, for the cost in milliseconds.
Timings = Annotated[
    Path | None,
    typer.Option(
        "--timings",
        help="Take step times from this file: a vLLM, SGLang, Dynamo or TensorRT-LLM log, or a table (CSV, "
        "…); default: the recorded step times.",
        metavar="FILE",
    ),
]
Gpu = Annotated[
    GpuName | None,
    typer.Option(
        "--gpu",
        help="If step times do not show the cost of imbalance, estimate it from this GPU's kernel times.",
    ),
]

# How to show it.
Top = Annotated[int, typer.Option("--top", metavar="N", help="Show this many rows of a ranking.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
By = Annotated[Grouping, typer.Option("--by", help="Group by rank or by node.")]
RanksPerNode = Annotated[
    int | None,
    typer.Option(
        "--ranks-per-node",
        metavar="N",
        help="Set the number of ranks per node; default: as recorded.",
        min=1,
        max=65536,
    ),
]
File = Annotated[
    Path, typer.Option("--output", "-o", help="Write to this file.", metavar="FILE", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]

# The settings that `replay` and `advise` try: lists, all combined.
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="Try deepseek, sglang, vllm, swift_balance, flash_lb, biased, naive, layer_budgets, "
        "active_experts, near_sources, static, round_robin, your own module:function, or oracle, which "
        "places each step by its own loads.",
        metavar="A,B…",
    ),
]
Dispatch = Annotated[
    str | None,
    typer.Option(
        "--dispatch",
        help="Share tokens among replicas as measured, even, random, vllm, sglang-static, sglang-dynamic, "
        "vllm-ascend, or lp (the bound).",
        metavar="A,B…",
    ),
]
OneDispatch = Annotated[
    str | None,
    typer.Option(
        "--dispatch",
        help="Share tokens among replicas as measured, even, random, vllm, sglang-static, sglang-dynamic or "
        "vllm-ascend.",
        metavar="NAME",
    ),
]
Redundant = Annotated[
    str | None,
    typer.Option("--redundant-experts", help="Try these numbers of redundant experts.", metavar="N,N…"),
]
Interval = Annotated[
    str | None,
    typer.Option(
        "--interval-steps", help="Try these numbers of steps between rearrangements.", metavar="N,N…"
    ),
]
Window = Annotated[
    str | None,
    typer.Option("--window-steps", help="Try placements computed from this many past steps.", metavar="N,N…"),
]
Start = Annotated[
    str | None,
    typer.Option(
        "--start",
        help="Make the first rearrangement after this many steps; default: as the engine did.",
        metavar="N,N…",
    ),
]
# When the tried settings rearrange less, later or in parts; `none` in a list is a setting without it.
MaxUtilization = Annotated[
    str | None,
    typer.Option(
        "--max-utilization",
        help="Rearrange only if utilization since the last check is at most X, like SGLang's threshold.",
        metavar="X,X…",
    ),
]
MinBalancedness = Annotated[
    str | None,
    typer.Option(
        "--min-balancedness",
        help="Rearrange only if a layer's balancedness over the window is below X, like ATOM's threshold.",
        metavar="X,X…",
    ),
]
LayersPerStep = Annotated[
    str | None,
    typer.Option(
        "--layers-per-step",
        help="Change this many layers in each step, as asynchronous engines do; default: all at once.",
        metavar="N,N…",
    ),
]
DelaySteps = Annotated[
    str | None,
    typer.Option(
        "--delay-steps", help="Change the first layers this many steps after the window ends.", metavar="N,N…"
    ),
]
MaxMoves = Annotated[
    str | None,
    typer.Option(
        "--max-moves",
        help="Move at most this many expert weights in a rearrangement, where they help most.",
        metavar="N,N…",
    ),
]
NumGroups = Annotated[
    int | None,
    typer.Option(
        "--num-groups",
        metavar="N",
        help="Set the number of expert groups; default: as recorded, else inferred from the placements.",
        min=1,
    ),
]
NumNodes = Annotated[
    int | None,
    typer.Option(
        "--num-nodes",
        metavar="N",
        help="Set the number of nodes; default: as recorded, else inferred from the placements.",
        min=1,
    ),
]


class SortBy(str, enum.Enum):
    tokens = "tokens"
    active = "active"
    traffic = "tokens+traffic"
    ms = "ms"


Objective = Annotated[
    SortBy | None,
    typer.Option(
        "--objective",
        help="Judge by tokens, active experts, tokens and traffic, or ms per step; default: ms if measured, "
        "else tokens.",
    ),
]
CrossNodeWeight = Annotated[
    float | None,
    typer.Option(
        "--cross-node-weight",
        metavar="W",
        help="For tokens+traffic, count a token that a rank gets from another node as W more tokens of work.",
        min=0,
    ),
]
CostPerExpertMs = Annotated[
    float | None,
    typer.Option(
        "--cost-per-expert-ms",
        metavar="X",
        help="Subtract X ms from the gain each time a rank fetches one expert of one layer.",
        min=0,
    ),
]
ExpertMb = Annotated[
    float | None,
    typer.Option(
        "--expert-mb",
        help="Set the size of one expert's weights in one layer, to show memory and moved weights in GB.",
        min=0,
        metavar="MB",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Use this many threads or processes; default: one per core.",
        min=1,
        max=1024,
    ),
]

#: Options that select steps by time, in the order of the help.
_TIMES = {"since": Since, "until": Until, "at": At, "phase": Phase, "tz": TimeZone}
#: The help of each command ends with these options, in this order.
_LAST = ("run", "model", "workers", "json")


def find_dump() -> StoragePath:
    """The current folder, for a command without DUMP.

    Raises UsageError if it is neither a dump nor in one.
    """
    from eplb_dump.format.schema import LEVEL_PREFIXES, RUN_PREFIX

    here = Path()
    if here.absolute().name.startswith(LEVEL_PREFIXES) or any(here.glob(f"{RUN_PREFIX}*")):
        return here
    command = " ".join([PROGRAM, *sys.argv[1:], "/path/to/dump"])
    raise UsageError(
        f"no dump is given, and the current folder is not a dump; write `{command}`, or set {DUMP_VARIABLE}"
    )


def named(dump: StoragePath | None) -> str | None:
    """The dump as a command has to name it; None if EXPERT_LOAD_DUMP_DIR or the current folder says it."""
    variable = os.environ.get(DUMP_VARIABLE)
    text = None if dump is None else full_text(dump)
    return None if variable and text == full_text(storage_path(variable)) else text


def about_a_run(
    command: Callable[Concatenate[RunOutput, ...], None], *, phases: bool = True, all_runs: bool = False
) -> Callable[..., None]:
    """Add the argument DUMP, and the options --run, --model and --json, to a command.

    The command declares only what is its own, after a :class:`RunOutput`, which it gets for these four. A
    command with --steps also gets --step, unless it has its own (one step as a range), --since, --until,
    --at, --phase and --tz, and one with --step alone --at and --tz: it sees the steps that they select.
    In a command with a ``destination``, DUMP is SRC, and must be given.

    Args:
        phases: False: its result is not of the steps of a phase.
        all_runs: Whether it is about all runs and models unless one is selected.
    """

    def run_command(
        dump: Dump = None,
        run: Run = None,
        model: Model = None,
        json: Json = False,
        **own: Any,
    ) -> None:
        out = RunOutput(find_dump() if dump is None else dump, run, model, json=json)
        out.named = named(dump)
        asked = {name: own.pop(name, None) for name in _TIMES}
        if single_step is not None:
            asked["step"] = own.pop("step")
        _select(out, own, **asked)
        one = own.get("step")
        out.asked = own.get("steps") if one is None else StepRange(one, one + 1)
        command(out, **own)

    def place(parameter: inspect.Parameter) -> tuple[bool, int]:
        last = _LAST.index(parameter.name) if parameter.name in _LAST else -1
        return parameter.default is not inspect.Parameter.empty, last

    dump, *shared, _ = inspect.signature(run_command, eval_str=True).parameters.values()
    if all_runs:
        run, model, *others = shared
        shared = [run.replace(annotation=OneRun), model.replace(annotation=OneModel), *others]
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    if any(parameter.name == "destination" for parameter in own):
        dump = dump.replace(default=inspect.Parameter.empty, annotation=Source)
    single_step = _single_step(own)
    names = [parameter.name for parameter in own]
    if single_step is not None:
        own.insert(1 + names.index("steps"), single_step)
    if "steps" in names or "step" in names:
        after = 1 + max(i for i, parameter in enumerate(own) if parameter.name in ("steps", "step"))
        left_out = {
            *(() if phases else ("phase",)),
            *(() if "steps" in names else ("since", "until", "phase")),
        }
        own[after:after] = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in _TIMES.items()
            if name not in left_out
        ]
    # Typer reads the signature and the annotations.
    functools.update_wrapper(run_command, command)
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in sorted([dump, *shared, *own], key=place)]
    run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run_command


def _select(
    out: RunOutput,
    own: dict[str, Any],
    *,
    since: Moment | None,
    until: Moment | None,
    at: Moment | None,
    tz: datetime.tzinfo | None,
    phase: str | None,
    step: int | None = None,
) -> None:
    """Set the steps that a command sees to those selected by number and by time."""
    steps = one_range(own.get("steps"), step)
    if "steps" in own:
        own["steps"] = steps
    out.zone, out.phase = tz, phase
    if since is None and until is None and at is None:
        return
    one = step if step is not None else own.get("step")
    if at is not None and not all(other is None for other in (since, until, one, steps)):
        raise typer.BadParameter(
            "--at selects one step; remove the other options that select steps", param_hint="--at"
        )
    if one is not None:
        raise typer.BadParameter("--step selects one step; remove --since and --until", param_hint="--step")
    run = out.opened()
    if at is not None:
        step = run.clock.at(*at.span(run.clock))
        own.update({"step": step} if "step" in own else {"steps": StepRange(step, step + 1)})
    else:
        own["steps"] = in_time(run.clock, steps, since, until)


def in_time(
    clock: RunClock, steps: StepRange | None, since: Moment | None, until: Moment | None
) -> StepRange | None:
    """The steps of a range that were in progress from one time to another; the range without such times."""
    if since is None and until is None:
        return steps
    begin = None if since is None else since.span(clock)[0]
    end = None if until is None else until.span(clock)[1]
    return clock.between(begin, end, steps)


def _single_step(own: list[inspect.Parameter]) -> inspect.Parameter | None:
    """The parameter for --step, if a command has --steps and no --step of its own."""
    names = [parameter.name for parameter in own]
    if "steps" not in names or "step" in names:
        return None
    return inspect.Parameter("step", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Step)


def parse_choices(
    policy: str | None,
    redundant: str | None,
    interval: str | None,
    window: str | None,
    start: str | None,
    ep_size: str | None = None,
    dispatch: str | None = None,
    *,
    max_utilization: str | None = None,
    min_balancedness: str | None = None,
    layers_per_step: str | None = None,
    delay_steps: str | None = None,
    max_moves: str | None = None,
) -> Choices:
    """Parse comma-separated lists of values; None for an option that was not given."""
    from eplb_analyze.dispatch import named as dispatches
    from eplb_analyze.policies.policy import ORACLE, named
    from eplb_analyze.replay.settings import Choices

    names = None if policy is None else [name.strip() for name in policy.split(",")]
    for name in names or ():
        if name != ORACLE:
            named(name)  # reject unknown policies before reading anything
    shared = None if dispatch is None else [name.strip() for name in dispatch.split(",")]
    for name in shared or ():
        dispatches.check(name)
    return Choices(
        dispatches=shared,
        policies=names,
        redundant=_numbers(redundant, "--redundant-experts", 0),
        intervals=_numbers(interval, "--interval-steps", 1),
        windows=_numbers(window, "--window-steps", 1),
        ep_sizes=_numbers(ep_size, "--ep-size", 1),
        starts=_numbers(start, "--start", 0),
        max_utilizations=_or_none(max_utilization, "--max-utilization", _shares),
        min_balancedness=_or_none(min_balancedness, "--min-balancedness", _shares),
        layers_per_step=_or_none(layers_per_step, "--layers-per-step", functools.partial(_numbers, least=1)),
        delays=_numbers(delay_steps, "--delay-steps", 0) or [0],
        max_moves=_or_none(max_moves, "--max-moves", functools.partial(_numbers, least=1)),
    )


def _or_none(
    text: str | None, option: str, parse: Callable[[str | None, str], Sequence[T] | None]
) -> list[T | None]:
    """Parse a list that may contain ``none``, first in the result; without the option it has only that."""
    parts = ["none"] if text is None else [part.strip() for part in text.split(",")]
    values = [part for part in parts if part != "none"]
    found = parse(",".join(values), option) if values else []
    return [*([None] if len(values) < len(parts) else []), *(found or [])]


def _shares(text: str | None, option: str) -> list[float]:
    parts = [part.strip() for part in (text or "").split(",")]
    if not all(re.fullmatch(r"[0-9]?\.?[0-9]{1,9}", part) and 0 < float(part) <= 1 for part in parts):
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers above 0 and up to 1; write, for example, 0.8,0.9 or none,0.9",
            param_hint=option,
        )
    return sorted({float(part) for part in parts})


def _numbers(text: str | None, option: str, least: int) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) >= least for part in parts):
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers from {least} to 999,999,999; write, for example, "
            "100,500",
            param_hint=option,
        )
    return sorted({int(part) for part in parts})
