"""What can go wrong, as a user sees it: one line of text and an exit code; and findings in a dump."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EXIT_DONE, EXIT_CHECK_FAILED, EXIT_USAGE, EXIT_UNUSABLE = 0, 1, 2, 3


Severity = Literal["error", "warning", "info"]


class AnalyzeError(Exception):
    """An error that a user can do something about; ``str(error)`` is the line shown."""

    exit_code = EXIT_UNUSABLE


class DumpError(AnalyzeError):
    """The dump is missing, damaged or incomplete in a way that matters."""

    exit_code = EXIT_UNUSABLE


class NotInDumpError(AnalyzeError):
    """A run, model, layer or step was asked for that the dump does not have."""

    exit_code = EXIT_USAGE


class UsageError(AnalyzeError):
    """Something was asked for in a way that cannot be."""

    exit_code = EXIT_USAGE


@dataclass(frozen=True)
class Finding:
    """Something to know about a dump. ``error``: figures lack data or cannot be trusted."""

    severity: Severity
    #: Stable, for programs, e.g. ``damaged_file``; docs/check.md lists them.
    code: str
    text: str


class ExportError(UsageError):
    """What was asked for cannot be a file of that format, or the file cannot be written."""
