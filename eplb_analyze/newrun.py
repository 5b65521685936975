"""A new run in a dump, made offline: it appears whole or not at all, and nothing is written over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from eplb_analyze.errors import DumpError, UsageError
from eplb_dump.format import MODEL_PREFIX, RUN_ID_PATTERN, RUN_PREFIX, model_slug

#: What is being written; readers look for other names.
UNFINISHED = "new.tmp"


@dataclass(frozen=True)
class NewRun:
    """Where a run is made: ``root`` is a dump of its own until it is whole."""

    run_id: str
    root: Path


@contextmanager
def new_run(into: Path, run_id: str | None, base: str, model: str) -> Iterator[NewRun]:
    """A run of one model, which is in the dump ``into`` when the block has ended without an error.

    Args:
        run_id: its name; None: ``base``, or where that is there already ``base-2`` and so on.

    Raises:
        UsageError: the run is there already, or its name is none.
        DumpError: the folder cannot be written.
    """
    if run_id is not None and not RUN_ID_PATTERN.fullmatch(run_id):
        raise UsageError(f"--run-id: {run_id!r} must be letters, digits, '.', '_' or '-', at most 128")
    try:
        run_id, folder = _claim(into, run_id, base)
    except OSError as error:
        raise DumpError(f"{into}: {error.strerror or error}") from None
    new = NewRun(run_id, folder / UNFINISHED)
    try:
        new.root.mkdir()
        yield new
        name = f"{MODEL_PREFIX}{model_slug(model)}"
        os.rename(new.root / f"{RUN_PREFIX}{run_id}" / name, folder / name)
        shutil.rmtree(new.root)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise DumpError(f"{folder}: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _claim(into: Path, run_id: str | None, base: str) -> tuple[str, Path]:
    into.mkdir(parents=True, exist_ok=True)
    if run_id is not None:
        folder = into / f"{RUN_PREFIX}{run_id}"
        try:
            folder.mkdir()
        except FileExistsError:
            raise UsageError(f"{folder}: it is there already; choose another --run-id") from None
        return run_id, folder
    for number in range(1, 1000):
        run_id = base + (f"-{number}" if number > 1 else "")
        folder = into / f"{RUN_PREFIX}{run_id}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return run_id, folder
    raise FileExistsError(17, "no name for a run is free")
