"""Placements and loads as files that other programs read: a module a format, and ``files`` to write them."""

from __future__ import annotations

from eplb_analyze.errors import UsageError


class ExportError(UsageError):
    """What was asked for cannot be a file of that format, or the file cannot be written."""
