"""Retention: sealed segments of a session are thinned, tier by tier, until they fit into a budget.

:func:`next_thinning` decides, and :func:`thin` does it, for the writer's own session. ``eplb-analyze prune``
decides for many runs, and uses :func:`thin_together`. A kill or a power cut at any moment leaves a readable
session: what is kept is written and named first, then the manifest lists it, and what it replaces is removed
last. Files that the manifest does not list, of segments that it does list, are leftovers of that;
:func:`remove_leftovers` removes them.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute  # Table.take imports it when it first needs it; a fork must not meet an import
import pyarrow.parquet as pq

from eplb_dump.format.columns import number_column, values_of
from eplb_dump.format.files import discard, publish, remove, temporary
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64
from eplb_dump.format.manifest import Manifest, ManifestFile, SealedSegment, Thinned, rewrite_manifest
from eplb_dump.format.minutes import NO_CUTS, Minutes
from eplb_dump.format.schema import (
    MANIFEST_FILE,
    SCHEMAS,
    SEGMENT_PATTERN,
    FormatError,
    Tier,
    segment_name,
)
from eplb_dump.format.segment import SegmentFiles, footer
from eplb_dump.format.session import SessionInfo

Reason = Literal["budget", "age", "space", "prune"]
TIERS = Tier.FULL, Tier.RANKS, Tier.MINUTES, Tier.GONE
#: The tables of each tier.
TABLES = {
    Tier.FULL: ("steps", "loads", "placements", "minutes"),
    Tier.RANKS: ("steps", "ranks", "placements", "minutes"),
    Tier.MINUTES: ("minutes", "placements"),
    Tier.GONE: ("placements",),
}
#: The share of a budget that each tier may take; a tier above its share gives its oldest to the next one.
SHARES = {Tier.FULL: 0.60, Tier.RANKS: 0.25, Tier.MINUTES: 0.15}
#: Notable segments and their neighbors are kept in full while they take no more than this share.
NOTABLE_SHARE = 0.20
#: So many neighboring roll-ups of one size become one, so that a long run has few files.
MERGED_AT_ONCE = 16
#: Roll-ups are not merged if they would take more than this share of their tier's: they are dropped as one.
_MERGED_SHARE = 0.10
#: The manifest is rewritten when less than half of it, and this many bytes, are of entries that count.
_WORTH_REWRITING = 256 << 10


@frozen
class Thinning:
    """What to do next: bring the segments of these entries, by their ``seq``, to a tier.

    Several entries, which follow each other, get one; ``reason`` is the newest one's then.
    """

    seqs: tuple[int, ...]
    tier: Tier
    reason: str


def next_thinning(
    entries: Iterable[SealedSegment],
    *,
    budget: int | None = None,
    before_ns: int | None = None,
    reason: Reason = "budget",
) -> Thinning | None:
    """The next thinning that brings a session's segments within limits; None if they are.

    Args:
        entries: those of the manifest. The newest one in full is never thinned for the budget.
        budget: the most bytes that files of segments may take.
        before_ns: what ended before this time, ns since 1970, is to be gone, if the end is known.
        reason: why, if it is for the budget.
    """
    ordered = sorted(entries, key=lambda entry: entry.seq)
    if before_ns is not None:
        for entry in ordered:
            if entry.tier is not Tier.GONE and entry.times is not None and entry.times[1] < before_ns:
                return Thinning((entry.seq,), Tier.GONE, "age")
    merge = _merge(ordered, budget)
    if merge is not None:
        return merge
    if budget is None or sum(entry.size for entry in ordered) <= budget:
        return None
    by_tier = {tier: [entry for entry in ordered if entry.tier is tier] for tier in TIERS}
    by_tier[Tier.FULL] = _spared(ordered, by_tier[Tier.FULL], budget)
    above = [
        tier
        for tier, share in SHARES.items()
        if by_tier[tier] and sum(e.size for e in ordered if e.tier is tier) > share * budget
    ]
    tier = next(iter(above or [tier for tier in SHARES if by_tier[tier]]), None)
    if tier is None:
        return None
    return Thinning((by_tier[tier][0].seq,), TIERS[TIERS.index(tier) + 1], reason)


def _spared(
    ordered: Sequence[SealedSegment], full: Sequence[SealedSegment], budget: int
) -> list[SealedSegment]:
    """The segments in full that may be thinned, in this order; the newest of them may not."""
    noted = {entry.seq for entry in ordered if entry.notable}
    kept: list[SealedSegment] = []
    other: list[SealedSegment] = []
    for entry in full[:-1]:
        around = {entry.seq - 1, *range(entry.seq, entry.last_seq + 2)}
        (kept if around & noted else other).append(entry)
    if sum(entry.size for entry in kept) > NOTABLE_SHARE * budget:
        return kept  # too much is notable: its oldest go first
    return other + kept


def _merge(ordered: Sequence[SealedSegment], budget: int | None) -> Thinning | None:
    """Neighboring roll-ups of one size that become one; likewise what is gone."""
    most = np.inf if budget is None else _MERGED_SHARE * SHARES[Tier.MINUTES] * budget
    run: list[SealedSegment] = []
    for entry in ordered:
        if run and not (_follow(run[-1], entry) and _size_class(run[-1]) == _size_class(entry)):
            run = []
        if entry.tier in (Tier.MINUTES, Tier.GONE):
            run.append(entry)
        enough = MERGED_AT_ONCE if entry.tier is Tier.MINUTES else 2
        if len(run) >= enough and (entry.tier is Tier.GONE or sum(e.size for e in run) <= most):
            reason = "budget" if entry.thinned is None else entry.thinned.reason
            return Thinning(tuple(e.seq for e in run), entry.tier, reason)
    return None


def _follow(one: SealedSegment, next_one: SealedSegment) -> bool:
    """Whether two entries can become one."""
    return (
        one.tier is next_one.tier
        and one.last_seq + 1 == next_one.seq
        and (one.shape == next_one.shape or one.tier is Tier.GONE)
    )


def _size_class(entry: SealedSegment) -> int:
    """How often so many segments were merged into one."""
    if entry.tier is Tier.GONE:
        return 0
    count, size = entry.last_seq - entry.seq + 1, 0
    while count >= MERGED_AT_ONCE:
        count, size = count // MERGED_AT_ONCE, size + 1
    return size


# ---- doing it


def thin(
    folder: Path,
    info: SessionInfo,
    thinning: Thinning,
    rolled_up: Minutes | None = None,
    file: ManifestFile | None = None,
) -> SealedSegment:
    """Thin segments of a session, of which no other process writes files. Returns their new entry.

    Args:
        file: the session's manifest, if this process appends to it more than once.
        rolled_up: the rows of ``minutes`` of the segment, if it has none, as one from before version 1.2.

    Raises OSError, and FormatError if the manifest or a file is damaged; nothing is changed then, or the
    manifest lists what is kept and some removed files remain.
    """
    file = file or ManifestFile(folder)
    manifest = file.read(info.session_id)
    entries = [manifest.entries[seq] for seq in thinning.seqs]
    entry = _keep(folder, info, entries, thinning, rolled_up)
    file.append(info, entry)
    superseded = _superseded(entries, entry)
    if superseded:
        remove(*(folder / name for name in superseded))
    _rewrite_if_worth_it(folder, info, file.read(info.session_id))
    return entry


def thin_together(
    folder: Path,
    info: SessionInfo,
    manifest: Manifest,
    thinnings: Iterable[Thinning],
    rolled_up: Callable[[SealedSegment], Minutes] | None = None,
    size: int | None = None,
    cuts: Int64 = NO_CUTS,
) -> list[str]:
    """Thin segments of a session, of which no other process writes files, with one new manifest.

    For a session of many segments this is quicker than :func:`thin`, one by one. The files that are kept are
    there when it returns, and the manifest lists them; the caller removes the others.

    Args:
        manifest: as :func:`read_manifest` returns it; changed to the new one.
        rolled_up: makes the rows of ``minutes`` of a segment that has none.
        size: the bytes that the manifest's file must still have, or the session is in use.
        cuts: steps across which no row of merged ``minutes`` reaches.

    Returns:
        The names of the files that are superseded.

    Raises as :func:`thin`; the manifest in the folder is unchanged then.
    """
    superseded: list[str] = []
    now = dict(manifest.entries)
    for thinning in thinnings:
        entries = [now.pop(seq) for seq in thinning.seqs]
        makes = rolled_up is not None and len(entries) == 1 and thinning.tier is not Tier.GONE
        minutes = None
        if makes and rolled_up is not None and "minutes" not in entries[0].files:
            minutes = rolled_up(entries[0])
        entry = _keep(folder, info, entries, thinning, minutes, cuts)
        now[entry.seq] = entry
        superseded += _superseded(entries, entry)
    _replace_entries(folder, info, manifest, now, size)
    return superseded


def forget_minutes(
    folder: Path, info: SessionInfo, manifest: Manifest, seqs: Iterable[int], size: int | None = None
) -> list[str]:
    """List segments that have their loads without ``minutes``, as if from before version 1.2.

    Then other rows can take the place of theirs, because files of listed names never change. Arguments,
    result and errors are those of :func:`thin_together`.
    """
    now, superseded = dict(manifest.entries), []
    for seq in seqs:
        files = dict(now[seq].files)
        superseded.append(files.pop("minutes").name)
        now[seq] = replace(now[seq], files=files)
    _replace_entries(folder, info, manifest, now, size)
    return superseded


def _replace_entries(
    folder: Path, info: SessionInfo, manifest: Manifest, entries: dict[int, SealedSegment], size: int | None
) -> None:
    path = folder / MANIFEST_FILE
    if size is not None and path.stat().st_size != size:
        raise OSError(errno.EBUSY, "another process writes into this session", str(path))
    rewrite_manifest(folder, info, replace(manifest, entries=entries))
    manifest.entries = read_manifest(folder, info).entries  # where their sums are now


def _superseded(entries: Iterable[SealedSegment], new: SealedSegment) -> list[str]:
    """The names of the files of some entries that the new one does not keep."""
    kept = {file.name for file in new.files.values()}
    return [file.name for old in entries for file in old.files.values() if file.name not in kept]


def read_manifest(folder: Path, info: SessionInfo) -> Manifest:
    """The manifest of a session. Raises OSError, and FormatError if it is damaged."""
    return ManifestFile(folder).read(info.session_id)


def remove_leftovers(folder: Path, info: SessionInfo) -> int:
    """Remove files of thinned segments that the manifest does not list. Returns their bytes.

    Only what a thinning left: not the files of segments that are not listed, nor journals.
    Raises OSError, FormatError.
    """
    names = [path.name for path in folder.iterdir() if not path.is_symlink()]
    found = [folder / name for name in leftovers(read_manifest(folder, info), names)]
    size = sum(path.stat().st_size for path in found)
    if found:
        remove(*found)
    return size


def leftovers(manifest: Manifest, names: Iterable[str], journals: Iterable[int] = ()) -> list[str]:
    """The names of files, of segments that a manifest lists, that it does not list.

    ``journals``: the numbers of segments that have one; it may be needed, so their files stay.
    """
    listed = {file.name for entry in manifest.entries.values() for file in entry.files.values()}
    found = []
    for name in names:
        match = SEGMENT_PATTERN.fullmatch(name.removesuffix(".tmp"))
        if match is None or match[0] in listed:
            continue
        entry = manifest.entry_of(int(match[2]))
        if entry is not None and not any(entry.seq <= seq <= entry.last_seq for seq in journals):
            found.append(name)
    return found


def _rewrite_if_worth_it(folder: Path, info: SessionInfo, manifest: Manifest) -> None:
    size = (folder / MANIFEST_FILE).stat().st_size
    live = sum(1024 + (0 if e.sums is None else e.sums.nbytes) for e in manifest.entries.values())
    if size - live > max(live, _WORTH_REWRITING):
        rewrite_manifest(folder, info, manifest)


def _keep(
    folder: Path,
    info: SessionInfo,
    entries: Sequence[SealedSegment],
    thinning: Thinning,
    rolled_up: Minutes | None,
    cuts: Int64 = NO_CUTS,
) -> SealedSegment:
    """Write what is kept of some segments under names that nothing has yet; the manifest's entry of it."""
    first, last = entries[0], entries[-1]
    tier = thinning.tier
    files = {table: file for entry in entries for table, file in entry.files.items()}
    tables = SegmentFiles(folder, info, first.shape, first.seq, last.last_seq)
    try:
        if tier is Tier.RANKS and "loads" in first.files:
            columns = SCHEMAS["ranks"].names
            rows = first.files["loads"].rows
            tables.write(
                "ranks", lambda metadata: _read_groups(folder, first, "loads", columns, metadata), rows
            )
        if rolled_up is not None and "minutes" not in first.files and tier is not Tier.GONE:
            tables.write("minutes", lambda metadata: [rolled_up.to_table(metadata)], len(rolled_up))
        if len(entries) > 1:
            _merge_tables(folder, entries, tables, tier, cuts)
    except Exception:  # free the space, as the disk may be full
        names = [segment_name(table, first.seq, last.last_seq) for table in SCHEMAS]
        discard(temporary(folder / name) for name in names)
        raise
    if tables.files:
        publish(*(folder / file.name for file in tables.files.values()))
    if len(entries) > 1:
        files = {}
    kept = {table: file for table, file in {**files, **tables.files}.items() if table in TABLES[tier]}
    times = [times_of(folder, entry) for entry in entries]
    return SealedSegment(
        first.seq,
        min(entry.first_step for entry in entries),
        max(entry.last_step for entry in entries),
        first.shape if tier is not Tier.GONE else last.shape,
        kept,
        times=(min(first for first, _ in times), max(last for _, last in times)),
        notable=tuple(dict.fromkeys(reason for entry in entries for reason in entry.notable)),
        thinned=Thinned(
            tier,
            last.last_seq,
            sum(e.step_rows if e.thinned is None else e.thinned.step_rows for e in entries),
            sum(e.recorded for e in entries),
            thinning.reason,
        ),
    )


def _merge_tables(
    folder: Path, entries: Sequence[SealedSegment], tables: SegmentFiles, tier: Tier, cuts: Int64
) -> None:
    """Write the placements of several segments as one file, and their roll-ups if they stay."""
    parts = [
        part
        for entry in entries
        if "placements" in entry.files
        for part in _read_groups(folder, entry, "placements", SCHEMAS["placements"].names)
    ]
    changes = np.empty(0, np.int64)
    if parts:
        placements = pa.concat_tables(parts).combine_chunks()
        changes = np.unique(_int64(placements, "step"))
        if tier is Tier.GONE:
            placements = placements.take(_last_of_each_layer(placements))
        tables.write(
            "placements", lambda metadata: [placements.replace_schema_metadata(metadata)], len(placements)
        )
    if tier is Tier.MINUTES:
        rolled = [
            Minutes.from_table(part, entry.shape)
            for entry in entries
            if "minutes" in entry.files
            for part in _read_groups(folder, entry, "minutes", SCHEMAS["minutes"].names)
        ]
        if rolled:
            minutes = Minutes.concat(rolled).merged(np.union1d(changes, cuts))
            tables.write("minutes", lambda metadata: [minutes.to_table(metadata)], len(minutes))


def _last_of_each_layer(placements: pa.Table) -> pa.Array:
    """The rows that are in force at the end."""
    step, layer = _int64(placements, "step"), _int64(placements, "layer")
    order = np.lexsort((step, layer))
    ends = np.flatnonzero(np.diff(layer[order], append=-1))
    return number_column(np.sort(order[ends]), pa.int64())


def _int64(table: pa.Table, name: str) -> Int64:
    return values_of(table.column(name).combine_chunks()).astype(np.int64, copy=False)


def _read_groups(
    folder: Path,
    entry: SealedSegment,
    table: str,
    columns: Sequence[str],
    metadata: dict[bytes, bytes] | None = None,
) -> Iterator[pa.Table]:
    """The row groups of a segment's table, verified. Raises OSError, FormatError."""
    listed = entry.files[table]
    path = folder / listed.name
    with path.open("rb") as source:

        def read_at(count: int, offset: int) -> bytes:
            source.seek(offset)
            return source.read(count)

        end = footer(path.stat().st_size, read_at)
        if zlib.crc32(end) != listed.footer_crc32:
            raise FormatError(f"{path}: its footer does not match the manifest's checksum")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.metadata.num_row_groups):
                part = file.read_row_group(group, columns=list(columns), use_threads=False)
                yield part.select(list(columns)).combine_chunks().replace_schema_metadata(metadata)
    except (pa.ArrowException, ValueError) as error:
        raise FormatError(f"{path}: {str(error).splitlines()[0]}") from None


def times_of(folder: Path, entry: SealedSegment) -> tuple[int, int]:
    """The least and the greatest time of a segment's steps, ns since 1970.

    Reads its steps if the manifest does not state it. Raises OSError, FormatError.
    """
    if entry.times is not None:
        return entry.times
    parts = _read_groups(folder, entry, "steps", ["time"])
    known = [np.asarray(part.column("time").combine_chunks().view(pa.int64())) for part in parts]
    times = np.concatenate(known)
    return int(times.min()), int(times.max())
