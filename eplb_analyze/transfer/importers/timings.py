"""Step times that another program measured: the formats that ``--timings`` takes.

| format | source |
| --- | --- |
| vLLM's iteration log | ``LoggingStatLogger._log_iteration_details`` in vllm/v1/metrics/loggers.py, 0.33.0 |
| forward pass metrics | ``ForwardPassMetrics`` in sglang/srt/observability/forward_pass_metrics.py, 0.5.23; a line of Dynamo's trace holds one, see ``dynamo.fpm.trace.v1`` in Dynamo's "Forward Pass Metrics Trace Reference" |
| iteration statistics | ``IterationStats`` in TensorRT-LLM's executor and what its PyTorch backend adds (``hostStepTimeMS``, ``gpuForwardTimeMS``, ``schedulerMode``), as ``/metrics`` returns them |
| a table | CSV or Parquet with ``step`` or ``time``, and ``ms`` |
"""  # noqa: E501

from __future__ import annotations

import contextlib
import gzip
import io
import math
import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eplb_analyze.errors import DumpError
from eplb_analyze.transfer.importers.files import MAX_RATIO, MAX_TEXT, parse_json, regular
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64

Float64 = npt.NDArray[np.float64]

#: The most entries of a file, and of series in it: one for each engine or rank, and each of its starts.
MAX_ENTRIES, MAX_SERIES = 1 << 24, 1024
#: The most bytes of a file when it is unpacked.
MAX_UNPACKED = 8 << 30
#: A table's first line is no longer.
MAX_HEADER = 1 << 16
#: The name of a table as a source.
TABLE = "the table"
#: The longest step, a day; and the largest number of anything, which a JSON number can exceed.
MAX_MS, MAX_NUMBER = 86_400_000.0, 1 << 62
ITERATION = re.compile(
    rb"Iteration\((\d{1,15})\): \d+ context requests, (\d{1,12}) context tokens, "
    rb"\d+ generation requests, (\d{1,12}) generation tokens, iteration elapsed time: (\d{1,9}\.?\d{0,9}) ms"
)
#: By preference: an iteration's time on the device, on the host, from its start to the use of its results.
TRTLLM_TIMES = ("gpuForwardTimeMS", "hostStepTimeMS", "iterLatencyMS")
#: Whose iteration a line is: in 0.27.1 and later the front end logs for all engines, earlier each for itself.
ENGINE = re.compile(rb"Engine (\d{1,6}): Iteration|EngineCore_DP(\d{1,6})\b")
TOO_MANY = (
    f"more than {MAX_ENTRIES:,} entries, or {MAX_SERIES:,} engines and starts; keep only the part of this run"
)
FORM = (
    "no step times; --timings takes vLLM's log with --enable-logging-iteration-details, forward pass metrics "
    "of SGLang or Dynamo, TensorRT-LLM's iteration statistics, or a table with step or time, and ms"
)


@frozen
class Series:
    """The times of one engine or rank, in the order of its steps.

    Attributes:
        source: what wrote them.
        step: int64 ``[n]``, ascending, by the source's own counter; None if it has none.
        time: float64 ``[n]``, ascending, seconds since 1970, when an entry was written; None if not known.
        ms: float64 ``[n]``, above 0.
        tokens: float64 ``[n]``, NaN if not known.
    """

    source: str
    step: Int64 | None
    time: Float64 | None
    ms: Float64
    tokens: Float64


@dataclass
class _Entries:
    step: array[int] = field(default_factory=lambda: array("q"))
    time: array[float] = field(default_factory=lambda: array("d"))
    ms: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[float] = field(default_factory=lambda: array("d"))


class _Collector:
    """Sorts entries by engine; where a counter goes back, the engine started again."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self._count_starts = 0
        #: By hash, since a name in an untrusted file can be long.
        self._starts: dict[int, list[_Entries]] = {}

    def add(
        self, where: str, key: Any, ms: Any, step: Any = -1, time: Any = math.nan, tokens: Any = math.nan
    ) -> None:
        """Add an entry; ``step`` −1 and ``time`` NaN if there is none. Raises DumpError."""
        ms, time, tokens = (
            _number(where, name, v) for name, v in (("time", ms), ("clock", time), ("tokens", tokens))
        )
        if type(step) is not int or not -1 <= step < 1 << 62:
            raise DumpError(f"{where}: {step!r} is not the number of a step"[:300])
        if not 0 <= ms <= MAX_MS:
            raise DumpError(f"{where}: a step of {ms:g} ms")
        starts = self._starts.setdefault(hash(key), [])
        if not starts or (step >= 0 and starts[-1].step and step <= starts[-1].step[-1]):
            starts.append(_Entries())
            self._count_starts += 1
        last = starts[-1]
        self.count += 1
        if self.count > MAX_ENTRIES or self._count_starts > MAX_SERIES:
            raise DumpError(f"{where}: {TOO_MANY}")
        # 0 ms: a rank that had nothing to do, or a heartbeat.
        if ms > 0:
            for values, value in ((last.step, step), (last.time, time), (last.ms, ms), (last.tokens, tokens)):
                values.append(value)

    def series(self) -> list[Series]:
        return [self._series(entries) for starts in self._starts.values() for entries in starts if entries.ms]

    def _series(self, entries: _Entries) -> Series:
        step, time = np.array(entries.step, np.int64), np.array(entries.time)
        ms, tokens = np.array(entries.ms), np.array(entries.tokens)
        timed = bool(np.isfinite(time).all())
        if timed:
            order = np.argsort(time, kind="stable")
            step, time, ms, tokens = step[order], time[order], ms[order], tokens[order]
        counted = bool((step >= 0).all() and (np.diff(step) > 0).all())
        return Series(self.source, step if counted else None, time if timed else None, ms, tokens)


def read_series(path: Path) -> list[Series]:
    """Read the step times in a file, one series for each engine or rank.

    Raises DumpError: the file cannot be read or has no step times.
    """
    regular(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        return _table(path, _read_parquet(path), "row", 1)
    try:
        with _open(path) as text:
            first = text.readline(MAX_HEADER)
    except (OSError, EOFError, zlib.error) as error:
        raise DumpError(f"{path}: {error}") from None
    if b"Iteration(" not in first and "ms" in _header(first):
        return _table(path, _read_csv(path), "line", 2)
    is_json = first.lstrip()[:1] in (b"{", b"[")
    # vLLM can log lines of JSON, too.
    found = (is_json and _json(path).series()) or _vllm(path).series()
    if not found:
        raise DumpError(f"{path}: {FORM}")
    return found


def _packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open(path: Path) -> BinaryIO:
    if not _packed(path):
        return path.open("rb")
    # Its own lines are read by Python code.
    return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(path), 1 << 18))


def _most_bytes(path: Path) -> int:
    """The most bytes of a text: a .gz file of some MB can stand for a GB of empty lines."""
    if not _packed(path):
        return MAX_UNPACKED
    return min(MAX_UNPACKED, max(MAX_TEXT, MAX_RATIO * path.stat().st_size))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and text of each line, also of a .gz file. Raises DumpError."""
    size = number = 0
    most = _most_bytes(path)
    with _open(path) as file:
        while True:
            try:
                line = file.readline(MAX_TEXT + 1)
            except (OSError, EOFError, zlib.error) as error:
                # A .jsonl.gz that its writer still has open has no end.
                if number and isinstance(error, EOFError):
                    return
                raise DumpError(f"{path}: line {number + 1}: {error}") from None
            if not line:
                return
            number, size = number + 1, size + len(line)
            if len(line) > MAX_TEXT or size > most:
                raise DumpError(
                    f"{path}: line {number}: it is longer than {MAX_TEXT >> 20} MiB, or the text so far is "
                    f"longer than {most >> 20:,} MiB"
                )
            yield number, line


def _vllm(path: Path) -> _Collector:
    collector = _Collector("vLLM's iteration log")
    for number, line in _lines(path):
        if b"Iteration(" not in line:
            continue
        match = ITERATION.search(line)
        if match is None:
            continue
        engine = ENGINE.search(line)
        key = next((name for name in engine.groups() if name), b"") if engine else b""
        step, context, generation = int(match[1]), int(match[2]), int(match[3])
        collector.add(f"{path}: line {number}", key, float(match[4]), step, tokens=context + generation)
    return collector


def _json(path: Path) -> _Collector:
    """One object a line, or lists of them, as from polling TensorRT-LLM's /metrics; or one document."""
    collector = _Collector("")
    for where, record in _records(path):
        if "iter" in record and (name := next((n for n in TRTLLM_TIMES if record.get(n) is not None), "")):
            source = "TensorRT-LLM's iteration statistics"
            if name == TRTLLM_TIMES[-1] and record.get("schedulerMode") == "overlap":
                raise DumpError(
                    f"{where}: {name} spans two iterations of an overlap scheduler, and the record has no "
                    f"other time"
                )
            tokens = _sum(_object(record, "inflightBatchingStats"), "numCtxTokens", "numGenRequests")
            rank = record.get("attentionDpRank"), record.get("rank")
            collector.add(where, str(rank), record[name], record["iter"], tokens=tokens)
        elif "wall_time" in (metrics := _object(_object(record, "event") or record, "fpm") or record):
            source = "forward pass metrics"
            event = _object(record, "event") or record
            seen = event.get("observed_at_unix_ms")
            time = math.nan if seen is None else _number(where, "observed_at_unix_ms", seen) / 1e3
            # The sequence number of the publisher, which counts heartbeats, too.
            tokens = _sum(_object(metrics, "scheduled_requests"), "sum_prefill_tokens", "num_decode_requests")
            wall = _number(where, "wall_time", metrics["wall_time"]) * 1e3
            key = (str(metrics.get("worker_id")), str(metrics.get("dp_rank")))
            collector.add(where, key, wall, metrics.get("counter_id", -1), time, tokens)
        else:
            continue
        if collector.source not in ("", source):
            raise DumpError(f"{where}: {source}, after {collector.source}")
        collector.source = source
    return collector


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        where = f"{path}: line {number}"
        if not line.strip():
            continue
        try:
            found = parse_json(line, where)
        except DumpError:
            if number == 1 and path.stat().st_size <= MAX_TEXT:
                with _open(path) as file:
                    whole = file.read(MAX_TEXT + 1)
                yield from _items(parse_json(whole, str(path)), str(path))
                return
            # The last line of a writer that was killed.
            if number > 1 and not line.endswith(b"\n"):
                return
            raise
        yield from _items(found, where)


def _items(found: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in found if isinstance(found, list) else [found]:
        if not isinstance(record, dict):
            raise DumpError(f"{where}: it is not a JSON object")
        yield where, record


def _object(record: dict[str, Any], name: str) -> dict[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _number(where: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > MAX_NUMBER:
        raise DumpError(f"{where}: {name}: {value!r} is not a number"[:300])
    return float(value)


def _sum(record: dict[str, Any], *names: str) -> float:
    values = [record.get(name) for name in names]
    known = [float(v) for v in values if type(v) is int and abs(v) <= MAX_NUMBER]
    return sum(known) if len(known) == len(names) else math.nan


# ---- tables


#: The columns of a table that are read.
COLUMNS = ("step", "time", "ms", "tokens")


def _header(line: bytes) -> list[str]:
    return [text.lower() for text in _cells(line.removeprefix(b"\xef\xbb\xbf"))]


def _cells(line: bytes) -> list[str]:
    return [text.strip().strip('"') for text in line.decode(errors="replace").split(",")]


def _read_csv(path: Path) -> dict[str, Float64]:
    columns: dict[str, array[float]] = {}
    names: list[str] = []
    for number, line in _lines(path):
        cells = _cells(line)
        if number == 1:
            names = _header(line)
            _require_once(path, names)
            columns = {name: array("d") for name in COLUMNS if name in names}
        elif cells != [""]:
            if len(cells) != len(names):
                raise DumpError(f"{path}: line {number}: {len(cells)} cells in {len(names)} columns")
            for name, text in zip(names, cells, strict=True):
                if name in columns:
                    columns[name].append(_cell(f"{path}: line {number}", name, text))
        if len(columns.get("ms", ())) > MAX_ENTRIES:
            raise DumpError(f"{path}: line {number}: {TOO_MANY}")
    return {name: np.array(values) for name, values in columns.items()}


def _require_once(path: Path, names: list[str]) -> None:
    """Raise DumpError if several columns have one name: which of them is meant, the file does not say."""
    for name in COLUMNS:
        if names.count(name) > 1:
            raise DumpError(f"{path}: {names.count(name)} columns have the name {name}")


def _cell(where: str, name: str, text: str) -> float:
    """A number, or a clock time as seconds since 1970; without a zone it is UTC."""
    with contextlib.suppress(ValueError):
        return float(text) if text or name != "tokens" else math.nan
    try:
        if name != "time":
            raise ValueError
        # Python before 3.11 does not read a Z.
        moment = datetime.fromisoformat(text.upper().replace("Z", "+00:00"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        raise DumpError(f"{where}: {name}: {text[:40]!r} is not a number"[:300]) from None


def _read_parquet(path: Path) -> dict[str, Float64]:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        if file.metadata.num_rows > MAX_ENTRIES:
            raise DumpError(f"{path}: {TOO_MANY}")
        fields = [field for field in file.schema_arrow if field.name.lower() in COLUMNS]
        _require_once(path, [field.name.lower() for field in fields])
        names = {field.name: field.type for field in fields}
        for name, kind in names.items():
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_timestamp(kind)):
                raise DumpError(f"{path}: column {name}: {kind}, not numbers")
        table = file.read(columns=list(names))
    except (pa.ArrowException, OSError, ValueError) as error:  # a name may be no UTF-8
        raise DumpError(f"{path}: {str(error).splitlines()[0]}") from None
    columns = {}
    for name, kind in names.items():
        values, scale = table.column(name), 1.0
        if pa.types.is_timestamp(kind):
            values, scale = pc.cast(pc.cast(values, pa.timestamp("us", kind.tz), safe=False), pa.int64()), 1e6
        columns[name.lower()] = values.to_numpy().astype(np.float64) / scale
    return columns


def _table(path: Path, columns: dict[str, Float64], unit: str, first: int) -> list[Series]:
    """``unit``, ``first``: how rows are called, and the number of the first."""
    if "ms" not in columns or not {"step", "time"} & columns.keys():
        raise DumpError(f"{path}: {FORM}")

    def reject(bad: npt.NDArray[np.bool_], fault: Callable[[int], str]) -> None:
        if bad.any():
            row = int(bad.argmax())
            raise DumpError(f"{path}: {unit} {row + first}: {fault(row)}")

    for name in columns.keys() - {"tokens"}:
        values = columns[name]
        reject(~np.isfinite(values), lambda row, name=name: f"{name} is missing")  # type: ignore[misc]
    ms, by = columns["ms"], columns["step" if "step" in columns else "time"]
    reject((ms < 0) | (ms > MAX_MS), lambda row: f"a step of {ms[row]:g} ms")
    order = np.argsort(by, kind="stable")
    if "step" in columns:
        reject((by < 0) | (by > 1 << 53) | (by % 1 != 0), lambda row: f"step {by[row]:g}")
        again = np.zeros(len(by), np.bool_)
        again[order[1:]] = np.diff(by[order]) == 0
        reject(again, lambda row: f"step {by[row]:.0f} occurs twice")
    order = order[ms[order] > 0]
    if not len(order):
        raise DumpError(f"{path}: {FORM}")
    tokens = columns.get("tokens", np.full(len(ms), np.nan))[order]
    if "step" in columns:
        return [Series(TABLE, by[order].astype(np.int64), None, ms[order], tokens)]
    return [Series(TABLE, None, by[order], ms[order], tokens)]
