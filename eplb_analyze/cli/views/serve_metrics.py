"""Prints metrics in Prometheus' text format: no line is wrapped or styled."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def show(console: Console, text: str) -> None:
    console.out(text.rstrip("\n"), highlight=False)
