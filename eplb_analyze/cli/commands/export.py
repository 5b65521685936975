"""`export`: placements that engines load at their start, loads for other programs, a trace for Perfetto."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.help import Command, Group, examples
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.export import render_loads, render_placement, render_trace

app = typer.Typer(
    cls=Group,
    help="Write a placement that an engine can load at startup, loads for another program, or a trace for "
    "Perfetto.\n\nNone of these commands writes into a dump. All take --json.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


class Target(str, enum.Enum):
    sglang = "sglang"
    trtllm = "trtllm"
    vllm_ascend = "vllm-ascend"
    vllm_mapping = "vllm-mapping"
    json = "json"


class LoadFormat(str, enum.Enum):
    csv = "csv"
    parquet = "parquet"
    logical_npy = "logical-npy"


#: Options that need --policy.
POLICY_OPTIONS = (
    "--steps",
    "--window-steps",
    "--redundant-experts",
    "--ep-size",
    "--num-nodes",
    "--num-groups",
)


@app.command(
    "placement",
    cls=Command,
    short_help="Write a placement that an engine can load at startup.",
    epilog=examples(
        "export placement --for vllm-mapping --step 4 -o 4.map dump",
        "export placement --for json --policy deepseek -o new.json dump",
    ),
)
@options.about_a_run
def placement(
    out: RunOutput,
    target: Annotated[
        Target, typer.Option("--for", help="Write the format of this engine.", show_default=False)
    ],
    file: options.File,
    step: Annotated[
        int | None,
        typer.Option(
            "--step",
            metavar="N",
            help="Export the placement recorded at this step; default: the last.",
            min=0,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="NAME",
            help="Export the placement that this policy computes: a name, or module:function.",
        ),
    ] = None,
    steps: options.Steps = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window-steps",
            metavar="N",
            help="Give the policy only the last N of the selected steps.",
            min=1,
        ),
    ] = None,
    redundant: Annotated[
        int | None,
        typer.Option(
            "--redundant-experts",
            metavar="N",
            help="Give the policy this many redundant experts; default: as recorded.",
            min=0,
        ),
    ] = None,
    ep_size: Annotated[
        int | None,
        typer.Option(
            "--ep-size", metavar="N", help="Place on this many EP ranks; default: as recorded.", min=1
        ),
    ] = None,
    num_nodes: Annotated[
        int | None,
        typer.Option(
            "--num-nodes", metavar="N", help="Place on this many nodes; default: as recorded.", min=1
        ),
    ] = None,
    num_groups: Annotated[
        int | None,
        typer.Option(
            "--num-groups",
            metavar="N",
            help="Keep each of this many expert groups on one node; default: 1 (no groups).",
            min=1,
        ),
    ] = None,
    num_hidden_layers: Annotated[
        int | None,
        typer.Option(
            "--num-hidden-layers",
            metavar="N",
            help="For sglang: set the number of the model's hidden layers, dense layers included.",
            min=1,
        ),
    ] = None,
    first_layer: Annotated[
        int | None,
        typer.Option(
            "--first-layer",
            metavar="N",
            help="Number the layers from N, if the dump does not have their numbers.",
            min=0,
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="For vllm-ascend: move replicas of one expert to different devices."),
    ] = False,
    force: options.Force = False,
) -> None:
    """Write a placement, recorded or computed by a policy, that an engine can load at startup.

    To export the placement of a row in `replay`, pass the row's settings (--policy, --window-steps,
    --redundant-experts, --ep-size). Add --steps -N to get its placement after step N.
    """
    given = dict(zip(POLICY_OPTIONS, (steps, window, redundant, ep_size, num_nodes, num_groups), strict=True))
    if policy is None:
        for name, value in given.items():
            if value is not None:
                raise typer.BadParameter("this option applies only with --policy", param_hint=name)
    elif step is not None:
        raise typer.BadParameter(
            "a policy computes a placement from a range of steps; use --steps instead", param_hint="--step"
        )
    if num_hidden_layers is not None and target is not Target.sglang:
        raise typer.BadParameter(
            "this option applies only with --for sglang", param_hint="--num-hidden-layers"
        )
    if repair and target is not Target.vllm_ascend:
        raise typer.BadParameter("this option applies only with --for vllm-ascend", param_hint="--repair")
    from eplb_analyze.transfer.exporters.placements import (
        export_placement,
        policy_placement,
        recorded_placement,
    )

    run = out.open(with_loads=policy is not None)
    if policy is None:
        found = recorded_placement(run, step)
    else:
        found = policy_placement(
            run,
            policy,
            steps,
            window=window,
            redundant=redundant,
            ep_size=ep_size,
            num_nodes=num_nodes,
            num_groups=num_groups or 1,
        )
    report = export_placement(
        run,
        target.value,
        file,
        found,
        num_hidden_layers=num_hidden_layers,
        first_layer=first_layer,
        repair=repair,
        force=force,
    )
    out.show(
        report.to_json,
        lambda console: render_placement(console, report),
        found.steps,
        of_steps=found.steps is not None,
    )


@app.command(
    "loads",
    cls=Command,
    short_help="Write the loads of all complete steps, or their sums.",
    epilog=examples(
        "export loads --as parquet -o loads.parquet dump",
        "export loads --as csv --layer 1 --steps 2-7 -o loads.csv dump",
    ),
)
@options.about_a_run
def loads(
    out: RunOutput,
    load_format: Annotated[
        LoadFormat,
        typer.Option(
            "--as",
            help="Write one row per step, layer and slot (csv, parquet), or sums per expert (logical-npy).",
            show_default=False,
        ),
    ],
    file: options.File,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            "--layer", metavar="N", help="Write only this layer; repeat the option for several layers."
        ),
    ] = None,
    steps: options.Steps = None,
    force: options.Force = False,
) -> None:
    """Write the loads of all complete steps, either by step and slot or summed by logical expert."""
    from eplb_analyze.transfer.exporters.loads import export_loads

    run = out.open(with_loads=True)
    report = export_loads(run, load_format.value, file, steps, layer or None, force=force)
    out.show(report.to_json, lambda console: render_loads(console, report), report.steps)


@app.command(
    "trace",
    cls=Command,
    short_help="Write a timeline of steps and incidents for Perfetto.",
    epilog=examples(
        "export trace -o trace.json.gz dump",
        "export trace --steps 2-7 --rank 0 -o part.json dump",
    ),
)
@options.about_a_run
def trace(
    out: RunOutput,
    file: options.File,
    steps: options.Steps = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(
            "--rank",
            metavar="N",
            help="Also draw this rank's steps; repeat the option for several ranks.",
            min=0,
        ),
    ] = None,
    max_ranks: Annotated[
        int | None,
        typer.Option(
            "--max-ranks",
            metavar="N",
            help="Without --rank, draw at most N ranks: ranks of incidents first, then others.",
            min=0,
            show_default="8",
        ),
    ] = None,
    force: options.Force = False,
) -> None:
    """Write a trace for Perfetto or Chrome: steps, balance, incidents and rearrangements over time.

    Times are clock times, as in traces of torch.profiler, so both can be opened together.
    The file is compressed if its name ends in .gz.
    """
    if rank and max_ranks is not None:
        raise typer.BadParameter(
            "--rank and --max-ranks cannot be combined; use one of them", param_hint="--max-ranks"
        )
    from eplb_analyze.transfer.exporters.trace import MOST_RANKS, export_trace

    run = out.open()
    most = MOST_RANKS if max_ranks is None else max_ranks
    report = export_trace(run, file, steps, ranks=rank or None, most_ranks=most, force=force)
    out.show(report.to_json, lambda console: render_trace(console, report, named=bool(rank)), report.steps)
