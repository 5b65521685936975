"""`export`: placements as files that engines load at their start, and loads as files for other programs."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eplb_analyze.commands.options import (
    Dump,
    ModelOption,
    OutputOption,
    RunOption,
    StepsOption,
    finish,
    open_for,
    parse_steps,
)
from eplb_analyze.errors import plural
from eplb_analyze.output import Output, OutputFormat, clean, heading, show_notes

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.export import LoadExport, Origin, PlacementExport

app = typer.Typer(
    help="Write a placement for an engine to load at its start, or the loads for another program.",
    epilog="Nothing is written into a dump, and no file replaced without --force. Both take --output json.",
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


To = Annotated[Path, typer.Option("--to", help="The file to write.", metavar="FILE", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")]
#: What is for --policy only, by the name of its option.
OF_A_POLICY = ("--steps", "--window", "--redundant", "--ep-size", "--num-nodes", "--num-groups")


@app.command("placement", short_help="A placement for an engine to load at its start.")
def placement(
    target: Annotated[Target, typer.Option("--for", help="Who is to load it.", show_default=False)],
    to: To,
    dump: Dump = Path("."),
    step: Annotated[
        int | None, typer.Option("--step", help="Recorded at this step; default: the last.", min=0)
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="Not recorded, but this policy's: a name, or module:function."),
    ] = None,
    steps: StepsOption = None,
    window: Annotated[
        int | None,
        typer.Option("--window", help="Of these steps, show the policy the last N.", min=1),
    ] = None,
    redundant: Annotated[
        int | None,
        typer.Option("--redundant", help="Redundant experts for the policy; default: as recorded.", min=0),
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
    force: Force = False,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """Write a placement, recorded at a step or made by a policy, for an engine to load at its start.

    A row of `replay` becomes a file with its settings: --policy, --window, --redundant and --ep-size,
    and --steps :B for the placement that it would have made at step B.
    """
    given = dict(zip(OF_A_POLICY, (steps, window, redundant, ep_size, num_nodes, num_groups), strict=True))
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
    wanted = parse_steps(steps)
    from eplb_analyze.export import export_placement, policy_placement, recorded_placement

    out = Output(output)
    opened = open_for(out, dump, run, model)
    if policy is None:
        found = recorded_placement(opened, step)
    else:
        found = policy_placement(
            opened,
            policy,
            wanted,
            window=window,
            redundant=redundant,
            ep_size=ep_size,
            num_nodes=num_nodes,
            num_groups=num_groups or 1,
        )
    report = export_placement(
        opened,
        target.value,
        to,
        found,
        num_hidden_layers=num_hidden_layers,
        first_layer=first_layer,
        repair=repair,
        force=force,
    )
    out.emit(report.to_json(), lambda console: _placement(console, report))
    finish(out, opened, found.steps)


@app.command("loads", short_help="The loads of all complete steps, or their sums.")
def loads(
    load_format: Annotated[
        LoadFormat,
        typer.Option(
            "--as",
            help="csv or parquet: a row a step, layer and slot; logical-npy: summed, for deepseek-ai/EPLB.",
            show_default=False,
        ),
    ],
    to: To,
    dump: Dump = Path("."),
    layer: Annotated[
        list[int] | None, typer.Option("--layer", help="Only this layer; may be given several times.")
    ] = None,
    steps: StepsOption = None,
    force: Force = False,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """Write the loads of all complete steps, by slot and step, or summed by logical expert."""
    wanted = parse_steps(steps)
    from eplb_analyze.export import export_loads

    out = Output(output)
    opened = open_for(out, dump, run, model)
    report = export_loads(opened, load_format.value, to, wanted, layer or None, force=force)
    out.emit(report.to_json(), lambda console: _loads(console, report))
    finish(out, opened, report.steps)


def _placement(console: Console, report: PlacementExport) -> None:
    origin, placement = report.origin, report.placement
    heading(console, "placement", f" · {_source(origin)} · {origin.model} · run {origin.run_id}")
    redundant = f"{placement.num_redundant_experts or 'none'} redundant"
    slots = f"{plural(placement.num_physical_experts, 'slot')} ({redundant})"
    console.print(
        f"{plural(len(placement.layers), 'layer')} of {slots} on {plural(placement.ep_size, 'rank')}"
    )
    written = f"written for {report.target}: {clean(report.file)}, {report.bytes:,} bytes"
    console.print(written, soft_wrap=True)
    if report.usage:
        console.print(f"to load it:\n  {clean(report.usage)}", soft_wrap=True)
    if report.repair:
        console.print(_repair(report))
    if report.filled_layers:
        names = _ranges(report.filled_layers)
        few = len(report.filled_layers) == 1
        text = f"layer{'' if few else 's'} {names} {'is' if few else 'are'} not in the dump (dense, or not "
        show_notes(console, [text + "recorded); there the file has the placement that engines start with"])
    show_notes(console, report.notes)


def _source(origin: Origin) -> str:
    if origin.policy is None:
        return f"recorded at step {origin.step}"
    return f"{clean(origin.policy)} on steps {origin.first_step} to {origin.last_step}"


def _repair(report: PlacementExport) -> str:
    fixed = report.repair
    if fixed is None or not fixed.layers:
        return "nothing to repair: no device holds an expert twice"
    text = f"repaired in {plural(fixed.layers, 'layer')}: {plural(fixed.swaps, 'swap')} of two slots"
    if fixed.replaced:
        text += f", and {plural(fixed.replaced, 'slot')} with another expert"
    return text


def _loads(console: Console, report: LoadExport) -> None:
    heading(console, "loads", f" · {report.model} · run {report.run_id}")
    when = f"{plural(report.recorded, 'complete step')}, {report.first_step} to {report.last_step}"
    console.print(f"{when}, of {plural(len(report.layers), 'layer')}")
    size = f"{report.bytes:,} bytes"
    rows = f"{plural(report.rows, 'row')}, " if report.rows is not None else ""
    console.print(f"written as {report.format}: {clean(report.file)}, {rows}{size}", soft_wrap=True)
    show_notes(console, report.notes)


def _note(console: Console, text: str) -> None:
    from rich.text import Text

    console.print(Text(f"note: {clean(text)}", style="yellow"))


def _ranges(numbers: list[int]) -> str:
    """``0 to 2, 7``"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in parts)
