"""A run as it will be once its ranks are merged, for a dry run: what it will have, and what it will take.

Its segments, their steps and times are those that the merge makes. How many bytes they take depends on their
loads. So a few segments are merged in the system's temporary folder, and the sizes of the others follow from
theirs: in proportion to what their ranks take now, or to their rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eplb_analyze.atomic import scratch_folder
from eplb_analyze.errors import DumpError
from eplb_analyze.reader.run import open_run
from eplb_analyze.transfer.compact import Compaction, NewSegment, refusing_damage
from eplb_analyze.transfer.retention.merge import require_one_start
from eplb_analyze.transfer.retention.sizes import size_at
from eplb_analyze.transfer.retention.survey import (
    Piece,
    SurveyedRun,
    SurveyedSession,
    note,
    survey_run,
    times_of,
)
from eplb_dump.format.journal import Int64
from eplb_dump.format.manifest import Manifest, SealedFile, SealedSegment, close_manifest
from eplb_dump.format.minutes import keys_of
from eplb_dump.format.notable import reasons_of_placements
from eplb_dump.format.schema import MANIFEST_FILE, SESSION_FILE, Tier, segment_name
from eplb_dump.format.segment import write_segment
from eplb_dump.format.session import SessionInfo, session_path, write_session_file

#: So many segments of a run are merged, all over it.
SAMPLES = 3

Float64 = npt.NDArray[np.float64]


def foresee_merged(dump: Path, run: SurveyedRun) -> SurveyedRun:
    """The run as :func:`~eplb_analyze.transfer.retention.merge.merge_ranks` would leave it.

    Reads the rows of all steps, and the loads of a few segments; changes nothing.

    Raises ChangedError, and DumpError if `compact` would refuse the run, as far as that shows it, or if the
    temporary folder has no space for a few segments.
    """
    require_one_start(dump, run)
    compaction = Compaction(open_run(dump, run.run_id))
    info = compaction.info(run.run_id)
    with refusing_damage():
        foreseen = [_entry(content) for content in compaction.contents(info)]
    try:
        with scratch_folder() as scratch:
            folder = session_path(scratch, info)
            folder.mkdir(parents=True)
            with refusing_damage():
                for entry in _spread([entry for entry in foreseen if "loads" in entry.files]):
                    content = next(compaction.contents(info, (entry.first_step, entry.last_step + 1)))
                    content.seq = entry.seq
                    write_segment(folder, content)
            write_session_file(folder, info)
            close_manifest(folder, info, {})
            (sample,) = survey_run(scratch / run.folder.name).sessions
            return _merged(dump, run, info, foreseen, sample)
    except OSError as error:
        text = f"the dry run cannot merge some of it in {tempfile.gettempdir()}: {error.strerror or error}"
        raise DumpError(text) from None


def _entry(content: NewSegment) -> SealedSegment:
    """What the manifest will say of a segment, but the bytes of its files, and whether it lost balance."""
    steps, layers = content.steps, 0 if content.shape is None else content.shape.num_moe_layers
    rows = {
        "steps": len(steps.step),
        "loads": len(content.load_steps) * layers,
        "placements": len(content.placements.step),
        "minutes": np.unique(keys_of(steps, content.placements.step), axis=1).shape[1],
    }
    return SealedSegment(
        content.seq,
        int(steps.step.min()),
        int(steps.step.max()),
        content.shape,
        {t: SealedFile(segment_name(t, content.seq), 0, count, 0) for t, count in rows.items() if count},
        times=(int(steps.time_ns.min()), int(steps.time_ns.max())),
        notable=reasons_of_placements(content.seq, content.placements),
    )


def _spread(entries: list[SealedSegment]) -> list[SealedSegment]:
    """Some of them: from the middle of each of so many equal parts."""
    parts = min(SAMPLES, len(entries))
    return [entries[(2 * part + 1) * len(entries) // (2 * parts)] for part in range(parts)]


def _merged(
    dump: Path,
    run: SurveyedRun,
    info: SessionInfo,
    foreseen: list[SealedSegment],
    sample: SurveyedSession,
) -> SurveyedRun:
    """The run with these segments, of which the sample has some with their sizes."""
    now = _Now(run, foreseen)
    at = {entry.seq: index for index, entry in enumerate(foreseen)}
    known = {at[piece.entry.seq]: piece for piece in sample.pieces}
    rows = {
        t: np.array([e.files[t].rows if t in e.files else 0 for e in foreseen], np.float64) for t in _TABLES
    }
    sizes = {
        table: _estimate(
            now.load_bytes if table == "loads" else rows[table],
            {index: p.entry.files[table].bytes for index, p in known.items() if table in p.entry.files},
            now.placement_bytes,
        )
        for table in _TABLES
    }
    ranks = _estimate(rows["loads"], {index: size_at(p, Tier.RANKS) for index, p in known.items()})
    sums = _estimate(np.minimum(rows["loads"], 1), {index: p.sums_bytes for index, p in known.items()})
    merged = SurveyedSession(session_path(dump, info), info, {}, Manifest(closed={}))
    for index, entry in enumerate(foreseen):
        files = {t: replace(file, bytes=int(sizes[t][index])) for t, file in entry.files.items()}
        notable = entry.notable + (("imbalance",) if now.lost_balance[index] else ())
        first_ns, last_ns = times_of(info, entry)
        sized = replace(entry, files=files, notable=notable)
        piece = Piece(merged, sized, last_ns, first_ns, sums_bytes=int(sums[index]))
        if "loads" in files:
            piece.sizes[Tier.RANKS] = int(ranks[index])
        merged.pieces.append(piece)
    note(merged)
    sampled = sum(piece.sums_bytes for piece in sample.pieces)
    frames = (sample.files[MANIFEST_FILE].st_size - sampled) * len(foreseen) // len(known)
    merged.to_write = sample.files[SESSION_FILE].st_size + frames + sum(piece.size for piece in merged.pieces)
    return SurveyedRun(run.run_id, run.folder, [merged])


_TABLES = ("steps", "loads", "placements", "minutes")


def _estimate(weights: Float64, known: Mapping[int, int], per_weight: float = 0.0) -> Int64:
    """Bytes in proportion to weights; ``known``: those of some, by index.

    ``per_weight``: what one takes, if nothing is known of any.
    """
    total = sum(weights[index] for index in known)
    estimate = np.rint(weights * (sum(known.values()) / total if total else per_weight)).astype(np.int64)
    for index, bytes_ in known.items():
        estimate[index] = bytes_
    return estimate


class _Now:
    """What the ranks take now of the steps of segments to come."""

    def __init__(self, run: SurveyedRun, foreseen: list[SealedSegment]) -> None:
        self._entries = [piece.entry for session in run.sessions for piece in session.pieces]
        self._foreseen = foreseen
        recorded = self._of([float(entry.recorded) for entry in self._entries])
        load_bytes = self._of([float(_bytes(entry, "loads")) for entry in self._entries])
        in_all = sum(_bytes(entry, "loads") for entry in self._entries)
        mean = in_all / max(1, sum(entry.recorded for entry in self._entries))
        #: Of their ``loads``. Steps in journals count as the others do.
        self.load_bytes: Float64 = np.where(recorded > 0, load_bytes / np.maximum(recorded, 1), mean)
        self.load_bytes *= [entry.recorded for entry in foreseen]
        #: Of a row of ``placements``.
        rows = sum(e.files["placements"].rows for e in self._entries if "placements" in e.files)
        self.placement_bytes = sum(_bytes(entry, "placements") for entry in self._entries) / max(1, rows)
        #: Whether a writer saw a loss of balance in them.
        self.lost_balance = self._of([float("imbalance" in entry.notable) for entry in self._entries]) > 0

    def _of(self, values: list[float]) -> Float64:
        """The sum of a value over the segments that have steps of each segment to come."""

        def sums(steps: list[int]) -> tuple[Int64, Float64]:
            order = np.argsort(steps, kind="stable")
            return np.array(steps, np.int64)[order], np.cumsum([0.0, *np.array(values)[order]])

        first, begun = sums([entry.first_step for entry in self._entries])
        last, ended = sums([entry.last_step for entry in self._entries])
        begin = [entry.first_step for entry in self._foreseen]
        end = [entry.last_step for entry in self._foreseen]
        found: Float64 = begun[np.searchsorted(first, end, "right")] - ended[np.searchsorted(last, begin)]
        return found


def _bytes(entry: SealedSegment, table: str) -> int:
    return entry.files[table].bytes if table in entry.files else 0
