"""Follows a recording for as long as it is asked to: whatever is wrong with it now can be right later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from eplb_analyze.analysis.cost import RunCost
from eplb_analyze.errors import DumpError, NotInDumpError
from eplb_analyze.live.metric_families import (
    Family,
    MetricsReport,
    SidecarState,
    families,
    is_current,
)
from eplb_analyze.live.snapshot import Snapshot
from eplb_analyze.live.totals import Totals
from eplb_analyze.live.watch import Follower
from eplb_dump.format.schema import RANK_PREFIX, SESSION_PREFIX

#: What takes long is done at most so often, and takes at most so large a share of the time.
RARELY_SECONDS, RARELY_SHARE = 15.0, 0.02
#: Files that grow have names that end like this.
GROWING = ".frames"


class Sidecar:
    """Follows the newest run of a dump, or one run, and has its metrics.

    Attributes:
        state: what is known after the newest :meth:`look`.
        families: the metrics of that state. Another thread may read it at any time.
    """

    def __init__(
        self,
        dump: Path,
        run: str | None = None,
        model: str | None = None,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """``notify`` gets what the user should know: which run is followed, and why there is none."""
        self._dump, self._run, self._model, self._notify = dump, run, model, notify
        self._notified = ""
        self._follower: Follower | None = None
        self._disk = DiskUsage()
        self._cost_due, self._disk_due = _Rarely(), _Rarely()
        self._cost: RunCost | None = None
        #: The run and the newest step that the cost was computed of.
        self._cost_of: tuple[str, int | None] = "", None
        self._disk_bytes: dict[int, int] = {}
        self._looks, self._errors, self._seconds = 0, 0, 0.0
        self.totals = Totals()
        self.state = SidecarState(self.totals)
        self.families: list[Family] = families(self.state)

    def look(self) -> None:
        """Read what was appended. Raises nothing that has to do with the recording."""
        begun, look = time.monotonic(), None
        try:
            look = self.read()
        except (DumpError, NotInDumpError, OSError) as error:
            self._failed(f"{error}; waiting")
        except Exception as error:  # an odd file must not end the watch over the next run
            self._failed(f"{type(error).__name__}: {error}; trying again")
        self._looks += 1
        self._seconds += time.monotonic() - begun
        self._publish(look)

    def read(self) -> Snapshot:
        """Read what was appended. Raises AnalyzeError, OSError."""
        if self._follower is None:
            self._follower = Follower(self._dump, self._run, self._model, totals=self.totals)
        look = self._follower.look()
        self._say(f"following run {look.run_id}, model {look.model}")
        if self._disk_due:
            with self._disk_due:
                self._disk_bytes = self._disk.by_rank(self._follower.model_folder)
        newest = look.run_id, look.newest_step
        if look.run_id != self._cost_of[0]:
            self._cost = None
        if self._cost_due and newest != self._cost_of and is_current(look):
            with self._cost_due:
                self._cost, self._cost_of = self.totals.cost(), newest
        return look

    def read_once(self) -> MetricsReport:
        """Read the run and return its metrics. Raises AnalyzeError, OSError."""
        look = self.read()
        self._looks = 1
        self._publish(look)
        return MetricsReport(look.run_id, look.model, self.families)

    def _publish(self, look: Snapshot | None) -> None:
        self.state = SidecarState(
            self.totals,
            look,
            self._cost,
            self._disk_bytes,
            time.time(),
            self._looks,
            self._seconds,
            self._errors,
        )
        self.families = families(self.state)

    def _failed(self, text: str) -> None:
        self._errors += self._follower is not None
        self._follower = None  # begin again, and count nothing twice
        self._disk_bytes = {}
        self._say(text)

    def _say(self, text: str) -> None:
        if text != self._notified:
            self._notified = text
            self._notify(text)


class _Rarely:
    """Whether something that takes long is due; as a context it measures how long it takes."""

    def __init__(self) -> None:
        self._due = self._begun = 0.0

    def __bool__(self) -> bool:
        return time.monotonic() >= self._due

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._due = now + max(RARELY_SECONDS, (now - self._begun) / RARELY_SHARE)


class DiskUsage:
    """The bytes of a run's files by rank. A file that does not grow is looked at once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, int], int] = {}

    def by_rank(self, model_folder: Path) -> dict[int, int]:
        """Skips what disappears meanwhile or cannot be read."""
        before, self._known = self._known, {}
        found: dict[int, int] = {}
        for rank in _folders(model_folder, RANK_PREFIX):
            digits = rank.name.removeprefix(RANK_PREFIX)
            if digits.isdecimal():
                found[int(digits)] = sum(
                    self._session(str(session), before) for session in _folders(rank, SESSION_PREFIX)
                )
        return found

    def _session(self, folder: str, before: dict[tuple[str, str, int], int]) -> int:
        total = 0
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    key = folder, entry.name, entry.inode()
                    try:
                        size = before[key] if key in before else entry.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:
                        continue
                    if not entry.name.endswith(GROWING):
                        self._known[key] = size
                    total += size
        except OSError:
            pass
        return total


def _folders(parent: Path, prefix: str) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return [Path(e) for e in entries if e.name.startswith(prefix) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
