"""scripts/real_vllm_gpu.sh: its options, vLLM's log lines, and the table of planted results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import load_of, map_of, open_writer

from scripts.real_vllm_gpu import measure, table

Array = npt.NDArray[Any]
#: As vLLM 0.26 and 0.33 write them; 0.32 without details of the engine.
LOG = """\
(MainProcess pid=7) INFO 11-26 19:06:31 [loggers.py:199] Engine 000: Iteration(0): 1 context requests, \
32 context tokens, 0 generation requests, 0 generation tokens, iteration elapsed time: 208.64 ms, GPU KV \
cache usage: 0.0%
(Worker_TP0_EP0 pid=8) INFO 11-26 19:06:31 [eplb_state.py:634] EPLB step: 150 for model m: avg_tokens=64.00, \
max_tokens=68, balancedness=0.9001, steps until the next rearrangement: 50
(MainProcess pid=7) INFO 11-26 19:06:31 [loggers.py:199] Engine 001: Iteration(0): 0 context requests, \
0 context tokens, 0 generation requests, 0 generation tokens, iteration elapsed time: 9.1 ms (dummy), GPU KV \
cache usage: 0.0%
(MainProcess pid=7) INFO 11-26 19:06:31 [loggers.py:199] Engine 000: Iteration(1): 16 context requests, \
510 context tokens, 2 generation requests, 2 generation tokens, iteration elapsed time: 48.31 ms, GPU KV \
cache usage: 0.8%
(MainProcess pid=7) INFO 11-26 19:06:31 [loggers.py:199] Engine 001: Iteration(1): 0 context requests, \
0 context tokens, 3 generation requests, 3 generation tokens, iteration elapsed time: 4.1 ms, GPU KV cache \
usage: 0.8%
"""
ROUNDS, STEPS = 4, 60
PERIOD_NS = 4_000_000
#: Steps of "check", and those at which a placement begins.
CHECKED, CHANGES = 40, (0, 12, 30)


def test_iterations_are_counted_by_engine_without_dummy_ones() -> None:
    assert table.iterations(LOG) == {0: [32, 512], 1: [3]}


def test_iterations_of_a_log_without_engine_numbers_belong_to_the_first_engine() -> None:
    assert table.iterations(LOG.replace("Engine 000: ", "")) == {0: [32, 512], 1: [3]}


# ---- options


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--tp", "1"], "two GPUs"),
        (["--shapes", "16by300"], "128x300,16x300"),
        (["--shapes", "16x20"], "50 to 4000 tokens"),
        (["--rounds", "0"], "at least 1"),
        (["--parts", "cost,speed"], "speed"),
        (["--set", "dtype"], "NAME=VALUE"),
    ],
)
def test_wrong_option_is_one_line_with_the_remedy(
    given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        measure.arguments(given)
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error:" in last
    assert words in last


def test_default_is_tensor_parallel_and_dp_alone_is_one_gpu_per_engine() -> None:
    assert (measure.arguments([]).tp, measure.arguments(["--dp", "4"]).tp) == (2, 1)


def test_options_of_vllm_are_set_by_their_path() -> None:
    args = measure.arguments(["--set", "eplb_config.use_async=true", "--set", "dtype=bfloat16"])
    options = measure.engine_options(args, "check", Path("model"))
    assert options["eplb_config"]["use_async"] is True
    assert options["eplb_config"]["num_redundant_experts"] == 8
    assert options["dtype"] == "bfloat16"


@pytest.mark.parametrize("part", ["cost", "check"])
def test_all_requests_of_a_round_fit_into_one_pass(part: str) -> None:
    args = measure.arguments(["--shapes", "300x50"])
    options = measure.engine_options(args, part, Path("model"))
    assert options["max_num_seqs"] == 300
    assert options["max_num_batched_tokens"] >= 300 * measure.PROMPT


def test_missing_gpus_and_an_existing_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "gpus", lambda: 3)
    with pytest.raises(measure.EngineError, match="needs 4 GPUs, and torch finds 3"):
        measure.check_environment(measure.arguments(["--tp", "2", "--dp", "2"]))
    (tmp_path / "cost").mkdir()
    with pytest.raises(measure.EngineError, match="choose another --out"):
        measure.check_environment(measure.arguments(["--out", str(tmp_path)]))


def test_missing_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "entry_points", lambda group: [])
    with pytest.raises(measure.EngineError, match="install eplb-dump"):
        measure.check_environment(measure.arguments([]))


# ---- the table


def note(folder: Path, **what: Any) -> None:
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


def part_folder(out: Path, name: str, dp: int = 1, use_async: bool = False) -> Path:
    folder = out / name
    for sub in "probe", "tokens":
        (folder / sub).mkdir(parents=True)
    note(folder, event="part", tp=2 // dp, dp=dp, layers=24, experts=64, redundant=8, set=[],
         use_async=use_async)  # fmt: skip
    note(folder, event="ready", engine="off", vllm="0.33.0", torch="2.11.0", gpu="NVIDIA H100")
    return folder


def write_probe(
    folder: Path, name: str, rows: Array, placements: dict[int, Array] | None = None, ranks: int = 2
) -> None:
    found = placements or {}
    for rank in range(ranks):
        np.savez(
            folder / "probe" / f"{name}-{rank}.npz",
            rows=rows,
            runner="vllm.v1.worker.gpu.model_runner",
            placement_steps=np.array(list(found), np.int64),
            placements=np.array(list(found.values())),
        )


def probe_rows(period_ns: float, step_us: float, own_us: Array, prepare_us: float) -> Array:
    """Rows of one round; the recorder's own part is half before and half after vLLM's."""
    rows = np.zeros((len(own_us), 5), np.int64)
    rows[:, 0] = np.arange(len(own_us)) * period_ns
    rows[:, 1] = 1000 * (step_us + own_us)
    rows[:, 2] = rows[:, 3] = 500 * own_us
    rows[:, 4] = 1000 * prepare_us
    return rows


@pytest.fixture
def cost(tmp_path: Path) -> Path:
    """Steps take 4 ms, and 1% more with the plugin; off2 is 0.1% faster than off in every other round."""
    folder = part_folder(tmp_path, "cost")
    own = np.full(STEPS, 40.0)
    own[::3] = 20.0
    own[7] = 500.0
    for name, period, is_on in (("off", 1.0, 0), ("on", 1.01, 1), ("off2", 1.0, 0)):
        for number in range(ROUNDS + 1):
            faster = 0.999 if name == "off2" and number % 2 else 1.0
            rows = probe_rows(PERIOD_NS * period * faster, 15.5, own * is_on, 4 + 2 * is_on)
            if number == 0 and is_on:
                rows[0, 2] = 54_000_000
            write_probe(folder, f"{name}-{number}", rows)
            changed = name == "on" and number == 3
            np.save(folder / "tokens" / f"{name}-{number}.npy", np.full((2, 3), 5 + changed))
    for number in range(ROUNDS + 1):
        note(folder, event="round", number=number, batch=128, new=STEPS)
    return folder


def value(out: Path, measured: str) -> str:
    found = [row[1] for row in table.rows_of(out) if measured in row[0]]
    assert len(found) == 1, measured
    return found[0]


def test_cost_is_that_of_the_rounds_after_the_warm_up(tmp_path: Path, cost: Path) -> None:
    # In each round, a third of the steps took 20 µs, the others 40, and one 500.
    assert value(tmp_path, "`EplbState.step`") == "15.5 and 55.5 µs"
    assert value(tmp_path, "own part of it") == "40.0, 500.0, 500 µs of 480 steps"
    assert value(tmp_path, "prepare_forward") == "4.0 and 6.0 µs"
    assert value(tmp_path, "first step") == "54.0, 54.0 ms"


def test_period_is_compared_with_both_engines_that_do_not_record(tmp_path: Path, cost: Path) -> None:
    mean = (0.01 + (1.01 / 0.9995 - 1)) / 2
    assert value(tmp_path, "with over without").startswith(f"{100 * mean:+.2f}% (+1.00 to +1.05) in 4 rounds")
    assert value(tmp_path, "without over without").startswith("-0.05% (")


def test_round_that_one_engine_did_not_end_is_left_out(tmp_path: Path, cost: Path) -> None:
    (cost / "probe" / f"off2-{ROUNDS}-1.npz").unlink()
    assert "in 3 rounds" in value(tmp_path, "with over without")


def test_tokens_that_differ_are_counted_beside_the_control(tmp_path: Path, cost: Path) -> None:
    assert value(tmp_path, "generated tokens") == "4 of 5 rounds (without and without: 5)"


@pytest.mark.parametrize("closes", [True, False])
def test_sessions_that_were_closed_are_counted(tmp_path: Path, cost: Path, closes: bool) -> None:
    for rank in range(2):
        writer = open_writer(cost / "dump", ep_rank=rank)
        writer.record(0, load_of(0, rank), map_of())
        assert writer.flush()
        if closes or rank == 0:
            writer.close()
            continue
        note(cost, event="closed", engine="on", status=0)
        assert value(tmp_path, "orderly") == "1 of 2 sessions closed, 1 sealed"
        writer.close()
    if closes:
        note(cost, event="closed", engine="on", status=None)
        text = "2 of 2 sessions closed, 2 sealed; the engine did not end"
        assert value(tmp_path, "orderly") == text


def test_step_that_was_timed_but_not_recorded_is_counted(tmp_path: Path, cost: Path) -> None:
    for rank in range(2):
        writer = open_writer(cost / "dump", ep_rank=rank)
        for step in range(STEPS * (ROUNDS + 1) - rank):
            if step == 9:
                writer.skip("dummy", step)
            else:
                writer.record(step, load_of(step, rank), map_of())
        writer.close()
    assert value(tmp_path, "that were timed") == "599 of 600"


def tokens_of(step: int) -> int:
    return 100 + step


def placements() -> dict[int, Array]:
    return {step: map_of(i) for i, step in enumerate(CHANGES)}


@pytest.fixture(params=["killed", "sealed"])
def check(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Two ranks record 40 steps and 5 more while they are killed; step 20 is rejected on rank 1."""
    folder = part_folder(tmp_path, "check")
    log = "".join(
        f"Engine 000: Iteration({step}): 0 context requests, 0 context tokens, {tokens_of(step)} generation "
        f"requests, {tokens_of(step)} generation tokens, iteration\n"
        for step in range(CHECKED + 5)
    )
    (folder / "on.log").write_text(log)
    writers = [open_writer(folder / "dump", ep_rank=rank) for rank in range(2)]
    for rank, writer in enumerate(writers):
        for step in range(CHECKED + 5):
            load = load_of(step, rank)
            if (step, rank) == (20, 1):
                load = load[:, :-1]
            generation = sum(step >= first for first in CHANGES) - 1
            writer.record(step, load, map_of(generation), tokens_of(step) + (step == 25))
        assert writer.flush()
    for name in "off", "off2":
        write_probe(folder, f"{name}-0", np.ones((CHECKED // 2, 5), np.int64), {
            step: one for step, one in placements().items() if step < CHECKED // 2
        })  # fmt: skip
        write_probe(folder, f"{name}-1", np.ones((CHECKED // 2, 5), np.int64), placements())
    for number in range(2):
        note(folder, event="round", number=number, batch=64, new=CHECKED // 2)
    lines = log.splitlines(keepends=True)
    note(folder, event="before the kill", log_bytes=len("".join(lines[:CHECKED])))
    if request.param == "sealed":
        for writer in writers:
            writer.close()
    yield folder
    for writer in writers:
        writer.close()


def test_steps_and_tokens_are_compared_with_the_log_up_to_the_kill(tmp_path: Path, check: Path) -> None:
    assert value(tmp_path, "iteration log") == "79 of 80 on 2 ranks"
    # Step 25 of both ranks has another number of tokens, and a rejected step has none.
    assert value(tmp_path, "tokens of a step") == "77 of 80"


def test_recorded_placements_are_compared_with_those_of_the_engine_without_it(
    tmp_path: Path, check: Path
) -> None:
    assert value(tmp_path, "placements") == "3 of 3 (without and without: 3 of 3)"


@pytest.mark.parametrize("wrong", ["experts", "step"])
def test_placement_that_differs_is_counted(tmp_path: Path, check: Path, wrong: str) -> None:
    found = placements()
    if wrong == "experts":
        found[CHANGES[2]] = map_of(7)
    else:
        found[CHANGES[2] + 1] = found.pop(CHANGES[2])
    write_probe(check, "off-1", np.ones((CHECKED // 2, 5), np.int64), found)
    expected = "2 of 3" if wrong == "experts" else "2 of 4"
    assert value(tmp_path, "placements") == f"{expected} (without and without: {expected})"


def test_age_of_the_last_step_is_that_at_the_kill(tmp_path: Path, check: Path) -> None:
    sessions = table.recording(check / "dump")
    assert [one.steps[-1].step for one in sessions] == [CHECKED + 4] * 2
    latest = max(one.steps[-1].time_ns for one in sessions)
    note(check, event="killed", time_ns=latest + 250_000_000)
    ages = [(latest + 250_000_000 - one.steps[-1].time_ns) / 1e9 for one in sessions]
    assert min(ages) == 0.25
    expected = ", ".join(f"{age:.2f}" for age in ages)
    assert value(tmp_path, "`kill -9`") == f"{expected} s before the kill"


def test_idle_ranks_are_compared_with_the_log_of_their_own_engine(tmp_path: Path) -> None:
    """Data parallelism: rank 1 is idle in step 1, and vLLM logs no iteration of its engine then."""
    folder = part_folder(tmp_path, "check", dp=2)
    (folder / "on.log").write_text(LOG)
    for rank, tokens in ((0, [32, 512]), (1, [3, None])):
        writer = open_writer(folder / "dump", ep_rank=rank)
        for step, n in enumerate(tokens):
            if n is None:
                writer.skip("dummy", step)
            else:
                writer.record(step, load_of(step, rank), map_of(), n)
        writer.close()
    note(folder, event="before the kill", log_bytes=len(LOG))
    assert value(tmp_path, "iteration log") == "3 of 3 on 2 ranks, and 1 dummy steps"
    assert value(tmp_path, "tokens of a step") == "3 of 3"
    assert "admits requests" in value(tmp_path, "placements")


def test_placements_of_asynchronous_engines_are_not_compared(tmp_path: Path) -> None:
    part_folder(tmp_path, "check", use_async=True)
    assert value(tmp_path, "placements").startswith("not compared: asynchronous EPLB")


def test_stored_results_are_printed_as_one_table(
    cost: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.print_table(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "vLLM 0.33.0 (model runner V2), torch 2.11.0, 2 × NVIDIA H100, TP 2, DP 1; "
        "24 layers × 64 experts + 8 redundant"
    )
    assert lines[2] == "| measured | value | goal |"
    assert len(lines) == 4 + len(table.rows_of(tmp_path))
    assert all(line.count("|") == 4 for line in lines[2:])


def test_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no results"):
        table.print_table(tmp_path)
