"""Commands as typer runs them, with small changes.

``--help`` prints commands in groups, examples, colors on a terminal and plain text in a pipe. Values are
converted without pydantic if they are simple.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand, TyperGroup

from eplb_analyze.cli.console import console
from eplb_analyze.text import PROGRAM

#: The groups of commands, in the order of the help.
LOOK, DRILL_DOWN, DECIDE = "Look", "Drill down", "Decide"
MANY_RUNS, DATA, REFERENCE = "Many runs", "Data", "Reference"


def examples(*commands: str) -> str:
    """The epilog of a command: two commands to copy, a line each."""
    return "\n".join(["Examples:", *(f"eplb-analyze {command}" for command in commands)])


def examples_of(epilog: str) -> list[str]:
    """The commands in an epilog of :func:`examples`."""
    return epilog.splitlines()[1:]


#: Whole numbers that every program reads alike.
INTEGER = re.compile("[0-9]{1,18}")


def _no_type(ctx: Any) -> str:
    return ""


if TYPE_CHECKING:
    _Base = TyperCommand
else:
    _Base = object


class _Conversion:
    """Converts a value as typer does, whose import of pydantic takes an eighth of a small command's time."""

    def __init__(self, by_typer: Callable[[], Any]) -> None:
        self._by_typer = by_typer

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        wanted, info = param.type_descriptor.annotation, param.type_descriptor.parameter_info
        if value is None and not param.multiple and param.nargs == 1:
            return None
        if isinstance(value, str) and info.parser is not None:
            with contextlib.suppress(ValueError):  # of which typer makes a message
                return info.parser(value)
        elif isinstance(value, str) and wanted in (str, Path):
            return wanted(value)
        elif wanted is int and INTEGER.fullmatch(str(value)):
            number = int(value)
            if (info.min is None or number >= info.min) and (info.max is None or number <= info.max):
                return number
        return self._by_typer().coerce(value, param=param, ctx=ctx)


class _Readable(_Base):
    """Help without the names of Python's types, and without colors and boxes in a pipe.

    The epilog is a title and lines that are not wrapped, so that they can be copied.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if hasattr(param, "get_runtime_param") and "get_runtime_param" not in vars(param):
                param.get_runtime_param = functools.partial(_Conversion, param.get_runtime_param)
            if param.param_type_name == "argument":  # Typer writes ``DUMP <StoragePath>``
                param.display_type = param.display_type_rich = _no_type
            elif param.is_flag:  # on a terminal ``--json <bool>``
                param.metavar = ""
        return params

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if not sys.stdout.isatty():
            self.rich_markup_mode = None
            super().format_help(ctx, formatter)
            return
        epilog, self.epilog = self.epilog, None
        super().format_help(ctx, formatter)
        title, *lines = epilog.splitlines() if epilog else [""]
        out = console(sys.stdout)
        out.print(f" {title}", style="bold")
        for line in lines:
            out.print(f"   {line}", soft_wrap=True)

    def format_epilog(self, _: Any, formatter: Any) -> None:
        if self.epilog:
            title, *lines = self.epilog.splitlines()
            formatter.write(f"\n{title}\n")
            formatter.write("".join(f"  {line}\n" for line in lines))


class Command(_Readable, TyperCommand):
    """A command; its epilog is of :func:`examples`."""


def _is_path(word: str) -> bool:
    return "/" in word or Path(word).is_dir()


class Group(_Readable, TyperGroup):
    """A group of commands, listed in the panels that they are registered with, also in a pipe."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None and ctx.parent is None and _is_path(args[0]):
            ctx.fail(f"the command comes first, then the dump: `{PROGRAM} {shlex.join(['summary', *args])}`")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            panel = getattr(command, "rich_help_panel", None)
            title = panel if isinstance(panel, str) else "Commands"
            panels.setdefault(title, []).append((name, command.short_help or ""))
        longest = max(len(name) for rows in panels.values() for name, _ in rows)
        for title, rows in panels.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(longest), text) for name, text in rows])
