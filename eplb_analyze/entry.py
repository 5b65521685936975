"""The program's entry: says what to install where only the writer's half is."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from eplb_analyze import cli
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "polars"):
            raise
        print(
            "eplb-analyze: error: it needs more than the writer: pip install 'eplb-dump[analyze]'",
            file=sys.stderr,
        )
        sys.exit(2)
    cli.main()
