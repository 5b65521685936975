"""`prune`: keep a dump within ages and bytes, tier by tier."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output
from eplb_analyze.cli.views.prune import render
from eplb_analyze.errors import EXIT_CHECK_FAILED

#: Smaller limits are typing errors: 300k for 300G. A writer's own budget has the same minimum.
LEAST_BYTES = 16 << 20
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_SECONDS = {"h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}


def parse_bytes(text: str) -> int:
    """``500G``: so many bytes, in powers of 1000; ``500Gi`` in powers of 1024."""
    match = re.fullmatch(r"([0-9]{1,15})(?:\.([0-9]{1,9}))?\s*([kmgtp]?)(i?)b?", text.strip().lower())
    if match is None or (match[4] and not match[3]):
        raise typer.BadParameter(f"{text!r} is not a size; write, for example, 500G, 64Mi or 1.5T")
    unit = _BYTES[match[3]]
    if match[4]:
        unit = 1024 ** ("", *"kmgtp").index(match[3])
    count = int(match[1]) * unit + (int(match[2]) * unit // 10 ** len(match[2]) if match[2] else 0)
    if count < LEAST_BYTES:
        raise typer.BadParameter(
            f"{text!r} is less than 16Mi, which would remove almost everything; write a size with a "
            "unit, for example 500G, or remove old runs with --max-age"
        )
    return count


def parse_age(text: str) -> int:
    """``7d``: an age in ns, at least an hour."""
    match = re.fullmatch(r"([0-9]{1,9})\s*([a-z]+)", text.strip().lower())
    if match is not None and match[2] == "m":
        raise typer.BadParameter(
            f"{text!r} could be minutes or months; write, for example, 12h, 7d, 4w or 1y"
        )
    if match is not None and (match[2] in ("s", "min") or (match[2] in _SECONDS and not int(match[1]))):
        raise typer.BadParameter(f"{text!r}: the least age is 1h; write, for example, 12h, 7d, 4w or 1y")
    if match is None or match[2] not in _SECONDS:
        raise typer.BadParameter(f"{text!r} is not an age; write, for example, 12h, 7d, 4w or 1y")
    return int(match[1]) * _SECONDS[match[2]] * 10**9


def _age(name: str, text: str) -> Any:
    """An option that takes an age."""
    return typer.Option(name, metavar="AGE", help=text, parser=parse_age)


def prune(
    dump: options.Dump = None,
    max_bytes: Annotated[
        Any,
        typer.Option(
            "--max-bytes",
            metavar="SIZE",
            help="Keep all runs together within this size, for example 500G: thin the oldest steps, tier by "
            "tier.",
            parser=parse_bytes,
        ),
    ] = None,
    keep_full: Annotated[
        Any, _age("--keep-full", "Keep steps younger than this in full, for example 7d.")
    ] = None,
    keep_ranks: Annotated[
        Any, _age("--keep-ranks", "Keep tokens per rank and step for this long, for example 30d.")
    ] = None,
    keep_minutes: Annotated[
        Any, _age("--keep-minutes", "Keep sums per minute for this long, for example 1y.")
    ] = None,
    max_age: Annotated[Any, _age("--max-age", "Remove anything older than this, whatever its tier.")] = None,
    merge_ranks: Annotated[
        bool,
        typer.Option(
            "--merge-ranks",
            help="Before a run is thinned, replace the loads of its ranks with their sums, as compact does.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; print what would be done.")
    ] = False,
    run: options.OneRun = None,
    json: options.Json = False,
) -> None:
    """Limit a dump's age and size: reduce old steps tier by tier, then remove runs past the last limit.

    Tiers: every expert's load of each step (full), tokens per rank of each step (ranks), sums per minute
    (minutes), nothing (gone). It leaves alone what a writer may still be writing. It does not ask for
    confirmation; use --dry-run first. It exits with code 1 if the dump stays larger than --max-bytes, or if
    damaged files could not be thinned, and with 3 if there is no run.
    """
    from eplb_analyze.transfer.prune import prune_dump
    from eplb_analyze.transfer.retention.plan import Policy

    policy = Policy(max_bytes, keep_full, keep_ranks, keep_minutes, max_age)
    out = Output(json=json)
    out.named = options.named(dump)
    where = options.find_dump() if dump is None else dump
    report = prune_dump(where, policy, run, merge=merge_ranks, dry_run=dry_run, progress=out.progress)
    out.emit(report.to_json, lambda console: render(console, report))
    if report.over or report.failed:
        raise typer.Exit(EXIT_CHECK_FAILED)
