"""Copy, compact, import and export: killed, two at once, while the run is written, on a full disk."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli, one_error, run_child, start_child, write
from s3 import S3

from eplb_analyze import open_run
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.errors import DumpError
from eplb_analyze.storage.path import storage_path
from eplb_analyze.transfer.copy import copy_run
from eplb_analyze.transfer.importers.import_dump import Options, import_dump
from eplb_dump import ExpertLoadWriter
from eplb_dump.format.schema import SESSION_FILE

PROGRAM = "from eplb_analyze.cli.app import main; main()"
#: Writes 12 steps as one rank, in segments of 8, flushes them and kills itself.
KILLED_WRITER = """
    import os, signal, sys
    from helpers import load_of, map_of, open_writer
    rank = int(sys.argv[2])
    writer = open_writer(sys.argv[1], ep_rank=rank, segment_steps=8, scope=sys.argv[3])
    for step in range(12):
        writer.record(step, load_of(step, rank), map_of())
    assert writer.flush(10)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ranks, 40 steps in segments of 16."""
    root = tmp_path_factory.mktemp("dump")
    write(root, ranks=3, ep_size=3)
    return root


def content(root: Path) -> dict[str, bytes]:
    """All files, without temporary ones."""
    files = [f for f in root.rglob("*") if f.is_file() and f.suffix != ".tmp"]
    return {str(f.relative_to(root)): f.read_bytes() for f in files}


def session_of(root: Path, rank: int) -> Path:
    (folder,) = root.glob(f"run=*/model=*/rank={rank:05d}/session=*")
    return folder


def loads(where: Path) -> list[Any]:
    rows = open_run(where).loads().rows()
    assert rows
    return rows


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_writers(root: Path, ranks: int, scope: str) -> None:
    for rank in range(ranks):
        with start_child(KILLED_WRITER, root, rank, scope) as child:
            child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL
    assert [*root.rglob("journal-*")]


def with_file_limit(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the program with a limit on the size of a file: a write fails in the middle, as on a full disk."""
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {PROGRAM}"
    with start_child(script, *arguments) as child:
        out, err = child.communicate(timeout=60)
    return subprocess.CompletedProcess([], child.returncode, out, err)


# ---- copy


def test_journal_of_a_killed_writer_is_copied(tmp_path: Path) -> None:
    kill_writers(tmp_path / "dump", 1, "global")
    result = cli("copy", "--to", tmp_path / "copy", "-o", "json", tmp_path / "dump")
    assert result.returncode == 0
    assert any("not sealed" in note for note in json.loads(result.stdout)["notes"])
    assert content(tmp_path / "copy") == content(tmp_path / "dump")
    assert loads(tmp_path / "copy") == loads(tmp_path / "dump")


def test_killed_copy_is_incomplete_and_continues(dump: Path, s3: S3, tmp_path: Path) -> None:
    source = s3.address(s3.put(dump))
    with (
        s3.failing(key=f"{session_of(dump, 1).name}/loads", delay=30),
        start_child(PROGRAM, "copy", "--to", tmp_path, source) as program,
    ):
        complete = [session_of(dump, rank).relative_to(dump) / SESSION_FILE for rank in (0, 2)]
        wait_until(lambda: all((tmp_path / name).exists() for name in complete))
        program.send_signal(signal.SIGKILL)
        program.communicate()
    assert not (session_of(tmp_path, 1) / SESSION_FILE).exists()
    result = cli("summary", tmp_path)
    assert result.returncode == 3
    assert SESSION_FILE in result.stderr
    assert cli("check", tmp_path).returncode == 1
    again = json.loads(cli("copy", "--to", tmp_path, "-o", "json", source).stdout)
    assert 0 < again["files_there"] < again["files"]
    assert content(tmp_path) == content(dump)
    assert not [*tmp_path.rglob("*.tmp")]


def test_copies_of_a_run_being_written_have_its_first_steps(tmp_path: Path) -> None:
    script = """
        import os, sys, time
        from helpers import load_of, map_of, open_writer
        with open_writer(sys.argv[1], scope="global", segment_steps=16, flush_interval=0.01) as writer:
            print("ready", flush=True)
            step = 0
            while step < 100000 and not os.path.exists(sys.argv[1] + "/stop"):
                writer.record(step, load_of(step), map_of(step // 64))
                step += 1
                time.sleep(0.002)
    """
    root = tmp_path / "dump"
    with start_child(script, root) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        wait_until(lambda: [*root.rglob("loads-*.parquet")])
        copies = [tmp_path / f"copy{i}" for i in range(4)]
        reports = [copy_run(storage_path(root), to) for to in copies]
        steps_seen = max(row[0] for row in loads(root))
        wait_until(lambda: max(row[0] for row in loads(root)) > steps_seen)
        (root / "stop").touch()
        child.communicate(timeout=60)
    assert child.returncode == 0
    truth = loads(root)
    for to, report in zip(copies, reports, strict=True):
        assert report.damaged == []
        found = loads(to)
        assert found == truth[: len(found)]
        checked = json.loads(cli("check", "-o", "json", to).stdout)
        # The loads of this test are not conserved.
        known = {"not_closed", "unsealed_journal", "torn_journal", "conservation"}
        assert {f["code"] for f in checked["findings"]} <= known
    assert len(loads(copies[0])) < len(truth)


def test_second_copy_into_a_session_is_refused(dump: Path, s3: S3, tmp_path: Path) -> None:
    source = s3.address(s3.put(dump))
    with (
        s3.failing(key="loads-000002", delay=1),
        start_child(PROGRAM, "copy", "--to", tmp_path, source) as first,
    ):
        wait_until(lambda: [*tmp_path.rglob("loads-000001.parquet")])
        first.send_signal(signal.SIGSTOP)  # however long the second one takes, the first is not done
        one_error(cli("copy", "--to", tmp_path, dump), 2, "another copy writes into it")
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=60)
        assert first.returncode == 0
    assert content(tmp_path) == content(dump)
    assert not [*tmp_path.rglob("*.tmp")]


def test_copy_to_a_full_disk_is_incomplete_and_continues(dump: Path, tmp_path: Path) -> None:
    one_error(with_file_limit(3000, "copy", "--to", tmp_path, dump), 3, "too large")
    assert cli("summary", tmp_path).returncode == 3
    assert cli("copy", "--to", tmp_path, dump).returncode == 0
    assert content(tmp_path) == content(dump)


# ---- compact


def test_compacted_run_of_killed_writers_states_its_open_end(tmp_path: Path) -> None:
    kill_writers(tmp_path / "dump", 2, "local")
    result = cli("compact", "--to", tmp_path / "new", "-o", "json", tmp_path / "dump")
    assert (result.returncode, result.stderr) == (0, "")
    assert "2 sessions of the source did not end in order" in json.loads(result.stdout)["unknown"]["end"]
    assert loads(tmp_path / "new") == loads(tmp_path / "dump")


@pytest.mark.parametrize("limit", [100, 1500])
def test_compact_to_a_full_disk_leaves_nothing(limit: int, dump: Path, tmp_path: Path) -> None:
    one_error(with_file_limit(limit, "compact", "--to", tmp_path, dump), 3, "too large")
    assert not [*tmp_path.iterdir()]


def test_killed_compact_leaves_no_run_and_its_remains_are_removed(tmp_path: Path) -> None:
    root, to = tmp_path / "dump", tmp_path / "new"
    with ExpertLoadWriter(
        root, model="m", num_logical_experts=256, ep_size=8, run_id="r", scope="global", segment_steps=128
    ) as writer:
        rng = np.random.default_rng(0)
        for step in range(1024):
            writer.record(step, rng.integers(0, 200, (32, 256)), np.arange(256) + np.zeros((32, 1), int))
            if step % 32 == 31:
                assert writer.flush(60)
    with start_child(PROGRAM, "compact", "--to", to, root) as child:
        wait_until(lambda: [*to.rglob("*.parquet*")])
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert not [*to.glob("run=*/model=*")]
    one_error(cli("summary", to), 3, "no run in it")
    assert [*to.glob("run=r-compact/new.tmp")]
    again = json.loads(cli("compact", "--to", to, "-o", "json", root).stdout)
    assert again["after"]["run_id"] == "r-compact"
    assert [p.name for p in to.iterdir()] == ["run=r-compact"]
    assert not [*to.rglob("*.tmp")]
    assert json.loads(cli("check", "-o", "json", to).stdout)["steps"]["recorded"] == 1024


def test_unfinished_runs_of_killed_processes_are_removed(dump: Path, tmp_path: Path) -> None:
    """Also under another name, and beside a model that was just completed."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from eplb_analyze.atomic import new_run
        with new_run(Path(sys.argv[1]), sys.argv[2], "", "m") as new:
            os.kill(os.getpid(), signal.SIGTERM)
    """
    for name in ("x", "y"):
        with start_child(script, tmp_path / name, name) as child:
            child.communicate(timeout=60)
        assert child.returncode == -signal.SIGTERM
        (tmp_path / name / f"run={name}").rename(tmp_path / f"run={name}")
        (tmp_path / name).rmdir()
    assert [p.name for p in (tmp_path / "run=x").iterdir()] == ["new.tmp"]
    (tmp_path / "run=y/model=m").mkdir()
    (tmp_path / "run=link").symlink_to(tmp_path / "run=y")
    assert cli("compact", "--to", tmp_path, dump).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run=link", "run=r-compact", "run=y"]
    assert [p.name for p in (tmp_path / "run=y").iterdir()] == ["model=m"]


# ---- import, export


def test_killed_import_leaves_no_run(tmp_path: Path) -> None:
    np.save(tmp_path / "load.npy", np.ones((20_000, 8, 64), np.int32))
    script = """
        import sys
        from pathlib import Path
        from eplb_analyze.transfer.importers.import_dump import Options, import_dump
        options = Options(ep_size=2, placement="linear")
        import_dump(Path(sys.argv[1]), Path(sys.argv[2]), "array", options, "r")
    """
    into = tmp_path / "imported"
    with start_child(script, tmp_path / "load.npy", into) as child:
        wait_until(lambda: child.poll() is not None or [*into.rglob("loads-*.parquet")])
        child.kill()
    assert child.returncode == -signal.SIGKILL, "it was done before it could be killed"
    assert [*into.rglob("*.frames")]
    with pytest.raises(DumpError, match="no run in it"):
        open_run(into)
    options = Options(ep_size=2, placement="linear")
    report = import_dump(tmp_path / "load.npy", into, "array", options)
    assert summarize(open_run(into, report.run_id)).steps.seen == 20_000


def test_export_to_a_full_disk_keeps_the_old_file(dump: Path, tmp_path: Path) -> None:
    file = tmp_path / "F"
    file.write_text("mine")
    script = """
        import resource, signal, sys
        from pathlib import Path
        from eplb_analyze import open_run
        from eplb_analyze.transfer.exporters.loads import export_loads
        from eplb_analyze.errors import UsageError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        for name in ("csv", "parquet"):
            try:
                export_loads(open_run(sys.argv[1]), name, Path(sys.argv[2]), force=True)
            except UsageError as error:
                print(error)
    """
    errors = run_child(script, dump, file).splitlines()
    assert len(errors) == 2
    assert all("cannot be written: File too large" in error for error in errors)
    assert file.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["F"]
