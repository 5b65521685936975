"""`watch`: a live view of a run that is being written."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.console import console
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.watch import lines, show
from eplb_analyze.errors import EXIT_UNUSABLE, DumpError, UsageError
from eplb_analyze.storage.path import local
from eplb_analyze.text import clean

if TYPE_CHECKING:
    from eplb_analyze.live.snapshot import Snapshot
    from eplb_analyze.live.watch import Follower


@options.about_a_run
def watch(
    out: RunOutput,
    interval: Annotated[
        float,
        typer.Option("--refresh-seconds", metavar="SECONDS", help="Update the view this often.", min=0.1),
    ] = 1.0,
    window: Annotated[
        int,
        typer.Option("--window-steps", metavar="N", help="Use the newest N steps.", min=1),
    ] = 1000,
    once: Annotated[bool, typer.Option("--once", help="Print one view and exit.")] = False,
) -> None:
    """Show a live view of a run while it is being written: balance, hot experts, incidents.

    Press Ctrl-C to exit.
    """
    if not once and out.json:
        raise UsageError("--json requires --once")
    if not once and not sys.stdout.isatty():
        raise UsageError("the live view needs a terminal; add --once to print one view")
    folder = local(out.dump, "`watch`")
    from eplb_analyze.live.watch import Follower

    if not once:
        _live(lambda: Follower(folder, out.run_id, out.model, window), folder, interval)
        return
    follower = Follower(folder, out.run_id, out.model, window)
    look = follower.look()
    out.notes(follower.notes)
    out.emit(look.to_json, lambda console: show(console, look))
    out.findings(look.findings)
    if look.findings or look.missing_ranks:
        raise typer.Exit(EXIT_UNUSABLE)


def _live(follow: Callable[[], Follower], dump: Path, interval: float) -> None:
    """Refresh the view on an alternate screen until Ctrl-C, then leave the last one on the terminal."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    # SIGTERM must restore the screen and the cursor, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    screen = console(sys.stdout)
    follower: Follower | None = None
    look: Snapshot | None = None
    try:
        with Live(console=screen, screen=True, auto_refresh=False) as live:
            while True:
                due = time.monotonic() + interval
                try:
                    follower = follow() if follower is None else follower
                    look = follower.look()
                    shown = lines(look, screen.width, screen.height)
                except DumpError as error:
                    # The writer creates the folder at the engine's first step: wait for it.
                    if follower is not None or (dump.exists() and not dump.is_dir()):
                        raise
                    shown = [Text(clean(error)), Text("waiting for it; press Ctrl-C to exit", style="dim")]
                live.update(Group(*shown), refresh=True)
                time.sleep(max(0.0, due - time.monotonic()))
    except KeyboardInterrupt:
        pass
    if look is not None:
        show(screen, look)
