"""`metrics`: the balance formulas, with their sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.options import OutputOption
from eplb_analyze.cli.output import Output, OutputFormat

if TYPE_CHECKING:
    from rich.console import Console


def metrics(output: OutputOption = OutputFormat.text) -> None:
    """The balance formulas of the field, what each means and where it comes from."""
    from eplb_analyze.metrics.formulas import FORMULAS

    def render(console: Console) -> None:
        from rich.padding import Padding
        from rich.text import Text

        console.print("T[s, l, r] = tokens of step s, layer l on EP rank r; a layer is active in a step")
        console.print("when its maximum is above 0. A run's figure is the mean over its steps.\n")
        for f in FORMULAS.values():
            console.print(Text.assemble((f.name, "bold"), f"  {f.text}"))
            lines = f"{f.better} is better, {f.perfect:g} is perfect; source: {f.source}"
            console.print(Padding(Text(lines, style="dim"), (0, 0, 0, 4)))
            if f.warning:
                console.print(Padding(Text(f.warning, style="yellow"), (0, 0, 0, 4)))
        console.print()
        console.print(Text.assemble(("idle fraction", "bold"), "  1 − Σ_{s,l} mean_r T / Σ_{s,l} max_r T"))
        text = "share of rank time lost if time is proportional to tokens; 0 is perfect"
        console.print(Padding(Text(text, style="dim"), (0, 0, 0, 4)))

    document = {
        "metrics": [
            {
                "name": f.name,
                "formula": f.text,
                "source": f.source,
                "better": f.better,
                "perfect": f.perfect,
                "warning": f.warning or None,
            }
            for f in FORMULAS.values()
        ]
    }
    Output(output).emit(document, render)
