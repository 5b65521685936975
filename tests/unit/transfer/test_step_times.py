"""Step times of other programs: read from each format, and matched with a recording whose steps are known."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from helpers import cli, one_error, open_writer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eplb_analyze import open_run
from eplb_analyze.analysis.cost import cost_of
from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.transfer import step_times
from eplb_analyze.transfer.importers.timings import Series, read_series
from eplb_analyze.transfer.step_times import read_step_times

#: Lines of vLLM 0.33.0's front end, of an engine's own process in earlier releases, and without a prefix.
VLLM = [
    "(APIServer pid=7) INFO 11-26 17:53:00 [loggers.py:199] Engine {engine:03}: Iteration({step}): 1 context "
    "requests, {tokens} context tokens, 0 generation requests, 0 generation tokens, iteration elapsed time: "
    "{ms:.2f} ms, GPU KV cache usage: 10.0%",
    "(EngineCore_DP{engine} pid=2498766) INFO 04-22 12:53:55 [core.py:359] Iteration({step}): 0 context "
    "requests, 0 context tokens, {tokens} generation requests, {tokens} generation tokens, iteration elapsed "
    "time: {ms:.2f} ms",
    "Iteration({step}): 0 context requests, 0 context tokens, {tokens} generation requests, {tokens} "
    "generation tokens, iteration elapsed time: {ms:.2f} ms (dummy), GPU KV cache usage: 10.0%",
]
#: As SGLang 0.5.23 encodes ForwardPassMetrics; Dynamo writes the same fields.
FPM = {
    "version": 1, "worker_id": "4192", "dp_rank": 0, "counter_id": 3, "wall_time": 0.00891,
    "scheduled_requests": {
        "num_prefill_requests": 1, "sum_prefill_tokens": 384, "var_prefill_length": 0.0,
        "sum_prefill_kv_tokens": 0, "num_decode_requests": 128, "sum_decode_kv_tokens": 0,
        "var_decode_kv_tokens": 0.0,
    },
    "queued_requests": {"num_prefill_requests": 0, "sum_prefill_tokens": 0},
}  # fmt: skip
#: A part of what TensorRT-LLM's /metrics returns (its docs, "Metrics Endpoint"; IterationStats).
TRTLLM = {
    "gpuMemUsage": 76665782272, "iter": 154, "iterLatencyMS": 7.00688362121582, "numActiveRequests": 1,
    "kvCacheStats": {"tokensPerBlock": 32},
    "inflightBatchingStats": {"numContextRequests": 1, "numCtxTokens": 256, "numGenRequests": 3},
}  # fmt: skip


def lines(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def dynamo(metrics: dict[str, Any], seen_ms: int) -> dict[str, Any]:
    """A line of dynamo.fpm.trace.v1."""
    event = {
        "schema": "dynamo.fpm.trace.v1", "source": {"namespace": "default", "component": "backend"},
        "capture_mode": "full", "observed_at_unix_ms": seen_ms, "fpm": metrics,
    }  # fmt: skip
    return {"timestamp": 1250, "event": event}


class TestFormats:
    @pytest.mark.parametrize("form", VLLM)
    def test_vllms_log_among_other_lines(self, tmp_path: Path, form: str) -> None:
        texts = [form.format(engine=0, step=4 + i, tokens=512 + i, ms=8.5 + i) for i in range(3)]
        (one,) = read_series(
            lines(tmp_path / "serve.log", ["INFO starting", *texts[:2], "GET /health", texts[2]])
        )
        assert one.step is not None
        assert one.step.tolist() == [4, 5, 6]
        assert (one.ms.tolist(), one.tokens.tolist()) == ([8.5, 9.5, 10.5], [512, 513, 514])

    @pytest.mark.parametrize("form", VLLM[:2])
    def test_each_engine_and_each_start_is_a_series(self, tmp_path: Path, form: str) -> None:
        texts = [
            form.format(engine=e, step=step, tokens=9, ms=1 + e) for step in (0, 1, 0, 1, 2) for e in (0, 1)
        ]
        series = read_series(lines(tmp_path / "serve.log", texts))
        assert [(len(one.ms), float(one.ms[0])) for one in series] == [(2, 1), (3, 1), (2, 2), (3, 2)]

    def test_vllm_can_log_json(self, tmp_path: Path) -> None:
        texts = [json.dumps({"message": VLLM[0].format(engine=0, step=s, tokens=5, ms=2)}) for s in range(3)]
        assert len(read_series(lines(tmp_path / "serve.log", texts))[0].ms) == 3

    def test_forward_pass_metrics_of_sglang_and_of_dynamo(self, tmp_path: Path) -> None:
        idle = {**FPM, "counter_id": 4, "wall_time": 0.0}
        (one,) = read_series(lines(tmp_path / "fpm.jsonl", map(json.dumps, [FPM, idle])))
        assert one.step is not None
        assert one.time is None
        assert (one.step.tolist(), one.ms.tolist(), one.tokens.tolist()) == (
            [3],
            [pytest.approx(8.91)],
            [512],
        )
        records = [dynamo({**FPM, "dp_rank": rank}, 1782777601250 + rank) for rank in (0, 1)]
        packed = tmp_path / "trace.000000.jsonl.gz"
        packed.write_bytes(gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in records)))
        series = read_series(packed)
        assert [one.time.tolist() for one in series if one.time is not None] == [
            [1782777601.25],
            [1782777601.251],
        ]

    def test_a_trace_that_its_writer_still_has_open_is_read_to_its_end(self, tmp_path: Path) -> None:
        text = b"".join(json.dumps(dynamo({**FPM, "counter_id": i}, i)).encode() + b"\n" for i in range(2000))
        path = tmp_path / "trace.jsonl.gz"
        path.write_bytes(gzip.compress(text)[:-2000])
        assert 100 < len(read_series(path)[0].ms) < 2000

    @pytest.mark.parametrize("form", ["lines", "polls", "document"])
    def test_iteration_statistics_of_tensorrt_llm(self, tmp_path: Path, form: str) -> None:
        records = [{**TRTLLM, "iter": 154 + i} for i in range(4)]
        path = tmp_path / "stats.json"
        if form == "document":
            path.write_text(json.dumps(records, indent=4))
        else:
            items = (
                [json.dumps(r) for r in records]
                if form == "lines"
                else map(json.dumps, (records[:2], [], records[2:]))
            )
            lines(path, items)
        (one,) = read_series(path)
        assert one.step is not None
        assert (one.step.tolist(), one.tokens.tolist()) == ([154, 155, 156, 157], [259] * 4)
        assert one.ms.tolist() == [TRTLLM["iterLatencyMS"]] * 4

    def test_tensorrt_llm_names_several_times(self, tmp_path: Path) -> None:
        """With an overlap scheduler iterLatencyMS spans two iterations."""
        records = [{**TRTLLM, "schedulerMode": "overlap", "hostStepTimeMS": 4.0}]
        for rank in (0, 1):
            records.append({**records[0], "gpuForwardTimeMS": 3.0 + rank, "rank": rank})
        series = read_series(lines(tmp_path / "stats", map(json.dumps, records)))
        assert [one.ms.tolist() for one in series] == [[4.0], [3.0], [4.0]]
        path = lines(tmp_path / "stats", [json.dumps({**TRTLLM, "schedulerMode": "overlap"})])
        with pytest.raises(DumpError, match="line 1: iterLatencyMS spans two iterations"):
            read_series(path)

    @pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet"])
    def test_tables_are_put_in_order(self, tmp_path: Path, kind: str) -> None:
        table = pa.table({"step": [7, 5, 6], "ms": [0.7, 0.5, 0.6], "note": ["a", "b", "c"]})
        path = tmp_path / f"times.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            pacsv.write_csv(table, tmp_path / "plain")
            text = (tmp_path / "plain").read_bytes()
            path.write_bytes(gzip.compress(text) if kind == "csv.gz" else text)
        (one,) = read_series(path)
        assert one.step is not None
        assert (one.step.tolist(), one.ms.tolist()) == ([5, 6, 7], [0.5, 0.6, 0.7])

    def test_times_of_a_table_are_seconds_or_timestamps(self, tmp_path: Path) -> None:
        texts = ["1767225600.5", "2026-01-01T00:00:00.5", "2026-01-01 00:00:00.5Z"]
        for number, text in enumerate(texts):
            (one,) = read_series(lines(tmp_path / f"{number}.csv", ["time,ms", f"{text},3"]))
            assert one.time is not None
            assert one.time.tolist() == [1767225600.5], text


class TestBadInput:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "no step times"),
            ("INFO nothing here\n", "no step times"),
            ('{"a": 1}\n', "no step times"),
            ('{"iter": 1, "iterLatencyMS": 2}\n{"iter": 2, "iterLatencyMS": "x"}\n', "line 2: time: 'x'"),
            ('{"iter": 1, "iterLatencyMS": 2}\n{broken}\n', "line 2: it is not JSON"),
            ('{"iter": 1, "iterLatencyMS": NaN}\n', "a step of nan ms"),
            ('{"iter": 1, "iterLatencyMS": -1}\n', "line 1: a step of -1 ms"),
            ('{"iter": 1, "iterLatencyMS": 1' + "0" * 400 + "}\n", "line 1: time: 1000"),
            ('{"iter": 1.5, "iterLatencyMS": 1}\n', "1.5 is not the number of a step"),
            ('{"iter": 1, "iterLatencyMS": 1}\n[3]\n', "line 2: it is not a JSON object"),
            ('{"iter": 1, "iterLatencyMS": 1}\n{"wall_time": 1}\n', "after TensorRT-LLM's"),
            ("a,ms\n1,2\n", "no step times"),
            ("step,ms\n1,2\n1,3\n", "line 3: step 1 occurs twice"),
            ("step,ms\n1,2\n2,\n", "line 3: ms: '' is not a number"),
            ("step,ms\n1,2\n2,nan\n", "line 3: ms is missing"),
            ("step,ms\n1,fast\n", "line 2: ms: 'fast' is not a number"),
            ("step,ms\n1,2\n-3,2\n", "line 3: step -3"),
            ("step,ms\n1,2\n2,1e30\n", "line 3: a step of 1e+30 ms"),
            ("step,ms\n1,2,3\n", "line 2: 3 cells in 2 columns"),
            ("time,ms\nnoon,2\n", "line 2: time: 'noon' is not a number"),
        ],
    )
    def test_the_error_names_file_and_line(self, tmp_path: Path, text: str, words: str) -> None:
        path = tmp_path / "times"
        path.write_text(text)
        with pytest.raises(DumpError) as error:
            read_series(path)
        message = str(error.value)
        assert message.startswith(str(path))
        assert words in message
        assert "\n" not in message

    def test_sizes_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module = "eplb_analyze.transfer.importers.timings"
        path = lines(tmp_path / "log", [VLLM[0].format(engine=i, step=i, tokens=1, ms=1) for i in range(9)])
        for name, limit in (("MAX_ENTRIES", 8), ("MAX_SERIES", 8), ("MAX_UNPACKED", 100), ("MAX_TEXT", 50)):
            with monkeypatch.context() as patch:
                patch.setattr(f"{module}.{name}", limit)
                with pytest.raises(DumpError, match="log: line"):
                    read_series(path)

    def test_a_small_file_that_unpacks_to_much_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "log.gz"
        path.write_bytes(gzip.compress(b"\n" * (17 << 20)))
        with pytest.raises(DumpError, match=r"the text so far is longer than 16 MiB"):
            read_series(path)

    def test_names_of_engines_take_no_memory(self, tmp_path: Path) -> None:
        path, size, many = tmp_path / "trace", 1 << 20, 50
        with path.open("w") as file:
            for i in range(many):
                file.write(json.dumps({**FPM, "worker_id": f"{i}{'x' * size}"}) + "\n")
        tracemalloc.start()
        assert len(read_series(path)) == many
        assert tracemalloc.get_traced_memory()[1] < many * size / 4
        tracemalloc.stop()

    def test_starts_of_all_engines_count(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("eplb_analyze.transfer.importers.timings.MAX_SERIES", 8)
        records = [{**FPM, "worker_id": str(i), "counter_id": 1} for i in range(3) for _ in range(3)]
        with pytest.raises(DumpError, match="line 9: more than"):
            read_series(lines(tmp_path / "trace", map(json.dumps, records)))

    def test_an_error_is_short(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "stats", [json.dumps({**TRTLLM, "iter": "x" * 10_000})])
        with pytest.raises(DumpError, match="xxx") as error:
            read_series(path)
        assert len(str(error.value)) <= 300

    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    def test_a_column_that_occurs_twice_is_rejected(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / f"times.{kind}"
        table = pa.table([pa.array([1, 2]), pa.array([1.0, 2.0]), pa.array([3.0, 3.0])], ["step", "ms", "ms"])
        (pacsv.write_csv if kind == "csv" else pq.write_table)(table, path)
        with pytest.raises(DumpError, match="2 columns have the name ms"):
            read_series(path)

    @pytest.mark.parametrize("damage", [b"\x1f\x8bgarbage", b"PAR1garbage", b"\x00\xff" * 100])
    def test_damaged_files(self, tmp_path: Path, damage: bytes) -> None:
        (tmp_path / "times").write_bytes(damage)
        with pytest.raises(DumpError, match="times"):
            read_series(tmp_path / "times")

    @pytest.mark.parametrize(
        ("table", "words"),
        [
            ({"step": ["1"], "ms": [1.0]}, "column step: string"),
            ({"step": [1, None], "ms": [1.0, 2.0]}, "row 2: step is missing"),
            ({"step": [1], "time": [1]}, "no step times"),
            ({"step": [3, 2, 3], "ms": [1, 1, 1]}, "row 3: step 3 occurs twice"),
        ],
    )
    def test_parquet_tables(self, tmp_path: Path, table: dict[str, Any], words: str) -> None:
        pq.write_table(pa.table(table), tmp_path / "times")
        with pytest.raises(DumpError, match=words):
            read_series(tmp_path / "times")

    @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        number=st.integers(0, 4),
        changes=st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=3)), min_size=1, max_size=4),
    )
    def test_any_damage_is_an_error_or_leaves_series(
        self, tmp_path: Path, number: int, changes: list[tuple[int, bytes]]
    ) -> None:
        texts = [
            "".join(VLLM[0].format(engine=0, step=i, tokens=5, ms=2) + "\n" for i in range(4)),
            "".join(json.dumps(dynamo({**FPM, "counter_id": i}, i)) + "\n" for i in range(3)),
            json.dumps([TRTLLM, {**TRTLLM, "iter": 155}]),
            "step,ms,tokens\n1,2,3\n2,3,\n",
        ]
        table = io.BytesIO()
        pq.write_table(pa.table({"time": [1.5, 2.5], "ms": [1.0, 2.0]}), table)
        data = bytearray([*(text.encode() for text in texts), table.getvalue()][number])
        for at, new in changes:
            data[at % len(data) : at % len(data) + 1] = new
        (tmp_path / "times").write_bytes(data)
        with contextlib.suppress(DumpError):
            for one in read_series(tmp_path / "times"):
                assert len(one.ms) == len(one.tokens) > 0
                assert (one.ms > 0).all()


STEPS, FIRST = 400, 30


@pytest.fixture(scope="module")
def truth() -> tuple[Any, Any]:
    """Tokens and ms of the steps FIRST … of a run."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(100, 900, STEPS)
    return tokens, 4 + tokens / 100 + rng.normal(size=STEPS) / 10


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory, truth: tuple[Any, Any]) -> Path:
    """A run that knows its tokens only by its loads."""
    root = tmp_path_factory.mktemp("dump")
    with open_writer(root, scope="global", segment_steps=64) as writer:
        for step, tokens in enumerate(truth[0], FIRST):
            load = np.random.default_rng(step).multinomial(tokens * 2, np.full(8, 1 / 8), size=3)
            writer.record(step, load, np.tile(np.arange(8) % 6, (3, 1)))
            assert step % 100 or writer.flush(60)
    return root


def log(
    path: Path, truth: tuple[Any, Any], offset: int = 0, engine: int = 0, steps: Any = range(STEPS)
) -> Path:
    values = [(i + FIRST + offset, truth[0][i], truth[1][i] + engine) for i in steps]
    texts = [VLLM[0].format(engine=engine, step=s, tokens=t, ms=ms) for s, t, ms in values]
    with path.open("a") as file:
        file.writelines(f"{text}\n" for text in texts)
    return path


class TestByStep:
    @pytest.mark.parametrize("offset", [0, 1, -7, 5000])
    def test_the_offset_between_two_counters_is_found(
        self, tmp_path: Path, dump: Path, truth: Any, offset: int
    ) -> None:
        found = read_step_times(open_run(dump), log(tmp_path / "log", truth, offset))
        assert found.step.tolist() == list(range(FIRST, FIRST + STEPS))
        assert found.ms == pytest.approx(truth[1], abs=0.01)
        assert found.basis == "engine"
        assert "400 of 400 steps have a time from vLLM's iteration log, matched by step" in found.note
        assert (f"offset {-offset:+,}" in found.note) == bool(offset)
        assert "correlation 1.00 with tokens" in found.note

    def test_a_part_of_the_log(self, tmp_path: Path, dump: Path, truth: Any) -> None:
        found = read_step_times(open_run(dump), log(tmp_path / "log", truth, 77, steps=range(120, 250)))
        assert found.step.tolist() == list(range(FIRST + 120, FIRST + 250))

    def test_the_slowest_engine_counts_and_a_stranger_does_not(
        self, tmp_path: Path, dump: Path, truth: Any
    ) -> None:
        path = log(tmp_path / "log", truth)
        log(path, truth, 3, engine=1)
        other = np.random.default_rng(6).permutation(truth[0]), truth[1] + 100
        log(path, other, engine=2)
        found = read_step_times(open_run(dump), path)
        assert found.ms == pytest.approx(truth[1] + 1, abs=0.01)
        assert (
            "each step takes the time of the slowest of 2 engines or ranks, 1 other left out: "
            "its times belong to other steps" in found.note
        )

    def test_times_of_another_run_are_rejected(self, tmp_path: Path, dump: Path, truth: Any) -> None:
        other = np.random.default_rng(6).permutation(truth[0]), truth[1]
        one_error(
            cli("summary", dump, "--timings", log(tmp_path / "log", other)), 2, "--timings", "to other steps"
        )

    def test_a_counter_that_loses_a_step_is_rejected(self, tmp_path: Path, dump: Path, truth: Any) -> None:
        path = log(tmp_path / "log", truth, steps=range(200))
        log(path, truth, 1, steps=range(200, STEPS))
        one_error(cli("summary", dump, "--timings", path), 2, "drift from the recording's", "fit better")

    @pytest.mark.parametrize(("begin", "lost"), [(200, 40), (372, 1), (300, 2)])
    def test_a_log_that_lacks_lines_and_counts_on_is_rejected(
        self, tmp_path: Path, dump: Path, truth: Any, begin: int, lost: int
    ) -> None:
        """Also if few steps follow, or the rest is far away."""
        path = log(tmp_path / "log", truth, steps=range(begin))
        log(path, truth, -lost, steps=range(begin + lost, STEPS))
        with pytest.raises(UsageError, match="drift from the recording's"):
            read_step_times(open_run(dump), path)

    def test_too_few_steps_in_common(self, tmp_path: Path, dump: Path, truth: Any) -> None:
        path = log(tmp_path / "log", truth, steps=range(10))
        one_error(cli("summary", dump, "--timings", path), 2, "only 10 of its 10 steps are in the recording")

    def test_a_table_may_hold_times_that_follow_nothing(self, tmp_path: Path, dump: Path) -> None:
        """As of a device that does something else: its steps are the recording's."""
        ms = np.random.default_rng(8).uniform(5, 9, STEPS)
        path = lines(tmp_path / "ms.csv", ["step,ms", *(f"{i + FIRST},{v}" for i, v in enumerate(ms))])
        found = read_step_times(open_run(dump), path)
        assert found.step.tolist() == list(range(FIRST, FIRST + STEPS))
        assert found.ms.tolist() == ms.tolist()

    def test_the_cost_uses_them(self, tmp_path: Path, dump: Path, truth: Any) -> None:
        run = open_run(dump)
        run.timings = read_step_times(run, log(tmp_path / "log", truth))
        cost = cost_of(run)
        assert cost.basis == "engine"
        assert cost.step_ms_p50 == pytest.approx(np.median(truth[1]), abs=1)
        assert cost_of(run.truncated_at(FIRST + 200)).basis == "engine"

    def test_the_command_line_reports_the_match(self, tmp_path: Path, dump: Path, truth: Any) -> None:
        path = log(tmp_path / "log", truth)
        result = cli("summary", "--timings", path, "--json", dump)
        assert result.returncode == 0
        assert "note: 400 of 400 steps have a time" in result.stderr
        one_error(cli("summary", "--timings", tmp_path / "none", dump), 3, "none: No such file")


class TestByClock:
    @pytest.mark.parametrize("ends", [True, False])
    @pytest.mark.parametrize("delay", [0.0, 0.004, 0.3])
    def test_the_delay_is_found(self, truth: Any, ends: bool, delay: float) -> None:
        """The engine records a step at its end or its start; the other program writes at its end, later."""
        tokens, ms = truth
        start = 1.7e9 + np.append(0, ms).cumsum() / 1e3
        clock = start[1:] if ends else start[:-1]
        apart = np.diff(clock) * 1e3
        known = np.insert(apart, 0, np.nan) if ends else np.append(apart, np.nan)
        recorded = step_times._Recorded(np.arange(STEPS), clock, known, tokens.astype(float))
        jitter = np.random.default_rng(9).uniform(0, 5e-4, STEPS)
        kept = np.flatnonzero(np.arange(STEPS) % 3 > 0)
        series = Series("x", None, (start[1:] + delay + jitter)[kept], ms[kept], tokens[kept].astype(float))
        matched = step_times._match(recorded, series)
        assert matched.step.tolist() == kept.tolist()
        assert "matched by clock" in matched.how
        assert "correlation 1.00 with tokens" in matched.how

    def test_another_day_is_rejected(self, truth: Any) -> None:
        tokens, ms = truth
        clock = 1.7e9 + ms.cumsum() / 1e3
        recorded = step_times._Recorded(np.arange(STEPS), clock, ms, tokens.astype(float))
        with pytest.raises(UsageError, match="s away from the recording's"):
            step_times._match(recorded, Series("x", None, clock + 86400, ms, tokens.astype(float)))
