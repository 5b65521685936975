"""The registry of commands and the last line of defence: no traceback ever reaches a user."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from eplb_analyze.commands import check, layer, metrics, seal, summary
from eplb_analyze.errors import EXIT_UNUSABLE, AnalyzeError
from eplb_analyze.output import PROGRAM, clean, say

DEBUG_VARIABLE = "EPLB_ANALYZE_DEBUG"

app = typer.Typer(
    name=PROGRAM,
    help="Read what eplb_dump recorded: how balanced the experts of a run were, and why not.",
    epilog="Exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 the dump is unusable or damaged.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("summary")(summary.summary)
app.command("layer")(layer.layer)
app.command("check")(check.check)
app.command("metrics")(metrics.metrics)
app.command("seal")(seal.seal)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        print(f"{PROGRAM} {version('eplb-dump')}")
        raise typer.Exit


@app.callback()
def root(
    _version_flag: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Read what eplb_dump recorded: how balanced the experts of a run were, and why not."""


def main() -> None:
    try:
        app(prog_name=PROGRAM)
    except AnalyzeError as error:
        say("error", error)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        say("error", f"{type(error).__name__}: {clean(error)} (set {DEBUG_VARIABLE}=1 for a traceback)")
        sys.exit(EXIT_UNUSABLE)
