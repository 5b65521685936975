"""What a notebook shows of a report: what the command prints, in color, as HTML."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eplb_analyze.analysis.timeline_report import DEFAULT_BINS
from eplb_analyze.cli.console import MAX_COLUMNS, console
from eplb_analyze.cli.views import (
    advise,
    check,
    experts,
    layer,
    placement,
    ranks,
    rearrangements,
    replay,
    summary,
    timeline,
    traffic,
)
from eplb_analyze.text import command_line

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.json_report import Report

#: Characters of a line: as many as a timeline of the library's default number of bins takes.
WIDTH = DEFAULT_BINS + timeline.MARGIN
#: Not the page's own font: in nbconvert's pages, ``pre`` has a proportional one, and columns do not line up.
FONT = "Menlo,Consolas,'DejaVu Sans Mono',monospace"
#: Colors are those of the text itself: a notebook has a light or a dark background.
HTML = f'<pre style="font-family:{FONT};line-height:1.25;white-space:pre">{{code}}</pre>'


def html(report: Report) -> str | None:
    """The report as HTML, all names in it escaped; None if no command prints such a report."""
    run, view = report._run, VIEWS.get(type(report).__name__)
    if run is None or view is None:
        return None
    screen = console(
        io.StringIO(), run.clock, lambda command: command_line(command, str(run.path)),
        width=WIDTH, record=True, force_terminal=True, force_jupyter=False, color_system="truecolor",
    )  # fmt: skip
    view(screen, report, run)
    return screen.export_html(code_format=HTML, inline_styles=True)


def _layer(screen: Console, report: Any, run: Any) -> None:
    from eplb_analyze.analysis.layer import since_last_placement

    layer.render(screen, report, since_last_placement(run, report))


def _timeline(screen: Console, report: Any, run: Any) -> None:
    screen.width = max(WIDTH, min(len(report.bins) + timeline.MARGIN, MAX_COLUMNS))
    timeline.render(screen, report)


#: By the class of a report: the command's view, with its defaults.
VIEWS: dict[str, Callable[[Console, Any, Any], None]] = {
    "Advice": lambda screen, report, run: advise.render(screen, report),
    "CheckReport": lambda screen, report, run: check.render(screen, run, report),
    "ExpertReport": lambda screen, report, run: experts.render(screen, report, hot=False, cold=False),
    "LayerReport": _layer,
    "PlacementReport": lambda screen, report, run: placement.render(
        screen, report, single=len(report.layers) == 1, experts=False
    ),
    "RankReport": lambda screen, report, run: ranks.render(screen, report, "rank"),
    "RearrangementReport": lambda screen, report, run: rearrangements.render(screen, report),
    "Replay": lambda screen, report, run: replay.render(screen, report),
    "Summary": lambda screen, report, run: summary.render(screen, report, run.clock),
    "Timeline": _timeline,
    "TrafficReport": lambda screen, report, run: traffic.render(screen, report),
}
