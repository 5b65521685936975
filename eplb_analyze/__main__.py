"""The program's entry: says what to install where only the writer's half is."""

from __future__ import annotations

import os
import sys


def main() -> None:
    # The work is shared by threads of ours; those of numpy's matrix library would only fight them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from eplb_analyze.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "polars"):
            raise
        print(
            "eplb-analyze: error: it needs more than the writer: pip install 'eplb-dump[analyze]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app.main()


if __name__ == "__main__":
    main()
