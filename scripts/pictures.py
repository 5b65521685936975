"""Makes the pictures of commands in README and docs: `python -m scripts.pictures DUMP`.

DUMP is the recording that `python -m examples.incident incident` makes; its name is in the pictures.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parents[1] / "docs/images"
#: Picture -> the commands whose output it shows, and how many lines of each.
PICTURES = {
    "demo": [("summary", 40)],
    "questions": [("layer 12 --step 1500", 24), ("experts --layer 12", 40), ("rearrangements", 40)],
}


def main(dump: str) -> None:
    for name, commands in PICTURES.items():
        console = new_console()
        for number, (command, lines) in enumerate(commands):
            console.print(
                f"{'' if number == 0 else chr(10)}$ eplb-analyze {command} {Path(dump).name}", style="bold"
            )
            said = printed([*command.split(), Path(dump).name], Path(dump).parent)
            console.print(Text.from_ansi("\n".join(said.splitlines()[:lines])))
        save(console, name)


def printed(arguments: list[str], folder: Path) -> str:
    """What the command prints on a color terminal of 80 columns, in a folder."""
    environment = {**os.environ, "COLUMNS": "80", "FORCE_COLOR": "1", "COLORTERM": "truecolor"}
    result = subprocess.run(
        [sys.executable, "-m", "eplb_analyze", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=environment,
    )
    return result.stdout


def new_console() -> Console:
    return Console(
        record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor",
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip


def save(console: Console, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    svg = console.export_svg(title="eplb-analyze")
    # Use the reader's fonts: showing the picture must not download anything.
    (IMAGES / f"{name}.svg").write_text(strip_fonts(svg))


def strip_fonts(svg: str) -> str:
    start = svg.index("@font-face")
    end = svg.rindex("@font-face")
    end = svg.index("}", end) + 1
    return svg[:start] + svg[end:].replace("Fira Code,", "")


if __name__ == "__main__":
    main(sys.argv[1])
