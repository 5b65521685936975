"""The sidecar of `serve-metrics`: counters only grow, series are few, and it survives what it finds."""

from __future__ import annotations

import re
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import PlantedClock
from helpers import EP_SIZE, LAYERS, ROOT, cli, load_of, map_of, one_error, open_writer, write
from live_replay import replay
from planted_incidents import make_run
from prometheus_client.parser import text_string_to_metric_families

from eplb_analyze import open_run
from eplb_analyze.analysis.cost import cost_of
from eplb_analyze.analysis.pauses import pauses_of
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.live import prometheus, sidecar
from eplb_analyze.live.metric_families import METRICS, MOST_SERIES, RANK_METRICS, Family
from eplb_analyze.live.sidecar import DiskUsage, Sidecar
from eplb_analyze.live.totals import Totals
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.cost import CostStatus
from eplb_analyze.reader.join import StepState
from eplb_dump import ExpertLoadWriter
from eplb_dump.format.schema import STATUS_LABELS

Values = dict[tuple[str, ...], float]


def values(families: list[Family]) -> Values:
    """By name and label values; a summary's sum and count are two."""
    found: Values = {}
    for family in families:
        for sample in family.samples:
            key = (family.name, *sample.labels.values())
            if sample.count is not None:
                found[(f"{family.name}_count", *key[1:])] = sample.count
                key = (f"{family.name}_sum", *key[1:])
            assert key not in found
            found[key] = sample.value
    return found


def looked(at: Sidecar) -> Values:
    at.look()
    return values(at.families)


def counters(found: Values) -> Values:
    return {key: value for key, value in found.items() if key[0].endswith(("_total", "_sum", "_count"))}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[..., list[ExpertLoadWriter]]]:
    """A function that starts the writers of an engine; those that are open at the end are closed."""
    with ExitStack() as stack:

        def start(ranks: int = EP_SIZE, **options: Any) -> list[ExpertLoadWriter]:
            return [
                stack.enter_context(open_writer(tmp_path, ep_rank=rank, ep_size=ranks, **options))
                for rank in range(ranks)
            ]

        yield start


def record(
    writers: list[ExpertLoadWriter], first: int, end: int, *, layers: int = LAYERS, generation: int = 0
) -> None:
    slots = 4 * len(writers)
    for step in range(first, end):
        for rank, writer in enumerate(writers):
            load = load_of(step, rank, layers, slots)
            load[:, : slots // len(writers)] += 500  # rank 0 is the slowest
            writer.record(step, load, map_of(generation, layers, slots))
    assert all(writer.flush(60) for writer in writers)


def test_series_of_64_ranks_do_not_depend_on_layers(tmp_path: Path, engine: Any) -> None:
    counts = []
    for run, layers in (("few", 2), ("many", 61)):
        writers = engine(64, run_id=run)
        record(writers, 0, 20, layers=layers)
        at = Sidecar(tmp_path, run)
        found = looked(at)
        of_rank = Counter(key[1] for key in found if key[0] in RANK_METRICS)
        assert set(of_rank) == {str(rank) for rank in range(64)}
        assert max(of_rank.values()) <= MOST_SERIES
        labels = {name for family in at.families for sample in family.samples for name in sample.labels}
        assert labels == {"rank", "outcome", "run", "model", "scope"}
        rest = sum(key[0] not in RANK_METRICS for key in found)
        assert rest <= 40  # what docs/operate/metrics.md says
        counts.append((sum(of_rank.values()), rest))
        for writer in writers:
            writer.close()
    assert counts[0] == counts[1]
    # Without a cost and an incident, everything is there.
    absent = {name for name in METRICS if not any(key[0].startswith(name) for key in found)}
    assert all(name.startswith(("eplb_imbalance_cost", "eplb_incident_")) for name in absent)


def test_counters_equal_the_sums_of_the_runs_and_never_decrease(tmp_path: Path, engine: Any) -> None:
    at = Sidecar(tmp_path)
    expected = before = looked(at)
    assert before[("eplb_sidecar_following",)] == 0
    steps, rows = 0, Counter[tuple[str, str]]()
    for number, (run, count) in enumerate((("a", 30), ("b", 50), ("c", 20))):
        writers = engine(run_id=run)
        for first in range(0, count, 10):
            record(writers, first, first + 10)
            found = looked(at)
            assert all(found[key] >= value for key, value in counters(before).items())
            before = found
        writers[1].skip("dummy")
        writers[0].record(count, -load_of(0), None)
        assert all(writer.close() for writer in writers)
        found = looked(at)
        steps += count
        for rank in ("0", "1"):
            rows[rank, "recorded"] += count
        rows["1", "dummy"] += 1
        rows["0", "rejected"] += 1
        expected = {key: value for key, value in found.items() if key[0] == "eplb_recorder_steps_total"}
        assert expected == {
            ("eplb_recorder_steps_total", rank, outcome): rows[rank, outcome]
            for rank in ("0", "1")
            for outcome in STATUS_LABELS
        }
        assert found[("eplb_complete_steps_total",)] == steps
        assert found[("eplb_runs_total",)] == number + 1
        assert found[("eplb_recorder_sessions_total", "1")] == number + 1
        assert found[("eplb_run_info", run, "m", "local")] == 1
    truth = [summarize(open_run(tmp_path, run)) for run in ("a", "b", "c")]
    for name in ("balancedness", "imbalance"):
        total = sum((one.spreads[name].mean or 0) * one.steps.count(StepState.RECORDED) for one in truth)
        assert found[(f"eplb_step_{name}_ratio_sum",)] == pytest.approx(total)
        assert found[(f"eplb_step_{name}_ratio_count",)] == steps


def test_what_is_read_again_is_not_counted_again(
    tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = engine()
    record(writers, 0, 60)
    record(writers, 60, 70, generation=1)
    at = Sidecar(tmp_path)
    before = looked(at)
    assert before[("eplb_rearrangements_total",)] == 1
    hidden = tmp_path / "run=r"
    hidden.rename(tmp_path / "hidden")
    monkeypatch.setattr(at, "_follower", None)  # as if its folder had been unmounted
    gone = looked(at)
    assert gone[("eplb_sidecar_following",)] == 0
    assert ("eplb_balancedness_ratio",) not in gone
    (tmp_path / "hidden").rename(hidden)
    own = "eplb_sidecar_"
    again = {key: value for key, value in counters(looked(at)).items() if not key[0].startswith(own)}
    assert again == {key: value for key, value in counters(before).items() if not key[0].startswith(own)}
    record(writers, 70, 75, generation=1)
    found = looked(at)
    assert found[("eplb_complete_steps_total",)] == 75
    assert found[("eplb_recorder_steps_total", "1", "recorded")] == 75
    assert found[("eplb_rearrangements_total",)] == 1


def test_figures_are_those_of_watch_and_end_with_the_run(tmp_path: Path, engine: Any) -> None:
    writers = engine()
    record(writers, 0, 40)
    at = Sidecar(tmp_path)
    found = looked(at)
    look = at.state.look
    assert look is not None
    assert look.recent is not None
    assert found[("eplb_balancedness_ratio",)] == look.recent.balancedness
    assert found[("eplb_worst_rank",)] == 0
    shares = [found[("eplb_rank_excess_ratio", str(rank))] for rank in range(EP_SIZE)]
    assert found[("eplb_worst_rank_excess_ratio",)] == max(shares) == shares[0]
    assert found[("eplb_worst_layer_balancedness_ratio",)] == min(
        layer.balancedness for layer in look.recent.layers if layer.balancedness is not None
    )
    files = [path for path in tmp_path.glob("run=r/model=*/rank=*1/session=*/*") if path.is_file()]
    assert found[("eplb_recorder_disk_bytes", "1")] == sum(path.stat().st_size for path in files)
    assert found[("eplb_recorder_closed", "0")] == found[("eplb_run_closed",)] == 0
    for writer in writers:
        writer.close()
    found = looked(at)
    assert found[("eplb_recorder_closed", "0")] == found[("eplb_run_closed",)] == 1
    assert not {key[0] for key in found} & {"eplb_balancedness_ratio", "eplb_rank_load_ratio"}
    assert found[("eplb_complete_steps_total",)] == 40


def test_named_run_is_kept(tmp_path: Path, engine: Any) -> None:
    record(engine(run_id="a"), 0, 10)
    texts: list[str] = []
    at = Sidecar(tmp_path, "a", notify=texts.append)
    looked(at)
    record(engine(run_id="b"), 0, 20)
    assert looked(at)[("eplb_complete_steps_total",)] == 10
    assert texts == ["following run a, model m"]


def test_missing_run_is_waited_for_and_told_of_once(tmp_path: Path, engine: Any) -> None:
    texts: list[str] = []
    at = Sidecar(tmp_path / "none", notify=texts.append)
    for _ in range(3):
        assert looked(at)[("eplb_sidecar_following",)] == 0
    assert len(texts) == 1
    assert re.search(r"none.*; waiting$", texts[0])
    record(engine(), 0, 10)
    at = Sidecar(tmp_path, "other", notify=texts.append)
    assert looked(at)[("eplb_sidecar_following",)] == 0
    record(engine(run_id="other"), 0, 10)
    assert looked(at)[("eplb_sidecar_following",)] == 1
    assert texts[-1] == "following run other, model m"


def test_damaged_and_deleted_files_do_not_end_it(tmp_path: Path, engine: Any) -> None:
    writers = engine()
    record(writers, 0, 10)
    at = Sidecar(tmp_path)
    assert looked(at)[("eplb_damaged_files",)] == 0
    journal = next(writers[1].folder.glob("journal-*"))
    size = journal.stat().st_size
    record(writers, 10, 20)
    content = bytearray(journal.read_bytes())
    content[size + 40] ^= 255
    journal.write_bytes(content)
    found: Values = {}
    for _ in range(3):  # an unfinished write on a network file system looks like damage
        found = looked(at)
    assert found[("eplb_damaged_files",)] == 1
    assert found[("eplb_complete_steps_total",)] == 10
    shutil.rmtree(tmp_path / "run=r")
    looked(at)
    record(engine(run_id="next"), 0, 10)
    found = looked(at)
    assert found[("eplb_run_info", "next", "m", "local")] == 1
    assert found[("eplb_complete_steps_total",)] == 20


def test_unexpected_error_is_counted_and_the_next_look_begins_again(
    tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(engine(), 0, 10)
    at = Sidecar(tmp_path)
    looked(at)

    def fail(path: Path) -> dict[int, int]:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(at._disk, "by_rank", fail)
    monkeypatch.setattr(at, "_disk_due", sidecar._Rarely())
    assert looked(at)[("eplb_sidecar_errors_total",)] == 1
    monkeypatch.undo()
    found = looked(at)
    assert (found[("eplb_sidecar_following",)], found[("eplb_complete_steps_total",)]) == (1, 10)


@pytest.mark.parametrize("steps_per_look", [1, 20])
def test_each_incident_counts_once(steps_per_look: int) -> None:
    run = make_run(3001, ("expert_hot",), steps=900, cells=300_000)
    totals, seen = Totals(), 0
    for _, alerts in replay(run, steps_per_look):
        totals.add_alerts(alerts)
        seen = max(seen, len(alerts))
    assert seen > 0
    assert totals.incidents == seen


def test_pause_is_that_of_rearrangements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PlantedClock()
    monkeypatch.setattr("eplb_dump.writer.time", clock)
    rng = np.random.default_rng(1)
    at = Sidecar(tmp_path)
    with open_writer(tmp_path, scope="global", segment_steps=64) as writer:
        for step in range(400):
            clock.ns += int(10e6 + rng.integers(10**5)) + (250_000_000 if step == 200 else 0)
            writer.record(step, load_of(step), map_of(step // 200))
            if step % 50 == 49:
                assert writer.flush(60)
                found = looked(at)
                assert found[("eplb_rearrangements_total",)] == (step >= 200)
        assert found[("eplb_rearrangement_pause_seconds_count",)] == 1
    found = looked(at)
    run = open_run(tmp_path)
    (truth,) = pauses_of(run, run.load_history().rearrangements())
    assert isinstance(truth, Interval)
    assert truth.value == pytest.approx(250, rel=0.05)
    assert found[("eplb_rearrangement_pause_seconds_sum",)] == pytest.approx(truth.value / 1e3, rel=0.01)
    assert found[("eplb_rearrangement_pause_seconds_count",)] == 1


def test_cost_is_that_of_the_newest_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes 5 ms and 0.01 ms for each token of the slowest rank."""
    clock = PlantedClock()
    monkeypatch.setattr("eplb_dump.writer.time", clock)
    monkeypatch.setattr(sidecar, "is_current", lambda look: True)  # its clock is in the past
    monkeypatch.setattr("eplb_analyze.live.metric_families.is_current", lambda look: True)
    rng = np.random.default_rng(0)
    with open_writer(tmp_path, scope="global", num_logical_experts=8) as writer:
        for step in range(600):
            load = rng.poisson(rng.integers(40, 80) * (1 + rng.random((2, 8))))
            clock.ns += int(5e6 + 1e4 * load.reshape(2, 2, 4).sum(axis=2).max(axis=1).sum())
            writer.record(step, load, np.arange(8) + np.zeros((2, 1), int))
            assert step % 100 or writer.flush(60)
        assert writer.flush(60)
        found = looked(Sidecar(tmp_path))
        truth = cost_of(open_run(tmp_path))
    assert truth.status is CostStatus.MEASURED
    assert truth.ms_per_step is not None
    assert found[("eplb_imbalance_cost_measurable",)] == 1
    for name, value in (("", "estimate"), ("_low", "low"), ("_high", "high")):
        ms = getattr(truth.ms_per_step, value)
        assert found[(f"eplb_imbalance_cost{name}_seconds",)] == pytest.approx(ms / 1e3)


def test_files_that_do_not_grow_are_looked_at_once(
    tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (writer,) = engine(1, segment_steps=8)
    record([writer], 0, 64)
    writer.close()
    disk, folder = DiskUsage(), writer.folder.parents[1]

    def total() -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert disk.by_rank(folder) == {0: total()}
    known = dict(disk._known)
    assert len(known) >= 16
    segment = next(writer.folder.glob("loads-*.parquet"))
    replaced = writer.folder / "new"
    replaced.write_bytes(b"thinner")
    replaced.replace(segment)  # a new file under the same name
    next(writer.folder.glob("steps-*.parquet")).unlink()
    assert disk.by_rank(folder) == {0: total()}
    assert len(disk._known) == len(known) - 1


# ---- the text format and the command


def test_names_follow_the_rules_of_prometheus_and_the_page_lists_them() -> None:
    page = (ROOT / "docs/operate/metrics.md").read_text()
    for name, (kind, text) in METRICS.items():
        assert re.fullmatch(r"eplb_[a-z0-9]+(_[a-z0-9]+)*", name)
        assert name.endswith("_total") == (kind == "counter")
        assert not re.search(r"_(ms|milliseconds|percent|kilobytes|minutes)\b", name)
        assert text.endswith(".")
        assert f"`{name}" in page, name


def test_text_has_the_values(tmp_path: Path, engine: Any) -> None:
    record(engine(), 0, 40)
    at = Sidecar(tmp_path)
    found = looked(at)
    parsed: Values = {}
    for family in text_string_to_metric_families(prometheus.text(at.families)):
        own = METRICS[f"{family.name}_total" if family.type == "counter" else family.name]
        assert (family.type, family.documentation) == own
        for sample in family.samples:
            labels = [sample.labels[name] for name in ("rank", "outcome", "run", "model", "scope")
                      if name in sample.labels]  # fmt: skip
            parsed[(sample.name, *labels)] = sample.value
    assert parsed == found


def test_once_prints_the_metrics(tmp_path: Path) -> None:
    write(tmp_path, steps=40)
    result = cli("serve-metrics", "--once", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "eplb_complete_steps_total 40.0\n" in result.stdout
    assert all(re.fullmatch(r"#.*|\S+({.*})? \S+", line) for line in result.stdout.splitlines())


def test_missing_package_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, steps=2)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "eplb_analyze.live.prometheus", raising=False)
    monkeypatch.delattr("eplb_analyze.live.prometheus")
    result = cli("serve-metrics", "--once", tmp_path)
    one_error(result, 2, "prometheus_client", "pip install 'eplb-dump[metrics]'")


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "dump", steps=2)
    one_error(cli("serve-metrics", "--once", tmp_path), 3, str(tmp_path))
    one_error(cli("serve-metrics", "--json", tmp_path / "dump"), 2, "--json requires --once")
    one_error(cli("serve-metrics", "--once", "s3://bucket/dump"), 2, "`serve-metrics` needs a local folder")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = cli("serve-metrics", "--host", "127.0.0.1", "--port", str(port), tmp_path / "dump")
    one_error(result, 2, f"cannot listen on 127.0.0.1, port {port}", "--port")
