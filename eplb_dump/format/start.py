"""What identifies the engine start of a session, and whether two sessions are of one start."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import MAX_NUMBER, FormatError

_LOOPBACK = ("localhost", "127.", "::1", "0.0.0.0")


@frozen
class Start:
    """The process that wrote a session, its parent and its machine; ``start`` in the metadata.

    Process numbers are reused, so a process is named by its number and its start time: ``4711@1234567``,
    the time in clock ticks since the machine booted. Without ``/proc`` it is the number alone.
    """

    #: An id that all ranks of one engine start share and no other start has, if the engine knows one.
    id: str | None = None
    #: The boot id of the kernel and the PID namespace: process names are comparable only if it is equal.
    machine: str = ""
    #: The process that wrote the session, and its parent, which is the launcher or the engine, with the
    #: number of the process group unless the process leads it: ``4700@1234000/4690``.
    process: str = ""
    parent: str = ""
    #: When the process was started, ns since 1970 by its host's clock.
    spawned_unix_ns: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Any) -> Start:
        """Raises FormatError."""
        if not isinstance(fields, dict):
            raise FormatError("its session metadata has no mapping under 'start'")
        known = {field.name for field in dataclasses.fields(cls)}
        start = cls(**{name: value for name, value in fields.items() if name in known})
        texts = [start.machine, start.process, start.parent, *([] if start.id is None else [start.id])]
        spawned = start.spawned_unix_ns
        if not all(isinstance(text, str) for text in texts) or type(spawned) is not int:
            raise FormatError("its session metadata has a damaged 'start'")
        if not 0 <= spawned <= MAX_NUMBER:
            raise FormatError(f"its session metadata says spawned_unix_ns = {spawned!r}")
        return start


@frozen
class StartIdentity:
    """All that identifies the start of a session; sessions with equal ones are of one start."""

    id: str | None
    #: The launcher's variables, as sorted items.
    launch: tuple[tuple[str, str], ...]
    machine: str
    parent: str

    @classmethod
    def of(cls, start: Start | None, launch: Mapping[str, str], host: str) -> StartIdentity:
        """``start`` is None in recordings of before; ``launch`` then names the parent as ``host:pid``."""
        variables = tuple(sorted((str(k), str(v)) for k, v in launch.items() if k != "parent"))
        if start is None:
            return cls(None, variables, host, str(launch.get("parent", "")))
        return cls(start.id, variables, start.machine or host, start.parent)

    def same_as(self, other: StartIdentity) -> bool | None:
        """Whether both are of one engine start; None: it cannot be known from this.

        Two starts of one launcher process, one after the other, are the same by this: only the times of
        their processes distinguish them.
        """
        if self.id is not None or other.id is not None:
            return None if self.id is None or other.id is None else self.id == other.id
        if self.launch != other.launch:
            return False
        if self._one_launch():
            return True
        if self.machine == other.machine:
            # One launcher or engine starts all ranks of a machine.
            return self.parent == other.parent if self.parent and other.parent else None
        return True if self._one_address() else None

    def _one_launch(self) -> bool:
        """Whether the launcher numbers its launches, so that ranks may have different parents (a shell)."""
        names = {name for name, _ in self.launch}
        return {"SLURM_JOB_ID", "SLURM_STEP_ID"} <= names or "PMIX_NAMESPACE" in names

    def _one_address(self) -> bool:
        """Whether the ranks of all machines meet at one address; starts that run at once cannot share it."""
        named = dict(self.launch)
        address = named.get("MASTER_ADDR", "")
        return bool(address and named.get("MASTER_PORT")) and not address.startswith(_LOOPBACK)
