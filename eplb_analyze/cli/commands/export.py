"""`export`: placements as files that engines load at their start, and loads as files for other programs."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.export import render_loads, render_placement

app = typer.Typer(
    help="Write a placement for an engine to load at its start, or the loads for another program.",
    epilog="Nothing is written into a dump, and no file replaced without --force. Both take --json.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
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


@app.command("placement", short_help="A placement for an engine to load at its start.")
@options.about_a_run
def placement(
    out: RunOutput,
    target: Annotated[Target, typer.Option("--for", help="Who is to load it.", show_default=False)],
    file: options.File,
    step: Annotated[
        int | None, typer.Option("--step", help="Recorded at this step; default: the last.", min=0)
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="Not recorded, but this policy's: a name, or module:function."),
    ] = None,
    steps: options.Steps = None,
    window: Annotated[
        int | None,
        typer.Option("--window-steps", help="Of these steps, show the policy the last N.", min=1),
    ] = None,
    redundant: Annotated[
        int | None,
        typer.Option(
            "--redundant-experts", help="Redundant experts for the policy; default: as recorded.", min=0
        ),
    ] = None,
    ep_size: Annotated[
        int | None, typer.Option("--ep-size", help="EP ranks for the policy; default: as recorded.", min=1)
    ] = None,
    num_nodes: Annotated[
        int | None, typer.Option("--num-nodes", help="Nodes for the policy; default: as recorded.", min=1)
    ] = None,
    num_groups: Annotated[
        int | None,
        typer.Option("--num-groups", help="Expert groups to keep on a node; default: 1, none.", min=1),
    ] = None,
    num_hidden_layers: Annotated[
        int | None,
        typer.Option("--num-hidden-layers", help="The model's, dense ones included, for SGLang.", min=1),
    ] = None,
    first_layer: Annotated[
        int | None,
        typer.Option("--first-layer", help="The first layer's number, where the dump has none.", min=0),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="For vllm-ascend: move an expert's copies on one device apart.")
    ] = False,
    force: options.Force = False,
) -> None:
    """Write a placement, recorded at a step or made by a policy, for an engine to load at its start.

    A row of `replay` becomes a file with its settings: --policy, --window-steps, --redundant-experts and
    --ep-size, and --steps -N for the placement that it would have made after step N.
    """
    given = dict(zip(POLICY_OPTIONS, (steps, window, redundant, ep_size, num_nodes, num_groups), strict=True))
    if policy is None:
        for name, value in given.items():
            if value is not None:
                raise typer.BadParameter("it is for a placement made by --policy", param_hint=name)
    elif step is not None:
        raise typer.BadParameter("a policy's placement is of --steps, not of one", param_hint="--step")
    if num_hidden_layers is not None and target is not Target.sglang:
        raise typer.BadParameter("it is for --for sglang", param_hint="--num-hidden-layers")
    if repair and target is not Target.vllm_ascend:
        raise typer.BadParameter("it is for --for vllm-ascend", param_hint="--repair")
    from eplb_analyze.transfer.exporters.placements import (
        export_placement,
        policy_placement,
        recorded_placement,
    )

    run = out.open()
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
    out.show(report.to_json, lambda console: render_placement(console, report), found.steps)


@app.command("loads", short_help="The loads of all complete steps, or their sums.")
@options.about_a_run
def loads(
    out: RunOutput,
    load_format: Annotated[
        LoadFormat,
        typer.Option(
            "--as",
            help="csv or parquet: a row a step, layer and slot; logical-npy: summed, for deepseek-ai/EPLB.",
            show_default=False,
        ),
    ],
    file: options.File,
    layer: Annotated[
        list[int] | None, typer.Option("--layer", help="Only this layer; may be given several times.")
    ] = None,
    steps: options.Steps = None,
    force: options.Force = False,
) -> None:
    """Write the loads of all complete steps, by slot and step, or summed by logical expert."""
    from eplb_analyze.transfer.exporters.loads import export_loads

    run = out.open()
    report = export_loads(run, load_format.value, file, steps, layer or None, force=force)
    out.show(report.to_json, lambda console: render_loads(console, report), report.steps)
