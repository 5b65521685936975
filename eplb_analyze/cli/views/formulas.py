"""Shows the balance formulas and where they come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_line

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.metrics.formulas import Formula


def render(console: Console, formulas: Iterable[Formula]) -> None:
    print_line(console, "T[s, l, r] = tokens of step s, layer l on EP rank r; a layer is active in a step")
    print_line(console, "when its maximum is above 0. A run's figure is the mean over its steps.")
    print_line(console)
    for f in formulas:
        print_line(console, (f.name, "bold"), f"  {f.text}")
        facts = f"{f.direction}; source: {f.source}"
        print_line(console, (facts, "dim"), indent=4)
        if f.warning:
            print_line(console, (f.warning, "yellow"), indent=4)
    print_line(console)
    print_line(console, ("idle fraction", "bold"), "  1 − Σ_{s,l} mean_r T / Σ_{s,l} max_r T")
    text = "how much less work, in tokens, the mean rank has than the slowest; not time; 0 is perfect"
    print_line(console, (text, "dim"), indent=4)
