"""Budget: how many bytes a session may take, and how many of them its journal may still take.

A session shares its volume with others, so its budget is ``max_bytes``, or what the volume has, whichever is
less. Within it is always room for the sealer's next file, so that the session stays within its budget at
every moment, and the sealer can always make room::

    |<---------------------------- budget ---------------------------->|
    | sealed segments, manifest     | 3 journals    | the sealer's next |
    |<-- what retention leaves ---->|               | files             |
    |<-- what the drainer may fill ---------------->|
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from eplb_dump.arguments import require_age, require_bytes
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import JournalAppender
from eplb_dump.format.schema import MANIFEST_FILE, SESSION_FILE

MAX_BYTES_VARIABLE = "EXPERT_LOAD_DUMP_MAX_BYTES"
MAX_AGE_VARIABLE = "EXPERT_LOAD_DUMP_MAX_AGE"
MIN_FREE_VARIABLE = "EXPERT_LOAD_DUMP_MIN_FREE"
#: A smaller budget has no room for a few segments.
LEAST_BUDGET = 16 << 20
#: A segment takes this share of the budget at most, but may be so large; many small ones are slow to read.
SEGMENT_SHARE = 32
LEAST_SEGMENT = 1 << 20
#: What the sealer may write before it removes something, in segments. The files of a segment are larger than
#: its journal if every slot is a rank of its own: then they have each count twice.
_WORK_SEGMENTS = 4
#: The open journal, one that is being sealed, and one more. If sealing cannot keep up, the drainer waits.
_JOURNALS = 3
#: How long the budget is what was there when a write found no space, although the volume seems to have some.
_REFUSED_SECONDS = 60.0


@frozen
class Retention:
    """What a session keeps; None: all.

    Attributes:
        max_bytes: the most bytes that its folder takes.
        max_age: seconds after which steps are removed.
        min_free_bytes: what is to stay free on its volume.
    """

    max_bytes: int | None = None
    max_age: float | None = None
    min_free_bytes: int | None = None

    @classmethod
    def of(
        cls,
        max_bytes: int | str | None,
        max_age: float | str | None,
        min_free_bytes: int | str | None,
    ) -> Retention:
        """Raises TypeError or ValueError, naming the argument."""
        return cls(
            None if max_bytes is None else require_bytes("max_bytes", max_bytes, LEAST_BUDGET),
            None if max_age is None else require_age("max_age", max_age),
            None if min_free_bytes is None else require_bytes("min_free_bytes", min_free_bytes, 0),
        )

    def or_environment(self, environment: Mapping[str, str] = os.environ) -> Retention:
        """With what the environment says where this says nothing. Raises ValueError, naming the variable."""
        most, age, free = (
            environment.get(name) or None
            for name in (MAX_BYTES_VARIABLE, MAX_AGE_VARIABLE, MIN_FREE_VARIABLE)
        )
        max_bytes, max_age, min_free_bytes = self.max_bytes, self.max_age, self.min_free_bytes
        if max_bytes is None and most is not None:
            max_bytes = require_bytes(MAX_BYTES_VARIABLE, most, LEAST_BUDGET)
        if max_age is None and age is not None:
            max_age = require_age(MAX_AGE_VARIABLE, age)
        if min_free_bytes is None and free is not None:
            min_free_bytes = require_bytes(MIN_FREE_VARIABLE, free, 0)
        return Retention(max_bytes, max_age, min_free_bytes)

    @property
    def keeps_all(self) -> bool:
        return self == Retention()


class Space:
    """The bytes that a session takes, and may take.

    Its sizes are what the writer wrote, so that asking costs no system call. The drainer's thread writes
    ``journals``, the sealer's the rest.

    Attributes:
        journals: the journals that are not sealed, by name.
        sealed: the bytes of all other files, when the sealer last changed one.
    """

    def __init__(self, retention: Retention, session_bytes: int) -> None:
        """``session_bytes``: how long the session's metadata is, which each file repeats."""
        self.journals: dict[str, JournalAppender] = {}
        self.sealed = 0
        self._retention = retention
        self._session_bytes = session_bytes
        self._segments = 0
        self._budget: int | None = None
        #: Until when a smaller budget holds, as a write found no space; and that budget.
        self._refused: tuple[float, int] = 0.0, 0

    @property
    def used(self) -> int:
        return self.sealed + self._in_journals

    @property
    def _in_journals(self) -> int:
        return sum(journal.size for journal in list(self.journals.values()))

    def leave(self, journal: JournalAppender) -> None:
        """A journal stays as it is."""
        self.sealed += journal.size
        self._segments += journal.size
        self.journals.pop(journal.path.name, None)

    def add(self, folder: Path, size: int) -> None:
        """Count files of a new segment, without a look at all others. Raises OSError."""
        self._segments += size
        others = sum((folder / name).stat().st_size for name in (MANIFEST_FILE, SESSION_FILE))
        self.sealed = self._segments + others

    def measure(self, folder: Path) -> None:
        """Count the bytes of the session's files. Raises OSError."""
        with os.scandir(folder) as found:
            self.sealed = sum(file.stat().st_size for file in found if file.name not in self.journals)

    def refresh(self, folder: Path) -> None:
        """Look how much the volume has. Raises OSError."""
        volume = shutil.disk_usage(folder)
        limits = [] if self._retention.max_bytes is None else [self._retention.max_bytes]
        if volume.total:  # some file systems do not know their size
            limits.append(self.used + volume.free - (self._retention.min_free_bytes or 0))
        until, refused = self._refused
        if time.monotonic() < until:
            limits.append(refused)
        self._budget = max(0, min(limits)) if limits else None

    def refuse(self) -> None:
        """A write found no space: whatever the volume says, more than now does not fit for a while."""
        self._refused = time.monotonic() + _REFUSED_SECONDS, self.used

    def segment_bytes(self, requested: int) -> int:
        """How large a journal may become."""
        return requested if self._budget is None else min(requested, _segment_bytes(self._budget))

    def has_room(self, size: int) -> bool:
        """Whether a journal may take so many bytes more. Always, if all is kept."""
        budget = self._budget
        if self._retention.keeps_all or budget is None:
            return True
        size += self._session_bytes
        journals = _JOURNALS * _segment_bytes(budget)
        most = budget - self._work_bytes(budget)
        return self._in_journals + size <= journals and self.used + size <= most

    def for_segments(self, candidates: int) -> int | None:
        """What retention may leave of the segments that can be thinned, which take ``candidates`` bytes."""
        budget = self._budget
        if budget is None:
            return None
        others = self.sealed - candidates
        return max(0, budget - self._work_bytes(budget) - _JOURNALS * _segment_bytes(budget) - others)

    @property
    def fits_work(self) -> bool:
        """Whether the sealer can seal a journal within the budget."""
        budget = self._budget
        return budget is None or self.used + self._work_bytes(budget) <= budget

    @property
    def is_volume_short(self) -> bool:
        """Whether the volume leaves less than ``max_bytes``."""
        most = self._retention.max_bytes
        return self._budget is not None and (most is None or self._budget < most)

    def _work_bytes(self, budget: int) -> int:
        # A segment has up to five files with the metadata; a new journal has it, too.
        return _WORK_SEGMENTS * _segment_bytes(budget) + 6 * self._session_bytes


def _segment_bytes(budget: int) -> int:
    return max(LEAST_SEGMENT, budget // SEGMENT_SHARE)
