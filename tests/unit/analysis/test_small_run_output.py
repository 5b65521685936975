"""`ranks`, `timeline` and `placement`: the output that is golden, and how they refuse what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import assert_golden, cli, one_error
from small_run import Truth, write


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("ranks.txt", "ranks"),
        ("ranks.json", "ranks"),
        ("ranks-by-node.txt", "ranks --by node"),
        ("timeline.txt", "timeline --bins 10"),
        ("timeline.json", "timeline --bins 10"),
        ("placement.txt", "placement --experts"),
        ("placement-against.txt", "placement --against 11"),
        ("placement-layer.txt", "placement --layer 3 --step 12 --against 9 --experts"),
        ("placement-layer.json", "placement --layer 3 --step 12 --against 9"),
    ],
)
def test_output_is_golden(local: Truth, name: str, command: str) -> None:
    form = ["--json"] if name.endswith("json") else []
    result = cli(*command.split(), *form, local.root)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert_golden(name, result.stdout)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ranks --steps 50-59", ["the run has no steps in 50-59"]),
        ("ranks --run zz", ["no run 'zz'"]),
        ("timeline --layer 4", ["no MoE layer 4", "3, 5"]),
        ("timeline --steps 50-59", ["the run has no steps in 50-59"]),
        ("timeline --model zz", ["no model 'zz'"]),
        ("placement --layer 4", ["no MoE layer 4"]),
        ("placement --step 30", ["no step 30", "steps 0 to 29"]),
        ("placement --against 99", ["no step 99", "steps 0 to 29"]),
    ],
)
def test_something_not_in_the_dump_is_a_usage_error(local: Truth, command: str, words: list[str]) -> None:
    one_error(cli(*command.split(), local.root), 2, *words)


@pytest.mark.parametrize("command", ["ranks", "timeline"])
def test_range_without_complete_step_is_unusable(local: Truth, command: str) -> None:
    one_error(cli(command, "--steps", "6-7", local.root), 3, "no step of this range is complete")


@pytest.mark.parametrize(
    "command",
    [
        "ranks --by x",
        "ranks --ranks-per-node 0",
        "ranks --steps 9",
        "timeline --formula x",
        "timeline --bins 0",
    ],
)
def test_invalid_option_is_a_usage_error(local: Truth, command: str) -> None:
    result = cli(*command.split(), local.root)
    assert result.stdout == ""
    one_error(result, 2, command.split()[1])


@pytest.mark.parametrize("command", ["ranks", "timeline"])
def test_damaged_segment_is_left_out(tmp_path: Path, command: str) -> None:
    write(tmp_path)
    victim = sorted(tmp_path.glob("run=*/model=*/rank=00001/session=*/loads-*.parquet"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    result = cli(command, "--json", tmp_path)
    one_error(result, 3, victim.name)
    steps = json.loads(result.stdout)["steps"]
    # Of 30 steps one is dummy and one incomplete, both in the first segment of eight.
    assert (steps["recorded"], steps["incomplete"]) == (20, 9)
