"""Errors as a user sees them, one line of text and an exit code each; and findings about a dump."""

from __future__ import annotations

from typing import Literal

from eplb_dump.format.frozen import frozen

EXIT_DONE, EXIT_CHECK_FAILED, EXIT_USAGE, EXIT_UNUSABLE = 0, 1, 2, 3


Severity = Literal["error", "warning", "info"]


class AnalyzeError(Exception):
    """An error that a user can act on; ``str(error)`` is the line shown."""

    exit_code = EXIT_UNUSABLE


class DumpError(AnalyzeError):
    """The dump is missing, damaged, or too incomplete for what was asked."""


class NotInDumpError(AnalyzeError):
    """The dump does not have the run, model, layer or step that was asked for."""

    exit_code = EXIT_USAGE


class UsageError(AnalyzeError):
    """An option or argument is wrong or missing, or what it asks for is not possible."""

    exit_code = EXIT_USAGE


@frozen
class Finding:
    """A fact about a dump that affects its figures. ``error``: they lack data or cannot be trusted."""

    #: `error`: figures lack data or cannot be trusted. `warning`: they may. `info`: no harm.
    severity: Severity
    #: Stable, for programs, for instance ``damaged_file``; docs/cli.md lists them under "check".
    code: str
    #: The fact in a sentence.
    text: str
