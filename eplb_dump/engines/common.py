"""What the engines' plugins share: the switch, what is said, and one run for all ranks of a start.

Nothing heavy is imported here, as engines load every plugin in every process, switched on or not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eplb_dump.writer import ExpertLoadWriter

FOLDER_VARIABLE = "EXPERT_LOAD_DUMP_DIR"
INTERVAL_VARIABLE = "EXPERT_LOAD_DUMP_INTERVAL"
#: How long a rank waits, once, for EP rank 0 to say which run this start records into.
AGREEMENT_SECONDS = 20.0

_said: set[str] = set()


def say_once(logger: logging.Logger, text: str) -> None:
    """Log a warning the first time it comes up in this process."""
    if text not in _said:
        _said.add(text)
        logger.warning("%s", text)


@dataclass(frozen=True)
class Settings:
    """What the environment asks for."""

    folder: str
    interval: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings | None:
        """None where recording is not asked for. Raises ValueError where the asking is wrong."""
        folder = environment.get(FOLDER_VARIABLE, "")
        if not folder:
            return None
        text = environment.get(INTERVAL_VARIABLE, "") or "1"
        if not (text.isascii() and text.isdigit() and 1 <= int(text) < 1 << 31):
            raise ValueError(f"{INTERVAL_VARIABLE} must be a whole number of steps from 1 on, not {text!r}")
        return cls(folder, int(text))


def open_in_one_run(
    make: Callable[[str | None], ExpertLoadWriter],
    *,
    rank: int,
    store: Any,
    key: str,
    logger: logging.Logger,
    timeout: float = AGREEMENT_SECONDS,
) -> ExpertLoadWriter:
    """Open this rank's writer in the run of all ranks of one engine start.

    EP rank 0 claims the run and puts its id into the key-value store that torch.distributed keeps
    from start-up; the others read it there. That happens once, and no rank waits for one that does
    not record: after ``timeout`` seconds a rank looks for its run in the dump folder instead.

    Args:
        make: opens the writer in the run given, or, for None, in the one that it finds or makes.
        store: a torch.distributed store that all ranks of this start share; None: there is none.
        key: the same on all ranks, and of no other start or configuration in this store.
    """
    if store is None:
        return make(None)
    if rank == 0:
        writer = make(None)
        store.set(key, writer.info.run_id)
        return writer
    return make(read_from_store(store, key, logger, timeout))


def read_from_store(
    store: Any, key: str, logger: logging.Logger, timeout: float = AGREEMENT_SECONDS
) -> str | None:
    """What EP rank 0 said under a key of a torch.distributed store; None where it says nothing."""
    try:
        store.wait([key], timedelta(seconds=timeout))
        return store.get(key).decode() or None
    except Exception as error:  # a store raises what it likes
        say_once(logger, f"EP rank 0 did not say which run it records into ({type(error).__name__})")
        return None
