"""Makes the pictures in README and docs from real output: `python scripts/pictures.py demo-dump`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from eplb_analyze import open_run
from eplb_analyze.analysis.experts import expert_report
from eplb_analyze.analysis.layer import layer_report
from eplb_analyze.analysis.ranks import rank_report
from eplb_analyze.analysis.rearrangements import rearrangement_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.cli.views import experts, layer, ranks, rearrangements, summary

IMAGES = Path(__file__).parents[1] / "docs/images"


def main(dump: str) -> None:
    run = open_run(dump)
    console = new_console()
    console.print("$ eplb-analyze summary demo-dump", style="bold")
    summary.render(console, summarize(run))
    console.print("\n$ eplb-analyze layer 2 --step 200 demo-dump", style="bold")
    report = layer_report(run, 2, step=200)
    layer.render(console, report, report)
    save(console, "demo")
    console = new_console()
    console.print("$ eplb-analyze rearrangements demo-dump", style="bold")
    rearrangements.render(console, rearrangement_report(run))
    console.print("\n$ eplb-analyze ranks demo-dump", style="bold")
    ranks.render(console, rank_report(run), "rank")
    console.print("\n$ eplb-analyze experts --window-steps 20 demo-dump", style="bold")
    experts.render(console, expert_report(run, window=20), hot=False, cold=False)
    save(console, "questions")


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
    main(sys.argv[1] if len(sys.argv) > 1 else "demo-dump")
