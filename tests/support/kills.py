"""A process that dies at one of its calls that change what is on the disk, simulated in process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from eplb_dump.format import frames

#: Modules and functions: what sealing and thinning change files with.
FILE_CALLS = ((os, "fsync"), (os, "replace"), (os, "unlink"), (frames, "encode"))
#: What `prune` changes files and folders with.
FOLDER_CALLS = tuple((os, name) for name in ("fsync", "replace", "unlink", "rmdir", "link", "rename"))


class Killed(BaseException):
    """The death of the process: nothing catches it."""


def kill_before(patch: pytest.MonkeyPatch, count: int, calls: Sequence[tuple[Any, str]] = FILE_CALLS) -> None:
    """Die at the ``count``-th of these calls, before it has an effect; none after it has one."""
    alive = iter(range(count))

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if next(alive, None) is None:
                raise Killed
            return real(*args, **options)

        return call

    for owner, name in calls:
        patch.setattr(owner, name, dying(getattr(owner, name)))
