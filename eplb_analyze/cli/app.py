"""The registry of commands, and the handler that turns every exception into one line and an exit code."""

from __future__ import annotations

import difflib
import errno
import io
import keyword
import os
import re
import shlex
import signal
import sys
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer

from eplb_analyze.cli.help import (
    DATA,
    DECIDE,
    DRILL_DOWN,
    LOOK,
    MANY_RUNS,
    REFERENCE,
    Command,
    Group,
    examples,
)
from eplb_analyze.cli.output import discard, print_message
from eplb_analyze.errors import EXIT_UNUSABLE, EXIT_USAGE, AnalyzeError
from eplb_analyze.text import PROGRAM, clean
from eplb_dump.format import __version__

#: Typer has its own copy of click, or click itself.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
DEBUG_VARIABLE = "EPLB_ANALYZE_DEBUG"
#: An unknown option is taken for a typing error of one that is at least this similar.
ALIKE = 0.8


class _Entry(NamedTuple):
    """A command: its function, or its ``app`` if it has commands of its own, is in the module of its name."""

    panel: str
    name: str
    short_help: str
    #: In its help; a test runs them.
    examples: tuple[str, ...] = ()

    def add_to(self, app: typer.Typer) -> None:
        name = f"{self.name}_" if keyword.iskeyword(self.name) else self.name.replace("-", "_")
        module = import_module(f"eplb_analyze.cli.commands.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=self.name, rich_help_panel=self.panel, short_help=self.short_help)
            return
        app.command(
            self.name,
            cls=Command,
            rich_help_panel=self.panel,
            short_help=self.short_help,
            epilog=examples(*self.examples),
        )(getattr(module, name))


#: In the order of the help.
_COMMANDS = [
    _Entry(
        LOOK,
        "summary",
        "Show the verdict, the cost and the incidents of a run.",
        ("summary dump", "summary --since 03:02 --until 03:04 dump"),
    ),
    _Entry(LOOK, "runs", "List the runs of a dump.", ("runs dump", "runs --json dump")),
    _Entry(
        LOOK,
        "watch",
        "Show a live view of a run.",
        ("watch --once dump", "watch --once --window-steps 500 --json dump"),
    ),
    _Entry(
        LOOK,
        "serve-metrics",
        "Serve a live run's metrics to Prometheus.",
        ("serve-metrics --once dump", "serve-metrics --once --json dump"),
    ),
    _Entry(
        LOOK,
        "report",
        "Write one HTML file that works offline.",
        ("report -o report.html dump", "report -o redacted.html --redact --steps 2-7 dump"),
    ),
    _Entry(
        DRILL_DOWN,
        "layer",
        "Show the load of each rank, slot and expert of a layer.",
        ("layer 1 dump", "layer 1 --steps 2-7 dump"),
    ),
    _Entry(
        DRILL_DOWN,
        "experts",
        "Show hot, cold and dead experts, and their replicas.",
        ("experts dump", "experts --hot --layer 1 --window-steps 5 dump"),
    ),
    _Entry(
        DRILL_DOWN,
        "ranks",
        "Show which rank or node the others had to wait for.",
        ("ranks dump", "ranks --by node --ranks-per-node 1 dump"),
    ),
    _Entry(
        DRILL_DOWN,
        "timeline",
        "Plot a metric over the steps of a run.",
        ("timeline dump", "timeline --formula idle_fraction --layer 1 dump"),
    ),
    _Entry(
        DRILL_DOWN,
        "placement",
        "Show which expert is in which slot, and what changed.",
        ("placement dump", "placement --step 8 --against 2 dump"),
    ),
    _Entry(
        DRILL_DOWN,
        "traffic",
        "Show how many tokens each rank sent to each other rank.",
        ("traffic dump", "traffic --layer 1 --steps 2-7 dump"),
    ),
    _Entry(
        DRILL_DOWN,
        "rearrangements",
        "Show whether each rearrangement helped, and for how long.",
        ("rearrangements dump", "rearrangements --window-steps 200 --json dump"),
    ),
    _Entry(
        DECIDE,
        "compare",
        "Compare two runs, or two ranges of steps of one run.",
        ("compare old-dump dump", "compare --steps-a -11 --steps-b 12- dump"),
    ),
    _Entry(
        DECIDE,
        "replay",
        "Replay the recorded loads under other settings.",
        (
            "replay --policy deepseek,static --redundant-experts 2,4 dump",
            "replay --interval-steps 4 --window-steps 4 --top 5 dump",
        ),
    ),
    _Entry(
        DECIDE,
        "advise",
        "Recommend load-balancer settings.",
        ("advise dump", "advise --redundant-experts 2 --fail-below 0.5 dump"),
    ),
    _Entry(
        MANY_RUNS,
        "postmortem",
        "Rank many runs by the cost of imbalance.",
        ("postmortem dump", "postmortem --group-by model --fail-below 0.1 dump"),
    ),
    _Entry(DATA, "check", "Verify that a run is complete and intact.", ("check dump", "check --json dump")),
    _Entry(
        DATA,
        "import",
        "Convert a recording from another system into a run.",
        (
            "import load.npy imported --ep-size 2 --placement linear",
            "import load.npy imported --ep-size 2 --placement linear --json",
        ),
    ),
    _Entry(DATA, "export", "Write a placement for an engine, or loads for other programs."),
    _Entry(
        DATA,
        "copy",
        "Copy a run, or a part of it.",
        ("copy dump copied", "copy --steps 2-7 --ranks 0-1 dump part"),
    ),
    _Entry(
        DATA,
        "compact",
        "Merge the rank files of a run into one compact run.",
        ("compact dump compacted", "compact --run-id small dump compacted"),
    ),
    _Entry(
        DATA, "recover", "Recover recordings from crashed writers.", ("recover dump", "recover --json dump")
    ),
    _Entry(
        DATA,
        "prune",
        "Limit a dump's age and size, tier by tier.",
        (
            "prune --keep-full 7d --keep-ranks 30d --max-age 1y --dry-run dump",
            "prune --max-bytes 500G --json dump",
        ),
    ),
    _Entry(
        REFERENCE,
        "formulas",
        "Explain the balance formulas and cite their sources.",
        ("formulas", "formulas --json"),
    ),
]


def program(command: str | None = None) -> typer.Typer:
    """The command line, with one command, or with all if there is none of this name.

    To import and describe all of them takes a tenth of a small command's time.
    """
    app = typer.Typer(
        name=PROGRAM,
        cls=Group,
        help="Show how well a run's expert load was balanced, what imbalance cost, and what to change.",
        epilog="Exit codes:\n"
        "0  done\n1  a check or a threshold failed\n2  wrong usage\n3  the dump is unusable or incomplete",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for entry in [entry for entry in _COMMANDS if entry.name == command] or _COMMANDS:
        entry.add_to(app)
    return app


def _print_version(show: bool) -> None:
    if show:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _root(
    _version_flag: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Show how well a run's expert load was balanced, what imbalance cost, and what to change."""


def _os_error_message(error: OSError) -> str:
    """What the system refused, with a hint if there is one."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.EMFILE:
        return f"{where}too many open files; raise the limit with `ulimit -n 4096`"
    # Arrow's message names the file, and has more lines.
    return f"{where}{error.strerror or error}".splitlines()[0]


def _usage_error_message(error: Any) -> str:
    """What is wrong with the command line, and how to see what is right."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else PROGRAM
    if guesses := getattr(error, "possibilities", None):  # some of them only begin alike
        error.possibilities = difflib.get_close_matches(error.option_name, guesses, 1, ALIKE)
    message = " ".join(error.format_message().split()).rstrip(".")  # a list of choices has lines and tabs
    if context and "-o" in getattr(getattr(error, "param", None), "opts", ()) and not error.message:
        file = re.search(r" -o (\S+)", context.command.epilog or "")
        if file:  # as in the help's example
            message += f"; write `{shlex.join([PROGRAM, *sys.argv[1:], '-o', file[1]])}`"
    return f"{message} (see `{command} --help`)"


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
            code = program(*sys.argv[1:2])(prog_name=PROGRAM, standalone_mode=False)
        finally:
            sys.stdout.flush()  # here a full disk is an error like any other; at exit it is not
        sys.exit(code if isinstance(code, int) else 0)
    except _UsageError as error:
        print_message("error", _usage_error_message(error))
        sys.exit(EXIT_USAGE)
    except AnalyzeError as error:
        print_message("error", error)
        sys.exit(error.exit_code)
    except MemoryError:
        print_message("error", "not enough memory")
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
