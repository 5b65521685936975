"""`formulas`: the balance formulas, with their sources."""

from __future__ import annotations

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output
from eplb_analyze.cli.views.formulas import render


def formulas(json: options.Json = False) -> None:
    """Explain the balance formulas that engines and papers use, and cite their sources."""
    from eplb_analyze.metrics.formulas import ACTIVE_EXPERTS, FORMULAS

    known = [*FORMULAS.values(), ACTIVE_EXPERTS]
    document = {
        "formulas": [
            {
                "name": f.name,
                "formula": f.text,
                "source": f.source,
                "better": f.better,
                "perfect": f.perfect,
                "warning": f.warning or None,
            }
            for f in known
        ]
    }
    Output(json=json).emit(lambda: document, lambda console: render(console, known))
