"""What several test files share: small writers, truths to compare with, plain readers, the real program.

The readers here use pyarrow and :class:`JournalSegment` only, never ``eplb_analyze``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from clocks import steady_clock

from eplb_dump import ExpertLoadWriter, WriterStats
from eplb_dump.format import frames
from eplb_dump.format.journal import JournalSegment
from eplb_dump.format.schema import MANIFEST_FILE, SCHEMAS, STATUS_LABELS, Scope
from eplb_dump.format.session import SessionInfo

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
Array = npt.NDArray[np.int64]
LAYERS, SLOTS, LOGICAL, EP_SIZE = 3, 8, 6, 2


def load_of(step: int, rank: int = 0, layers: int = LAYERS, slots: int = SLOTS) -> Array:
    """A load that names its step and rank: no two are alike within some hundred steps."""
    cells = np.arange(layers * slots, dtype=np.int64).reshape(layers, slots)
    return (cells * 31 + step * 17 + rank * 5) % 1009


def map_of(generation: int = 0, layers: int = LAYERS, slots: int = SLOTS) -> Array:
    """A placement in which every layer differs from that of another generation (modulo LOGICAL)."""
    return (np.arange(slots, dtype=np.int64) + np.arange(layers)[:, None] + generation) % LOGICAL


def open_writer(root: Path | str, **options: Any) -> ExpertLoadWriter:
    defaults: dict[str, Any] = {
        "model": "m",
        "num_logical_experts": LOGICAL,
        "ep_size": EP_SIZE,
        "run_id": "r",
    }
    return ExpertLoadWriter(root, **{**defaults, **options})


def open_vllm_writer(
    root: Path, num_logical_experts: int, ep_size: int, engine_config: dict[str, Any]
) -> ExpertLoadWriter:
    """A writer of a vLLM engine that states this configuration; one rank records for all."""
    return open_writer(
        root,
        num_logical_experts=num_logical_experts,
        ep_size=ep_size,
        scope="global",
        engine="vllm",
        engine_config=engine_config,
    )


def session_info(**values: Any) -> SessionInfo:
    defaults: dict[str, Any] = {
        "run_id": "r",
        "model": "m",
        "session_id": "s",
        "ep_rank": 0,
        "scope": Scope.LOCAL,
        "num_logical_experts": LOGICAL,
        "ep_size": EP_SIZE,
        "created_unix_ns": 1,
        "created_monotonic_ns": 2,
        "host": "h",
        "pid": 3,
    }
    return SessionInfo(**{**defaults, **values})


def assert_accounted(stats: WriterStats) -> None:
    parts = (stats.recorded, stats.dummy, stats.not_sampled, stats.dropped, stats.rejected)
    assert min(parts) >= 0, stats
    assert sum(parts) == stats.seen, stats
    assert sum(stats.drop_reasons.values()) == stats.dropped
    assert sum(stats.reject_reasons.values()) == stats.rejected


def write(root: Path, *, ranks: int = 2, steps: int = 40, step_ms: int | None = None, **options: Any) -> None:
    """A conserving dump of scope local: 2 layers, 4 experts + 2 redundant on two ranks.

    Args:
        step_ms: what each step takes by a planted clock; None: by the clock of this machine.
    """
    rng = np.random.default_rng(7)
    placements = [np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]), np.array([[0, 1, 2, 3, 2, 1]] * 2)]
    defaults: dict[str, Any] = {"model": "org/moe", "num_logical_experts": 4, "ep_size": 2, "run_id": "r"}
    for rank in range(ranks):
        with (
            contextlib.nullcontext() if step_ms is None else steady_clock(step_ms),
            ExpertLoadWriter(root, ep_rank=rank, segment_steps=16, **{**defaults, **options}) as writer,
        ):
            for step in range(steps):
                load = rng.multinomial(600, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], size=2)
                writer.record(step, load, placements[step >= 20], num_tokens=600, phase="decode")
                # A long run on a busy machine must not fill the queue.
                assert step % 200 < 199 or writer.flush(60)


# ---- reading


def arrays(path: Path) -> dict[str, Any]:
    """All arrays of an .npz file, by name; the file is closed.

    One that np.load leaves open warns when it happens to be collected, in whichever test then runs.
    """
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def read_table(folder: Path, table: str) -> pa.Table:
    """All sealed segments of a session, in order, with page checksums verified."""
    files = sorted(folder.glob(f"{table}-*.parquet"))
    parts = [pq.ParquetFile(f, page_checksum_verification=True).read() for f in files]
    return pa.concat_tables(parts) if parts else SCHEMAS[table].empty_table()


def loads_of_rows(rows: list[dict[str, Any]]) -> dict[int, Array]:
    """step -> load ``[layers, slots]`` of rows of the ``loads`` table."""
    layers: dict[int, dict[int, list[int]]] = {}
    for row in rows:
        assert layers.setdefault(row["step"], {}).setdefault(row["layer"], row["load"]) is row["load"]
    return {step: np.array([by[n] for n in sorted(by)]) for step, by in layers.items()}


def sealed_loads(folder: Path) -> dict[int, Array]:
    return loads_of_rows(read_table(folder, "loads").to_pylist())


def journal_loads(journal: JournalSegment) -> dict[int, Array]:
    if journal.shape is None:
        return {}
    load = journal.read_layers(0, journal.shape.num_moe_layers)
    return {int(step): load[:, i].astype(np.int64) for i, step in enumerate(journal.load_steps)}


def is_unborn(path: Path) -> bool:
    """Whether the writer was killed before the first frame of this journal was whole."""
    with path.open("rb") as file:
        first = next(frames.scan(file, path.stat().st_size))
    return isinstance(first, frames.Tail) and first.fault != "damaged"


def open_journals(folder: Path) -> Iterator[JournalSegment]:
    """Those that are there; one that vanishes meanwhile is sealed, and its files are there then."""
    for path in sorted(folder.glob("journal-*.frames")):
        with contextlib.suppress(FileNotFoundError):
            if is_unborn(path):
                continue
            with JournalSegment(path) as journal:
                assert journal.tail.fault != "damaged"
                yield journal


def _sealed_files(folder: Path, table: str, open_seqs: set[int]) -> list[dict[str, Any]]:
    """Rows of the sealed segments that have no journal any more."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f"{table}-*.parquet")):
        if int(path.stem.split("-")[1]) not in open_seqs:
            columns = [name for name in SCHEMAS[table].names if name != "time"]
            rows += pq.ParquetFile(path, page_checksum_verification=True).read(columns).to_pylist()
    return rows


def survived_loads(folder: Path) -> dict[int, Array]:
    """step -> load of everything readable: where a journal exists, it is the truth for its segment."""
    found: dict[int, Array] = {}
    open_seqs = set()
    for journal in open_journals(folder):
        open_seqs.add(journal.seq)
        found |= journal_loads(journal)
    found |= loads_of_rows(_sealed_files(folder, "loads", open_seqs))
    return dict(sorted(found.items()))


def step_status(folder: Path) -> list[tuple[int, str]]:
    """(step, status) of all readable rows: sealed ones first, then those of open journals."""
    rows: list[tuple[int, str]] = []
    open_seqs = set()
    for journal in open_journals(folder):
        open_seqs.add(journal.seq)
        steps, codes = journal.steps.step.tolist(), journal.steps.status.tolist()
        rows += [(step, STATUS_LABELS[code]) for step, code in zip(steps, codes, strict=True)]
    return [(row["step"], row["status"]) for row in _sealed_files(folder, "steps", open_seqs)] + rows


def placement_rows(folder: Path) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """(step, layer, ep_size, slots) of the sealed ``placements`` rows."""
    rows = read_table(folder, "placements").to_pylist()
    return [(r["step"], r["layer"], r["ep_size"], tuple(r["physical_to_logical"])) for r in rows]


def manifest(folder: Path) -> list[frames.Frame]:
    """The frames of a session's manifest, which must be whole."""
    path = folder / MANIFEST_FILE
    with path.open("rb") as file:
        *whole, tail = frames.scan(file, path.stat().st_size)
    assert isinstance(tail, frames.Tail)
    assert tail.fault is None
    return [frame for frame in whole if isinstance(frame, frames.Frame)]


def assert_equal_loads(found: dict[int, Array], truth: dict[int, Array]) -> None:
    assert list(found) == list(truth)
    for step, load in truth.items():
        assert np.array_equal(found[step], load), f"step {step}"


def assert_rows_agree(folder: Path, stats: WriterStats) -> None:
    """The rows of ``steps`` are the writer's accounting, less what it says is unlisted."""
    rows = Counter(status for _, status in step_status(folder))
    assert rows["recorded"] == stats.recorded
    assert rows["dummy"] == stats.dummy
    assert rows["not_sampled"] == stats.not_sampled
    assert rows["dropped"] + rows["rejected"] == stats.dropped + stats.rejected - stats.unlisted


# ---- the command line


def cli(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, as in a pipe of 80 columns; see :func:`cli_process`.

    Starting a process takes longer than most commands. What needs one is a test of ``tests/process``.
    """
    import pytest

    from eplb_analyze import __main__

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    sigpipe = signal.getsignal(signal.SIGPIPE)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("EXPERT_LOAD_DUMP_DIR", "COLUMNS"):
            patch.delenv(name, raising=False)
        for name, value in {"OPENBLAS_NUM_THREADS": "1", **(env or {})}.items():
            patch.setenv(name, value)
        patch.setattr(__main__, "allow_forks", lambda: None)  # this process is pytest's, too
        patch.setattr(sys, "argv", ["eplb-analyze", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO())
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code: Any = 0
        try:
            __main__.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        finally:
            signal.signal(signal.SIGPIPE, sigpipe)  # which the program sets for itself
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(list(arguments), code, *texts)


def cli_process(
    *arguments: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the installed program in a pipe of 80 columns; warnings of Python are errors."""
    program = Path(sys.executable).with_name("eplb-analyze")
    variables = {k: v for k, v in os.environ.items() if k not in ("EXPERT_LOAD_DUMP_DIR", "COLUMNS")}
    return subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**variables, "PYTHONWARNINGS": "error", **(env or {})},
    )


def one_error(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """It ended with ``code``, and said one error, with these words in it, and no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("eplb-analyze: error:")]
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def assert_golden(name: str, output: str, *, tolerance: float = 0.0) -> None:
    """``output`` is what is kept in a file. To renew: run with EPLB_GOLDEN=1 and read the diff.

    What is recorded for it has planted times (:mod:`clocks`). Twelve digits of a figure count, as the order
    in which floats are added is no promise. Figures of a matrix product differ more between processors: with
    a ``tolerance``, a JSON document is compared number by number.
    """
    path = ROOT / "tests/golden/output" / name
    if os.environ.get("EPLB_GOLDEN"):
        path.write_text(output)
    if tolerance:
        assert_close(json.loads(output), json.loads(path.read_text()), tolerance)
    else:
        assert _rounded(output) == _rounded(path.read_text())
    if name.endswith(".json"):
        json.loads(output)
    else:
        assert max(map(len, output.splitlines())) <= 80


def assert_close(found: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """Two JSON documents have the same keys in the same order, and floats closer than ``tolerance``."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_close(found[key], value, tolerance, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_close(found[number], value, tolerance, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert abs(found - expected) <= tolerance, where
    else:
        assert found == expected, where


def _rounded(text: str) -> str:
    return re.sub(r"\d+\.\d{9,}(e-?\d+)?", lambda match: f"{float(match[0]):.12g}", text)


def without_times(document: Any) -> Any:
    """A JSON document without the clock times beside steps."""
    if isinstance(document, list):
        return [without_times(item) for item in document]
    if not isinstance(document, dict):
        return document
    return {key: without_times(item) for key, item in document.items() if not re.search(r"(^|_)time$", key)}


# ---- child processes


def start_child(script: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Run a script in a fresh interpreter that can import this module; its output is piped."""
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run_child(script: str, *arguments: object, code: int = 0, timeout: float = 60) -> str:
    """The output of a child that must end with exit status ``code``, nothing on its stderr."""
    with start_child(script, *arguments) as child:
        out, err = child.communicate(timeout=timeout)
    assert (child.returncode, err) == (code, "")
    return out


def folder_with_pandas(root: Path) -> Path:
    """A folder whose ``pandas`` Arrow takes for the real one as far as the import goes."""
    folder = root / "site"
    folder.mkdir()
    (folder / "pandas.py").write_text("__version__ = '2.2.3'\n")
    return folder


def engines_python() -> str:
    """The interpreter of the environment that holds vLLM and SGLang."""
    chosen = os.environ.get("EPLB_DUMP_ENGINES_PYTHON")
    path = Path(chosen) if chosen else ROOT / ".venv-engines/bin/python"
    assert path.exists(), f"{path} does not exist: `sh scripts/test.sh` makes it"
    return str(path)
