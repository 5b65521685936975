"""Shared by the engine plugins: settings, one-time warnings, and one run for all ranks of a start.

Nothing heavy is imported here: engines load every plugin in every process, even if it is not enabled.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from eplb_dump.format.frozen import frozen

if TYPE_CHECKING:
    from eplb_dump.writer import ExpertLoadWriter

FOLDER_VARIABLE = "EXPERT_LOAD_DUMP_DIR"
INTERVAL_VARIABLE = "EXPERT_LOAD_DUMP_INTERVAL"
#: How long a rank waits, once, for the run id from EP rank 0.
AGREEMENT_SECONDS = 20.0
#: Where the ranks of a start keep its id, in torch.distributed's key-value store.
START_KEY = "eplb_dump/start"

_logged: set[str] = set()


def warn_once(logger: logging.Logger, text: str) -> None:
    """Log a warning, once per process."""
    if text not in _logged:
        _logged.add(text)
        logger.warning("%s", text)


@frozen
class Settings:
    """The settings in the environment variables."""

    folder: str
    interval: int

    @classmethod
    def from_environment(
        cls, folder: str | None = None, environment: Mapping[str, str] = os.environ
    ) -> Settings | None:
        """None if recording is not enabled. Raises ValueError if a variable is invalid.

        Args:
            folder: what the engine's own configuration names; None: the variable does.
        """
        folder = folder or environment.get(FOLDER_VARIABLE, "")
        if not folder:
            return None
        text = environment.get(INTERVAL_VARIABLE, "") or "1"
        if not (text.isascii() and text.isdigit() and 1 <= int(text) < 1 << 31):
            raise ValueError(f"{INTERVAL_VARIABLE} must be a whole number of steps, at least 1, not {text!r}")
        return cls(folder, int(text))


def open_in_one_run(
    make: Callable[[str | None, str | None], ExpertLoadWriter],
    *,
    rank: int,
    store: Any,
    key: str,
    logger: logging.Logger,
    timeout: float = AGREEMENT_SECONDS,
) -> ExpertLoadWriter:
    """Open this rank's writer in the run of all ranks of one engine start.

    EP rank 0 claims the run and puts its id into torch.distributed's key-value store; the others read
    it there. This happens once. If EP rank 0 does not record, the others wait ``timeout`` seconds and
    then look for the run in the dump folder, by the id of the start that all ranks know.

    Args:
        make: opens the writer in the given run, of a start with the given id; for None, in a run that it
            finds or creates, of a start without an id.
        store: a torch.distributed store that all ranks of this start share; None: there is none.
        key: the same on all ranks, and not used by another start or configuration in this store.
    """
    if store is None:
        return make(None, None)
    start_id = agree_on_start(store, START_KEY)
    if rank == 0:
        writer = make(None, start_id)
        store.set(key, writer.info.run_id)
        return writer
    return make(read_from_store(store, key, logger, timeout), start_id)


def agree_on_start(store: Any, key: str) -> str | None:
    """An id for this engine start, the same on all ranks that share a torch.distributed store.

    The first rank that asks makes it, so no rank waits. None if the store cannot do that.
    """
    try:
        return store.compare_set(key, "", secrets.token_hex(8)).decode() or None
    except Exception:  # stores raise various errors
        return None


def read_from_store(
    store: Any, key: str, logger: logging.Logger, timeout: float = AGREEMENT_SECONDS
) -> str | None:
    """The value that EP rank 0 put into a torch.distributed store; None if there is none in time."""
    try:
        store.wait([key], timedelta(seconds=timeout))
        return store.get(key).decode() or None
    except Exception as error:  # stores raise various errors
        warn_once(logger, f"EP rank 0 did not publish its run id ({type(error).__name__})")
        return None
