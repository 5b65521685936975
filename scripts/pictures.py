"""Makes the pictures of README and docs from real output: `python scripts/pictures.py demo-dump`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from eplb_analyze import open_run
from eplb_analyze.commands import layer as layer_command
from eplb_analyze.commands import summary as summary_command
from eplb_analyze.layer import layer_report
from eplb_analyze.summary import summarize

IMAGES = Path(__file__).parents[1] / "docs/images"


def main(dump: str) -> None:
    run = open_run(dump)
    console = Console(
        record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor",
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip
    console.print("$ eplb-analyze summary demo-dump", style="bold")
    summary_command.render(console, summarize(run))
    console.print("\n$ eplb-analyze layer 2 --step 200 demo-dump", style="bold")
    report = layer_report(run, 2, step=200)
    layer_command.render(console, report, report)
    IMAGES.mkdir(parents=True, exist_ok=True)
    svg = console.export_svg(title="eplb-analyze")
    # Fonts of the reader's machine: nothing is fetched to show the picture.
    (IMAGES / "demo.svg").write_text(strip_fonts(svg))


def strip_fonts(svg: str) -> str:
    start = svg.index("@font-face")
    end = svg.rindex("@font-face")
    end = svg.index("}", end) + 1
    return svg[:start] + svg[end:].replace("Fira Code,", "")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo-dump")
