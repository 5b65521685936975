"""`postmortem`: over many runs, which were bad, and why?"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output
from eplb_analyze.cli.views.postmortem import render
from eplb_analyze.errors import EXIT_CHECK_FAILED, EXIT_UNUSABLE, UsageError
from eplb_analyze.storage.path import local, storage_path

if TYPE_CHECKING:
    from eplb_analyze.batch.cache import ResultCache
    from eplb_analyze.batch.comparison import Postmortem
    from eplb_analyze.batch.executors import Executor
    from eplb_analyze.batch.rows import Row


def postmortem(
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DIR…",
            help="Folders, s3://… or gs://… addresses, or glob patterns. Dumps are found at any depth.",
            envvar="EXPERT_LOAD_DUMP_DIR",
            show_default="the current folder",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--group-by",
            metavar="NAME",
            help="Group by model, engine, ep_size, … or an entry of the engine's configuration.",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", metavar="N", help="Show this many runs; --json always prints all.", min=1)
    ] = 20,
    fail_below: Annotated[
        float | None,
        typer.Option(
            "--fail-below",
            metavar="X",
            help="Exit with code 1 if a run's mean balancedness is below X.",
            min=0,
            max=1,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="ID",
            help="Compare with this run; exit with code 1 if a run is significantly worse.",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            help="Save runs.parquet and each run's report in this folder; continue an interrupted batch.",
            parser=lambda text: local(storage_path(text), "`postmortem --save`"),
            metavar="DIR",
        ),
    ] = None,
    html: Annotated[
        bool, typer.Option("--html", help="With --save: also write an HTML report of each run.")
    ] = False,
    executor: Annotated[
        str,
        typer.Option(
            "--executor",
            metavar="NAME",
            help="Run in one process (local), in several processes (processes), or on Ray (ray).",
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            help="Run this many processes; default: one per core.",
            min=1,
            max=1024,
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help="Connect to this Ray cluster; default: start a local one.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Rank many runs by the cost of imbalance, and show its cause and whether EPLB helped.

    If a run cannot be read, its row shows the reason. With --save, an interrupted batch continues, and
    unchanged runs are skipped.
    """
    from eplb_analyze.batch.executors import create_executor

    if html and save is None:
        raise UsageError("--html needs a folder for the reports; add --save DIR")
    if workers is not None and executor == "local":
        raise UsageError("--workers does not apply to --executor local; choose --executor processes or ray")
    if ray_address is not None and executor != "ray":
        raise UsageError("--ray-address applies only with --executor ray")
    out = Output(json=json)
    # First of all, because its workers import what they need at the same time as this process does.
    with closing(create_executor(executor, workers, ray_address)) as chosen:
        result = _result(out, places or ["."], baseline, fail_below, save, html, chosen)
    # Show the results even if they cannot be grouped.
    grouped = by if by in result.groupable() else None
    out.emit(lambda: result.to_json(grouped), lambda console: render(console, result, grouped, top, save))
    if by != grouped:
        raise UsageError(f"--group-by {by}: no run has this; there are: {', '.join(result.groupable())}")
    if result.rows and all(row.status == "broken" for row in result.rows):
        raise typer.Exit(EXIT_UNUSABLE)
    if result.failed:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _result(
    out: Output,
    places: list[str],
    baseline: str | None,
    fail_below: float | None,
    save: Path | None,
    html: bool,
    executor: Executor,
) -> Postmortem:
    from eplb_analyze.batch.cache import ResultCache
    from eplb_analyze.batch.comparison import judge, require_baseline
    from eplb_analyze.batch.postmortem import rows_of
    from eplb_analyze.batch.targets import find

    targets = list(find(places))
    if baseline is not None:
        require_baseline(baseline, targets)
    cache = None if save is None else ResultCache(save)
    rows: list[Row] = []
    fresh: list[Row] = []
    for row, is_new in rows_of(targets, executor, cache):
        rows.append(row)
        out.progress(len(rows), len(targets))
        fresh += [row] if is_new else []
    if cache is not None and html:
        _write_pages(out, cache, rows, fresh, executor)
    result = judge(rows, fail_below, baseline)
    if cache is not None:
        cache.save_table(result)
    return result


def _write_pages(
    out: Output, cache: ResultCache, rows: list[Row], fresh: list[Row], executor: Executor
) -> None:
    """Write the reports of runs that were read, or that have none yet."""
    from eplb_analyze.batch.executors import WorkerDied
    from eplb_analyze.batch.postmortem import write_page

    files = [(row, cache.report_path(row, "html")) for row in rows if row.status != "broken"]
    was_read = {id(row) for row in fresh}
    pages = [(row, file) for row, file in files if id(row) in was_read or not file.exists()]
    for done, ((row, _), reason) in enumerate(executor.map(write_page, pages), 1):
        out.progress(done, len(pages))
        if reason is not None:
            text = reason.reason if isinstance(reason, WorkerDied) else reason
            out.notes([f"no HTML report of run {row.run_id}: {text}"])
