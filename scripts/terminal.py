"""What the scripts that renew docs share: the planted incident, and what a command prints about it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
WIDTH = 80


@contextlib.contextmanager
def planted_incident() -> Iterator[Path]:
    """A folder with the recording ``incident`` of docs/investigate/incident.md."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "examples.incident", f"{folder}/incident"], check=True, stdout=sys.stderr
        )
        yield Path(folder)


def printed(arguments: list[str], folder: Path, *, color: bool = False) -> str:
    """What ``eplb-analyze`` prints on a terminal of 80 columns, in a folder."""
    environment = {**os.environ, "COLUMNS": str(WIDTH)}
    if color:
        environment.update(FORCE_COLOR="1", COLORTERM="truecolor")
    result = subprocess.run(
        [sys.executable, "-m", "eplb_analyze", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    return result.stdout


def new_console() -> Console:
    return Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor",
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip
