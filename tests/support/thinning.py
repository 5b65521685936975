"""Recordings of which not everything is kept any more."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from eplb_dump.format.manifest import SealedSegment
from eplb_dump.format.retention import Thinning, thin
from eplb_dump.format.schema import SESSION_FILE, Tier
from eplb_dump.format.session import SessionInfo, load_json


def info_of(folder: Path) -> SessionInfo:
    return SessionInfo.from_dict(load_json((folder / SESSION_FILE).read_bytes()))


def session_folders(root: Path) -> list[Path]:
    """The sessions of a dump, in order of ranks."""
    return sorted(path.parent for path in root.rglob(SESSION_FILE))


def thin_to(folder: Path, tiers: dict[Tier, Iterable[int]], *, merged: bool = False) -> list[SealedSegment]:
    """Thin segments of a session, by number, to tiers; ``merged``: those without steps become one entry."""
    info = info_of(folder)
    found = []
    for tier, seqs in tiers.items():
        own = [thin(folder, info, Thinning((seq,), tier, "budget")) for seq in seqs]
        if merged and len(own) > 1 and tier is not Tier.RANKS:
            own = [thin(folder, info, Thinning(tuple(entry.seq for entry in own), tier, "budget"))]
        found += own
    return found
