"""The writer's text file for node_exporter has what `stats()` counts, and harms nothing."""

from __future__ import annotations

import dataclasses
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, load_of, map_of, open_writer, run_child, session_info
from prometheus_client.parser import text_string_to_metric_families

from eplb_dump import ExpertLoadWriter, WriterStats, metrics_file
from eplb_dump.format import session_writer
from eplb_dump.metrics_file import METRICS_FILE_VARIABLE, OUTCOMES, path_for, render

Values = dict[tuple[str, ...], float]


def parsed(text: str) -> Values:
    """Values by name and by those labels that are not of all metrics."""
    found: Values = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation.endswith(".")
        assert (family.type == "counter") == all(s.name.endswith("_total") for s in family.samples)
        for sample in family.samples:
            assert set(sample.labels) >= {"model", "rank", "run"}
            key = (
                sample.name,
                *(v for name, v in sample.labels.items() if name not in ("model", "rank", "run")),
            )
            assert key not in found
            found[key] = sample.value
    return found


def wait_until(holds: Callable[[], Any]) -> None:
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def record(writer: ExpertLoadWriter, first: int, end: int) -> None:
    for step in range(first, end):
        writer.record(step, load_of(step), map_of())


def assert_as_stats(found: Values, stats: WriterStats) -> None:
    assert {outcome: found[("eplb_writer_steps_total", outcome)] for outcome in OUTCOMES} == {
        outcome: getattr(stats, outcome) for outcome in OUTCOMES
    }
    assert found[("eplb_writer_journal_bytes_total",)] == stats.bytes_written
    assert found[("eplb_writer_sealed_segments_total",)] == stats.segments_sealed
    assert found[("eplb_writer_unsealed_segments_total",)] == stats.segments_left_open
    assert found[("eplb_writer_off",)] == (stats.off is not None)


def test_file_has_the_final_counts(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "dump", segment_steps=8, ep_rank=1, metrics_file=tmp_path / "eplb.prom")
    record(writer, 0, 20)
    writer.skip("dummy")
    writer.record(21, -load_of(21), None)
    began = time.time()
    assert writer.close()
    text = (tmp_path / "eplb-m-rank00001.prom").read_text()
    assert text.count('{model="m",rank="1",run="r"') == len(re.findall("^eplb_", text, re.MULTILINE))
    found = parsed(text)
    assert_as_stats(found, writer.stats())
    assert found[("eplb_writer_steps_total", "rejected")] == 1
    assert found[("eplb_writer_sealed_segments_total",)] == 3
    assert found[("eplb_writer_closed",)] == 1
    assert began <= found[("eplb_writer_last_write_timestamp_seconds",)] <= time.time()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_file_is_refreshed_by_the_sealing_thread_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_file, "REFRESH_SECONDS", 0.02)
    threads, replace = set(), metrics_file.replace_file

    def spied(path: Path, data: bytes, *, durable: bool) -> None:
        threads.add(threading.current_thread().name)
        replace(path, data, durable=durable)

    monkeypatch.setattr(metrics_file, "replace_file", spied)
    path = tmp_path / "eplb-m-rank00000.prom"
    with open_writer(tmp_path / "dump", metrics_file=tmp_path / "eplb") as writer:
        wait_until(path.exists)
        for end in (10, 30):
            record(writer, end - 10, end)
            recorded = writer.stats().recorded
            wait_until(
                lambda wanted=recorded: (
                    parsed(path.read_text())[("eplb_writer_steps_total", "recorded")] == wanted
                )
            )
            assert parsed(path.read_text())[("eplb_writer_closed",)] == 0
    assert threads == {"eplb-dump-rank0-seal"}


def test_engine_that_stays_idle_has_a_file(tmp_path: Path) -> None:
    with open_writer(tmp_path / "dump", metrics_file=tmp_path / "eplb"):
        wait_until((tmp_path / "eplb-m-rank00000.prom").exists)


def test_killed_writer_leaves_its_last_counts(tmp_path: Path) -> None:
    script = """
        import os, signal, sys, time
        from pathlib import Path
        from helpers import ROOT, load_of, map_of, open_writer
        from eplb_dump import metrics_file
        metrics_file.REFRESH_SECONDS = 0.02
        path = Path(sys.argv[1])
        writer = open_writer(path / "dump", metrics_file=path / "eplb")
        for step in range(10):
            writer.record(step, load_of(step), map_of())
        file = path / "eplb-m-rank00000.prom"  # which a thread writes
        while not file.exists() or 'outcome="recorded"} 10' not in file.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run_child(script, tmp_path, code=-9)
    found = parsed((tmp_path / "eplb-m-rank00000.prom").read_text())
    assert found[("eplb_writer_steps_total", "recorded")] == 10
    assert found[("eplb_writer_closed",)] == 0


def test_exit_without_close_writes_the_final_counts(tmp_path: Path) -> None:
    script = """
        import sys
        from helpers import load_of, map_of, open_writer
        writer = open_writer(sys.argv[1] + "/dump", metrics_file=sys.argv[1] + "/eplb")
        for step in range(10):
            writer.record(step, load_of(step), map_of())
    """
    run_child(script, tmp_path)
    found = parsed((tmp_path / "eplb-m-rank00000.prom").read_text())
    assert found[("eplb_writer_steps_total", "recorded")] == 10
    assert found[("eplb_writer_closed",)] == 1


def test_variable_names_the_file_and_every_writer_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(METRICS_FILE_VARIABLE, str(tmp_path / "eplb_{rank}_{model}.prom"))
    for rank in range(2):
        for model in ("m", "org/draft"):
            open_writer(tmp_path / "dump", ep_rank=rank, model=model).close()
    names = sorted(path.name for path in tmp_path.glob("*.prom"))
    assert names == [f"eplb_0000{rank}_{model}.prom" for rank in (0, 1) for model in ("m", "org--draft")]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("eplb.prom", "eplb-m-rank00003.prom"),
        ("eplb", "eplb-m-rank00003.prom"),
        ("eplb.v1", "eplb.v1-m-rank00003.prom"),
        ("{rank}", "00003-m.prom"),
        ("{model}.{rank}.prom", "m.00003.prom"),
    ],
)
def test_name(given: str, name: str) -> None:
    assert path_for(Path("/x") / given, session_info(ep_rank=3)) == Path("/x") / name


def test_file_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics_file, "REFRESH_SECONDS", 0.01)
    with (
        caplog.at_level(logging.WARNING),
        open_writer(tmp_path / "dump", metrics_file=tmp_path / "none/eplb", segment_steps=4) as writer,
    ):
        record(writer, 0, 40)
        wait_until(lambda: caplog.messages)
        assert writer.flush(20)
    stats = writer.stats()
    assert (stats.recorded, stats.off, stats.segments_sealed) == (40, None, 10)
    (message,) = caplog.messages
    assert message.startswith(
        f"the metrics file could not be written: {tmp_path}/none/eplb-m-rank00000.prom: "
    )


def test_fault_that_turns_recording_off_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(tmp_path / "dump", metrics_file=tmp_path / "eplb")
    record(writer, 0, 10)
    assert writer.flush(20)

    def fail(self: Any, *parts: bytes) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(session_writer.SessionWriter, "append", fail)
    record(writer, 10, 20)
    assert not writer.close()
    found = parsed((tmp_path / "eplb-m-rank00000.prom").read_text())
    assert found[("eplb_writer_off",)] == 1
    assert_as_stats(found, writer.stats())
    assert found[("eplb_writer_steps_total", "dropped")] == 10


def test_recording_that_never_began_is_off(tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("a file, not a folder")
    writer = open_writer(tmp_path / "dump", run_id=None, metrics_file=tmp_path / "eplb")
    assert not writer.close()
    text = (tmp_path / "eplb-m-rank00000.prom").read_text()
    assert 'model="m",rank="0",run=""' in text
    assert parsed(text)[("eplb_writer_off",)] == 1


def test_names_are_escaped() -> None:
    info = session_info(model='a\\b"c\nd')
    text = render(info, WriterStats(), waiting=0, written_at=0.0, ended=False)
    labels = {
        sample.labels["model"] for family in text_string_to_metric_families(text) for sample in family.samples
    }
    assert labels == {'a\\b"c\nd'}
    paused = dataclasses.replace(WriterStats(), paused="No space left on device")
    assert "eplb_writer_paused" in render(info, paused, waiting=0, written_at=0.0, ended=False)
    assert parsed(render(info, paused, waiting=3, written_at=0.0, ended=False))[("eplb_writer_paused",)] == 1


def test_page_lists_the_metrics() -> None:
    page = (ROOT / "docs/operate/metrics.md").read_text()
    text = render(session_info(), WriterStats(), waiting=0, written_at=0.0, ended=False)
    listed = set(re.findall(r"^\| `(eplb_writer_\w+)` \| (\w+)", page, re.MULTILINE))
    assert listed == set(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))


def test_wrong_argument_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="metrics_file must be a path, not int"):
        open_writer(tmp_path, metrics_file=3)
