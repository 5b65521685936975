"""The entry point of `eplb-analyze`: says what to install if only the writer's packages are there."""

from __future__ import annotations

import os
import sys

from eplb_analyze.forks import allow_forks


def main() -> None:
    # We run our own threads; those of numpy's linear algebra library would compete with them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    allow_forks()
    try:
        from eplb_analyze.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "polars"):
            raise
        print(
            "eplb-analyze: error: the reader is not installed: pip install 'eplb-dump[analyze]' "
            "(in a checkout: pip install '.[analyze]')",
            file=sys.stderr,
        )
        sys.exit(2)
    app.main()


if __name__ == "__main__":
    main()
