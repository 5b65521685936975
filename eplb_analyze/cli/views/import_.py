"""Shows which run `import` made, and what its source does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_line
from eplb_analyze.text import plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.transfer.importers.import_dump import ImportReport


def render(console: Console, report: ImportReport) -> None:
    def section(title: str, texts: list[str]) -> None:
        if texts:
            print_line(console, (title, "bold"))
        for text in texts:
            print_line(console, text, indent=2)

    what = f"{report.system} {report.kind}"
    print_line(console, ("imported ", "bold"), what, f" from {plural(report.files, 'file')}")
    print_line(console, f"into {report.into} as run {report.run_id}, model {report.model}")
    named = report.layer_numbers
    layers = plural(report.num_layers, "MoE layer")
    if named:
        layers += f" ({named[0]} to {named[-1]})" if len(named) > 1 else f" ({named[0]})"
    slots = f"{report.num_physical_experts} slots on {plural(report.ep_size, 'EP rank')}"
    console.print(f"{layers} × {report.num_logical_experts} experts in {slots}, scope {report.scope}")
    steps = plural(report.steps, "step")
    if report.complete < report.steps:
        steps += f", {report.complete:,} of them recorded by all ranks"
    console.print(
        steps + (f", {report.not_sampled:,} between them not sampled" if report.not_sampled else "")
    )
    console.print(f"written: {plural(report.rows, 'row')}, {report.bytes:,} bytes")
    console.print()
    section("not known", list(report.unknown.values()))
    section("assumed", list(report.assumed.values()))
    section("also", report.notes)
