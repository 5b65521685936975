"""The registry of commands, and the handler that turns every exception into one line and an exit code."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from typing import Annotated

import typer

from eplb_analyze.cli.commands import (
    advise,
    check,
    compact,
    compare,
    copy,
    experts,
    export,
    formulas,
    import_,
    layer,
    placement,
    postmortem,
    ranks,
    rearrangements,
    recover,
    replay,
    report,
    runs,
    summary,
    timeline,
    traffic,
    watch,
)
from eplb_analyze.cli.output import PROGRAM, discard, print_message
from eplb_analyze.errors import EXIT_UNUSABLE, AnalyzeError
from eplb_analyze.text import clean

DEBUG_VARIABLE = "EPLB_ANALYZE_DEBUG"

app = typer.Typer(
    name=PROGRAM,
    help="Read what eplb_dump recorded: how balanced the experts of a run were, and why not.",
    epilog="Exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 the dump is unusable or damaged.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("summary", short_help="How balanced was the run, and is the data complete?")(summary.summary)
app.command("runs", short_help="List the runs of a dump, one line each.")(runs.runs)
app.command("layer", short_help="What did each rank, slot and expert of a layer get?")(layer.layer)
app.command("ranks", short_help="Which rank or node do the others wait for?")(ranks.ranks)
app.command("timeline", short_help="How did a figure move over the steps?")(timeline.timeline)
app.command("placement", short_help="Who is where, and what changed?")(placement.placement)
app.command("experts", short_help="Which experts are hot, cold or dead; replicated enough?")(experts.experts)
app.command("traffic", short_help="From which rank to which did the tokens go?")(traffic.traffic)
app.command("rearrangements", short_help="Did each rearrangement help, and for how long?")(
    rearrangements.rearrangements
)
app.command("compare", short_help="Compare two runs, or two ranges of steps of one run.")(compare.compare)
app.command("replay", short_help="What would other settings have given?")(replay.replay)
app.command("advise", short_help="Leave the load balancer as it is, or change it to what?")(advise.advise)
app.command("postmortem", short_help="Over many runs: which were bad, and why?")(postmortem.postmortem)
app.command("report", short_help="One HTML file that works offline, to send around.")(report.report)
app.command("check", short_help="Is the dump complete and intact?")(check.check)
app.add_typer(export.app, name="export", short_help="Write what engines load at their start, or the loads.")
app.command("import", short_help="Read another system's recording into a dump.")(import_.import_)
app.command("copy", short_help="Bring a run, or a part of it, to another place.")(copy.copy)
app.command("compact", short_help="Write a run anew, in few files that hold the sums.")(compact.compact)
app.command("formulas", short_help="The balance formulas, with their sources.")(formulas.formulas)
app.command("watch", short_help="How does a run stand that is being written?")(watch.watch)
app.command("recover", short_help="Recover recordings from crashed writers.")(recover.recover)


def _print_version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        print(f"{PROGRAM} {version('eplb-dump')}")
        raise typer.Exit


@app.callback()
def root(
    _version_flag: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Read what eplb_dump recorded: how balanced the experts of a run were, and why not."""


def _os_error_message(error: OSError) -> str:
    """What the system refused, with a hint if there is one."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.EMFILE:
        return f"{where}too many open files; allow more with `ulimit -n 4096`"
    # Arrow's message names the file, and has more lines.
    return f"{where}{error.strerror or error}".splitlines()[0]


def main() -> None:
    # A closed stream is None in Python, and print(file=None) would write errors to stdout.
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    # A closed pipe ends the program silently, as usual. Characters that the terminal lacks are escaped.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app(prog_name=PROGRAM)
        finally:
            sys.stdout.flush()  # here a full disk is an error like any other; at exit it is not
    except AnalyzeError as error:
        print_message("error", error)
        sys.exit(error.exit_code)
    except MemoryError:
        print_message("error", "there is not enough memory for this")
        sys.exit(EXIT_UNUSABLE)
    except OSError as error:
        print_message("error", _os_error_message(error))
        discard(sys.stdout)
        sys.exit(EXIT_UNUSABLE)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print_message(
            "error", f"{type(error).__name__}: {clean(error)} (set {DEBUG_VARIABLE}=1 for a traceback)"
        )
        sys.exit(EXIT_UNUSABLE)
