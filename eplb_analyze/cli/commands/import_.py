"""`import`: another system's recording becomes a run of a dump."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output
from eplb_analyze.cli.views.import_ import render
from eplb_analyze.storage.path import StoragePath, local, storage_path

FORMATS = ("sglang", "trtllm", "vllm", "megatron", "ascend", "array", "table", "topk")
STEP_PER = ("request", "position")


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="The recording: a file of another system, or a folder of such files.", metavar="SRC"
        ),
    ],
    destination: Annotated[
        StoragePath,
        typer.Argument(
            help="The dump, a local folder, to write the new run into.",
            parser=storage_path,
            metavar="DST",
            envvar="EXPERT_LOAD_DUMP_DIR",
            show_default=False,
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help=f"Read as {', '.join(FORMATS)}; default: detected."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Set the model's name.")
    ] = None,
    ep_size: Annotated[
        int | None, typer.Option("--ep-size", metavar="N", help="Set the number of EP ranks.", min=1)
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            "--placement",
            metavar="NAME|FILE",
            help="State where the experts were: an engine's placement file, linear (expert e in slot e), "
            "round_robin (expert e on rank e % EP size), last (assume that the last placement of "
            "SGLang's per_pass recording applied to all steps), or unknown.",
        ),
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(
            "--num-experts", metavar="N", help="Set the number of logical experts per layer.", min=1
        ),
    ] = None,
    token_replication: Annotated[
        int | None,
        typer.Option(
            "--token-replication", metavar="N", help="State how many ranks counted each token.", min=1
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", metavar="M-N", help="Set the layers' numbers in the model, for example 3-60 or 3,5,7."
        ),
    ] = None,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="State that the rows of the source are in time order.")
    ] = False,
    window: Annotated[
        bool,
        typer.Option(
            "--window-sums",
            help="Import the sums over a window from vLLM's snapshots, instead of single steps.",
        ),
    ] = False,
    renumber: Annotated[
        bool,
        typer.Option(
            "--renumber",
            help="Number vLLM's records by their order in the file, and ignore their step numbers.",
        ),
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="PATTERN",
            help="Import only the files of a folder that match this pattern, for example '*_pid42.npz'.",
        ),
    ] = None,
    array: Annotated[
        str | None,
        typer.Option(
            "--array", metavar="NAME", help="Import this array of a .npz file, or this column of expert ids."
        ),
    ] = None,
    tokens_per_step: Annotated[
        int | None,
        typer.Option(
            "--tokens-per-step",
            metavar="N",
            help="Count N tokens in a row as one step, for expert ids per token without steps.",
            min=1,
        ),
    ] = None,
    step_per: Annotated[
        str | None,
        typer.Option(
            "--step-per",
            metavar="WHAT",
            help="Count each request as one step (request), or the n-th tokens of all requests (position).",
        ),
    ] = None,
    run_id: Annotated[
        str | None,
        typer.Option("--run-id", metavar="ID", help="Set the new run's id; default: the time of the import."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Convert recordings from SGLang, TensorRT-LLM, vLLM, Megatron or another system into a run.

    If the source does not contain something that a run needs, the error names the option to add, or the new
    run records it as unknown.
    """
    if format is not None and format not in FORMATS:
        raise typer.BadParameter(
            f"no format {format!r}; choose one of: {', '.join(FORMATS)}", param_hint="--format"
        )
    if step_per not in (None, *STEP_PER):
        raise typer.BadParameter(f"choose one of: {', '.join(STEP_PER)}", param_hint="--step-per")
    numbers = _parse_layers(layers)
    from eplb_analyze.transfer.importers.import_dump import Options, import_dump
    from eplb_dump.format.schema import MAX_EXPERTS, MAX_LOAD

    for name, value, most in (
        ("--ep-size", ep_size, MAX_EXPERTS),
        ("--num-experts", num_experts, MAX_EXPERTS),
        ("--token-replication", token_replication, MAX_LOAD),
        ("--tokens-per-step", tokens_per_step, MAX_LOAD),
    ):
        if value is not None and value > most:
            raise typer.BadParameter(f"at most {most}", param_hint=name)
    options = Options(
        model=model or None,
        ep_size=ep_size,
        placement=placement,
        num_logical_experts=num_experts,
        token_replication=token_replication,
        layers=numbers,
        ordered=ordered,
        window=window,
        renumber=renumber,
        only=only,
        array=array,
        tokens_per_step=tokens_per_step,
        step_per=step_per,
    )
    report = import_dump(source, local(destination, "`import`"), format, options, run_id)
    Output(json=json).emit(report.to_json, lambda console: render(console, report))


def _parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Parse ``3-60`` or ``3,5,7`` into ascending layer numbers."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})-(\d{1,6})", text)
    if match:
        numbers = list(range(int(match[1]), int(match[2]) + 1))
    elif re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        numbers = [int(n) for n in text.split(",")]
    else:
        numbers = []
    if not numbers or numbers != sorted(set(numbers)):
        raise typer.BadParameter(
            f"{text!r} is neither a range M-N nor an ascending list", param_hint="--layers"
        )
    return tuple(numbers)
