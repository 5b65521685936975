"""The command line in this process: JSON keys, golden output, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import steady_clock
from helpers import assert_golden, cli, one_error, write

from eplb_dump import ExpertLoadWriter
from eplb_dump.format import frames
from eplb_dump.format.schema import MANIFEST_FILE, SESSION_FILE
from eplb_dump.format.session import dump_json

COMMANDS = {"summary": ["summary"], "layer": ["layer", "1"], "check": ["check"]}


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a rearrangement, in which rank 1 recorded 30 of 40 steps; layers 3 and 5."""
    root = tmp_path_factory.mktemp("poor")
    slots = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]])
    for rank, steps in ((0, 40), (1, 30)):
        with steady_clock(50), ExpertLoadWriter(
            root, model="org/moe", num_logical_experts=4, ep_size=2, ep_rank=rank, run_id="poor",
            moe_layers=[3, 5], engine="vllm", engine_config={"eplb_config": {"step_interval": 20}},
        ) as writer:  # fmt: skip
            for step in range(steps):
                hot = 40 + step * 7 % 30
                load = [[hot + 20, 30, 25, 20, 90 - hot, 15], [10, 60, 15, 95 - hot, 5, 15 + hot]]
                writer.record(step, np.array(load), slots, phase="prefill" if step % 4 == 0 else "decode")
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    write(root, step_ms=50)
    return root


def session(root: Path, rank: int = 0) -> Path:
    return next(root.glob(f"run=*/model=*/rank=*{rank}/session=*"))


def unwrapped(result: subprocess.CompletedProcess[str]) -> str:
    """All output, with the paths that `check` wrapped put together again."""
    return result.stderr + result.stdout.replace("\n    ", "")


# ---- what is printed


def test_summary_json_has_the_stable_keys(good: Path) -> None:
    result = cli("summary", "--json", good)
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    run_keys = {"run_id", "model", "engine", "ep_size", "num_layers", "num_logical_experts"}
    assert run_keys | {"num_physical_experts", "scope"} <= set(document["run"])
    assert set(document["steps"]) == {
        "first", "first_time", "last", "last_time", "seen", "recorded", "dummy", "not_sampled", "dropped",
        "rejected", "incomplete", "missing", "retired",
    }  # fmt: skip
    assert set(document["ranks"]) == {"expected", "present", "missing"}
    assert {"mean", "p50", "p5", "min", "min_step"} <= set(document["balancedness"])
    assert {"mean", "p50", "p5", "min", "min_step"} <= set(document["imbalance"])
    assert set(document["metrics"]) == {"vllm", "vllm-legacy", "sglang", "trtllm"}
    assert {"layer", "balancedness", "imbalance"} <= set(document["layers"][0])
    assert {"layer", "logical", "share", "times_mean", "replicas"} <= set(document["hot_experts"][0])
    assert document["rearrangements"] == [20]
    assert isinstance(document["idle_fraction"], float)


def test_layer_json_has_the_stable_keys(good: Path) -> None:
    result = cli("layer", "1", "--step", "30", "--json", good)
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert (document["layer"], document["first_step"], document["last_step"]) == (1, 30, 30)
    assert {"balancedness", "imbalance"} <= set(document)
    assert [set(r) for r in document["ranks"]] == [{"rank", "load"}] * 2
    assert document["run"] == {"run_id": "r", "model": "org/moe"}
    assert set(document["slots"][0]) == {"physical", "rank", "logical", "load"}
    assert {"logical", "load", "share", "replicas"} <= set(document["experts"][0])
    assert sum(s["load"] for s in document["slots"]) == 1200
    assert [s["logical"] for s in document["slots"]] == [0, 1, 2, 3, 2, 1]


def test_check_json_has_the_stable_keys(good: Path) -> None:
    result = cli("check", "--json", good)
    document = json.loads(result.stdout)
    assert (result.returncode, document["ok"], document["findings"]) == (0, True, [])


@pytest.mark.parametrize(
    ("name", "command", "code"),
    [
        ("summary.txt", "summary good", 0),
        ("summary-full.txt", "summary --full good", 0),
        ("summary.json", "summary good", 0),
        ("summary-poor.txt", "summary poor", 3),
        ("summary-poor.json", "summary poor", 3),
        ("layer.txt", "layer 1 good", 0),
        ("layer.json", "layer 1 good", 0),
        ("layer-step.txt", "layer 5 --step 35 poor", 0),
        ("layer-step.json", "layer 5 --step 35 poor", 0),
        ("check.txt", "check good", 0),
        ("check.json", "check good", 0),
        ("check-poor.txt", "check poor", 1),
        ("check-poor.json", "check poor", 1),
    ],
)
def test_golden_output(good: Path, poor: Path, name: str, command: str, code: int) -> None:
    *words, which = command.split()
    form = ["--json"] if name.endswith("json") else []
    dump = {"good": good, "poor": poor}[which]
    result = cli(*words, *form, dump)
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    assert_golden(name, result.stdout.replace(f" {dump}\n", " <dump>\n"))


def test_summary_warns_first_that_eplb_never_acted(good: Path, poor: Path, tmp_path: Path) -> None:
    """For the whole run, whatever --steps says, and not if placements are unknown."""
    never = (
        "The placement and its 2 redundant experts never changed: 40 steps ran with an interval of 20 steps."
    )
    for steps in ([], ["--steps", "5-19"]):
        told = " ".join(cli("summary", *steps, poor).stdout.split())
        assert never in told
        assert "EPLB NEVER ACTED" in told
    part = cli("summary", "--steps", "5-14", good).stdout
    assert "NEVER" not in part
    assert "no rearrangement in these steps" in part
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=4, ep_size=2, scope="global") as writer:
        writer.record(None, np.ones((1, 6), int), None)
    unknown = cli("summary", tmp_path).stdout
    assert "NEVER" not in unknown
    assert "no placement was recorded or readable, so no rearrangement is known" in unknown


def test_run_of_one_rank_has_nothing_to_balance(tmp_path: Path) -> None:
    """Also if the engine says that it does not balance, or that a rearrangement was due."""
    for number, config in enumerate(({}, {"enable_eplb": False}, {"eplb_config": {"step_interval": 5}})):
        folder = tmp_path / str(number)
        with ExpertLoadWriter(
            folder, model="m", num_logical_experts=3, ep_size=1, run_id="r", engine_config=config
        ) as writer:
            for step in range(4000):
                writer.record(step, np.array([[9, 1, 5, 4]]), np.array([[0, 1, 2, 0]]))
                if step % 500 == 0:
                    writer.flush()
        shown = cli("summary", folder)
        assert shown.returncode == 0
        assert "NEVER" not in shown.stdout
        assert "nothing to balance" in " ".join(shown.stdout.split())


def test_formulas_lists_all_formulas_in_both_forms() -> None:
    names = ["balancedness", "imbalance", "vllm", "vllm-legacy", "sglang", "trtllm", "active-experts"]
    document = json.loads(cli("formulas", "--json").stdout)
    assert [m["name"] for m in document["formulas"]] == names
    text = cli("formulas").stdout
    assert all(name in text for name in names)


@pytest.mark.parametrize("command", [["summary"], ["layer", "1", "--step", "3"], ["layer", "0"], ["check"]])
def test_piped_text_fits_80_columns_and_has_no_color(good: Path, command: list[str]) -> None:
    result = cli(*command, good)
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("ep_size", [4, 64])
def test_layer_is_readable_with_few_and_many_ranks(tmp_path: Path, ep_size: int) -> None:
    load = np.arange(ep_size * 4).reshape(1, -1) * 1000
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=ep_size * 4, ep_size=ep_size, scope="global"
    ) as writer:
        writer.record(None, load, np.arange(ep_size * 4).reshape(1, -1))
    result = cli("layer", "0", tmp_path)
    assert result.returncode == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert f"hottest: rank {ep_size - 1} " in result.stdout


def test_dump_defaults_to_the_environment_then_to_the_current_folder(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_argument = cli("summary", good).stdout.replace(f" {good}\n", "\n")
    assert cli("summary", env={"EXPERT_LOAD_DUMP_DIR": str(good)}).stdout == by_argument
    monkeypatch.chdir(good)
    assert cli("summary").stdout == by_argument
    monkeypatch.chdir(next(good.glob("run=*/model=*")))
    assert cli("summary").stdout == by_argument


def test_command_without_a_dump_shows_what_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("layer", "1", "--steps", "3-5")
    one_error(
        result, 2, "no dump", "write `eplb-analyze layer 1 --steps 3-5 /path/to/dump`", "EXPERT_LOAD_DUMP_DIR"
    )
    one_error(cli("compare"), 2, "write `eplb-analyze compare /path/to/dump`")
    assert "Missing argument 'DST'" in cli("copy", tmp_path).stderr


def test_steps_option_limits_the_range(good: Path) -> None:
    document = json.loads(cli("summary", "--steps", "10-14", "--json", good).stdout)
    assert (document["steps"]["first"], document["steps"]["last"], document["steps"]["seen"]) == (10, 14, 5)
    assert document["rearrangements"] == []
    one = cli("summary", "--step", "12", "--json", good).stdout
    assert one == cli("summary", "--steps", "12-12", "--json", good).stdout
    assert json.loads(one)["steps"]["seen"] == 1
    document = json.loads(cli("layer", "1", "--steps", "35-", "--json", good).stdout)
    assert (document["first_step"], document["last_step"], document["steps"]) == (35, 39, 5)


def test_newest_run_is_chosen_and_named(tmp_path: Path) -> None:
    write(tmp_path, run_id="old", steps=3)
    write(tmp_path, run_id="new", steps=4)
    result = cli("summary", "--json", tmp_path)
    assert json.loads(result.stdout)["run"]["run_id"] == "new"
    assert "2 runs" in result.stderr
    assert json.loads(cli("summary", "--run", "old", "--json", tmp_path).stdout)["steps"]["seen"] == 3


def test_larger_model_is_chosen_and_named(tmp_path: Path) -> None:
    write(tmp_path)
    with ExpertLoadWriter(tmp_path, model="draft", num_logical_experts=4, ep_size=2, run_id="r") as writer:
        writer.record(None, np.ones((1, 4), int), np.arange(4).reshape(1, 4))
    result = cli("summary", "--json", tmp_path)
    assert json.loads(result.stdout)["run"]["model"] == "org/moe"
    assert "draft" in result.stderr
    other = cli("check", "--model", "draft", "--json", tmp_path)
    assert "missing_ranks" in other.stdout
    assert json.loads(cli("summary", "--model", "org/moe", "--json", tmp_path).stdout)["steps"]["seen"] == 40


# ---- bad input: one clear line and an exit code


@pytest.mark.parametrize("command", COMMANDS)
class TestBadInput:
    def test_missing_folder_is_an_error(self, command: str, tmp_path: Path) -> None:
        one_error(cli(*COMMANDS[command], tmp_path / "nowhere"), 3, "nowhere", "no such folder")

    def test_empty_folder_is_an_error(self, command: str, tmp_path: Path) -> None:
        one_error(cli(*COMMANDS[command], tmp_path), 3, str(tmp_path), "no run in it")

    def test_file_in_place_of_a_folder_is_an_error(self, command: str, tmp_path: Path) -> None:
        (tmp_path / "f").write_text("x")
        one_error(cli(*COMMANDS[command], tmp_path / "f"), 3, "it is a file")

    def test_unknown_run_lists_the_known_ones(self, command: str, good: Path) -> None:
        one_error(cli(*COMMANDS[command], "--run", "zz", good), 2, "no run 'zz'", "its runs are: r")

    def test_unknown_model_lists_the_known_ones(self, command: str, good: Path) -> None:
        one_error(cli(*COMMANDS[command], "--model", "zz", good), 2, "no model 'zz'", "org/moe")

    def test_newer_major_version_is_rejected(self, command: str, good: Path, tmp_path: Path) -> None:
        root = shutil.copytree(good, tmp_path / "dump")
        for rank in (0, 1):
            path = session(root, rank) / SESSION_FILE
            document = json.loads(path.read_text())
            del document["crc32"]
            path.write_bytes(dump_json({**document, "format_version": "2.0"}))
        one_error(cli(*COMMANDS[command], root), 3, "format 2.0, newer than this program reads", "upgrade")

    def test_unknown_file_is_a_warning(self, command: str, good: Path, tmp_path: Path) -> None:
        root = shutil.copytree(good, tmp_path / "dump")
        (session(root) / "notes.bin").write_bytes(os.urandom(100))
        result = cli(*COMMANDS[command], root)
        assert result.returncode == 0
        assert "notes.bin" in (unwrapped(result) if command == "check" else result.stderr)

    def test_garbage_segment_is_named(self, command: str, good: Path, tmp_path: Path) -> None:
        root = shutil.copytree(good, tmp_path / "dump")
        (session(root) / "loads-000099.parquet").write_bytes(os.urandom(5000))
        self.faulty(command, root, "loads-000099.parquet", still_recorded=40)

    def test_garbage_journal_is_named(self, command: str, good: Path, tmp_path: Path) -> None:
        root = shutil.copytree(good, tmp_path / "dump")
        (session(root) / "journal-000099.frames").write_bytes(os.urandom(5000))
        self.faulty(command, root, "journal-000099.frames", still_recorded=40)

    def test_truncated_segment_is_named(self, command: str, good: Path, tmp_path: Path) -> None:
        root = shutil.copytree(good, tmp_path / "dump")
        path = session(root) / "loads-000001.parquet"
        path.write_bytes(path.read_bytes()[:-100])
        self.faulty(command, root, "loads-000001.parquet", still_recorded=24)

    def test_missing_segment_is_named(self, command: str, good: Path, tmp_path: Path) -> None:
        root = shutil.copytree(good, tmp_path / "dump")
        (session(root) / "loads-000001.parquet").unlink()
        self.faulty(command, root, "loads-000001.parquet", still_recorded=24)

    def test_missing_steps_file_is_named(self, command: str, good: Path, tmp_path: Path) -> None:
        root = shutil.copytree(good, tmp_path / "dump")
        (session(root) / "steps-000001.parquet").unlink()
        self.faulty(command, root, "steps-000001.parquet", still_recorded=24)

    def test_flipped_bit_in_a_page_is_detected(self, command: str, good: Path, tmp_path: Path) -> None:
        root = shutil.copytree(good, tmp_path / "dump")
        path = session(root) / "loads-000001.parquet"
        data = bytearray(path.read_bytes())
        data[len(data) // 4] ^= 4
        path.write_bytes(data)
        # `summary` reads the sums per rank first; whichever page is hit, the segment is left out.
        result = cli(*COMMANDS[command], root)
        assert result.returncode == (1 if command == "check" else 3)
        assert "Traceback" not in result.stderr

    def test_damaged_manifest_is_named(self, command: str, good: Path, tmp_path: Path) -> None:
        root = shutil.copytree(good, tmp_path / "dump")
        path = session(root) / MANIFEST_FILE
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.write_bytes(data)
        result = cli(*COMMANDS[command], root)
        assert result.returncode == (1 if command == "check" else 3)
        assert MANIFEST_FILE in unwrapped(result)

    def test_damaged_session_file_is_named(self, command: str, good: Path, tmp_path: Path) -> None:
        root = shutil.copytree(good, tmp_path / "dump")
        path = session(root) / SESSION_FILE
        path.write_text('{"format": "eplb-dump"}')
        result = cli(*COMMANDS[command], root)  # its content is in other files, too
        assert result.returncode == cli(*COMMANDS[command], good).returncode
        assert SESSION_FILE in unwrapped(result) or command == "layer"
        for other in path.parent.iterdir():
            if other != path:
                other.unlink()
        result = cli(*COMMANDS[command], root)
        # `layer` has no complete step left to show.
        assert result.returncode == (1 if command == "check" else 3)
        assert SESSION_FILE in unwrapped(result) or command == "layer"

    def test_names_cannot_control_the_terminal(self, command: str, tmp_path: Path) -> None:
        write(tmp_path, model="evil\x1b[31m[bold]x[/bold]\n\u202e", engine="[red]e\x07", steps=3)
        result = cli(*COMMANDS[command], tmp_path)
        assert result.returncode == 0
        assert "\x1b" not in result.stdout
        assert "\x07" not in result.stdout
        assert "\u202e" not in result.stdout
        assert "[bold]x[/bold]" in result.stdout.replace("\n", "")

    @staticmethod
    def faulty(command: str, root: Path, name: str, *, still_recorded: int) -> None:
        """The fault is named once, the rest is used, and the exit code reports it."""
        result = cli(*COMMANDS[command], "--json", root)
        assert "Traceback" not in result.stderr
        document = json.loads(result.stdout)
        if command == "check":
            assert result.returncode == 1
            assert [name in f["text"] for f in document["findings"] if f["severity"] == "error"].count(
                True
            ) == 1
        else:
            one_error(result, 3, name)
        if command != "layer":
            assert document["steps"]["recorded"] == still_recorded
        else:
            assert document["steps"] == still_recorded


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layer", "7"], ["no MoE layer 7", "0 to 1"]),
        (["layer", "1", "--step", "999"], ["no step 999", "steps 0 to 39"]),
    ],
)
def test_missing_layer_or_step_is_named_with_what_exists(
    good: Path, arguments: list[str], words: list[str]
) -> None:
    one_error(cli(*arguments, good), 2, *words)


def test_range_without_a_step_is_rejected(good: Path) -> None:
    for command in (["summary"], ["layer", "1"]):
        result = cli(*command, "--steps", "500-599", good)
        one_error(result, 2, "the run has no steps in 500-599", "it has steps 0 to 39")


@pytest.mark.parametrize(
    "arguments",
    [
        ["layer", "x"],
        ["layer"],
        ["layer", "1", "--step", "-4"],
        ["layer", "1", "--step", "4", "--steps", "1-2"],
        ["summary", "--steps", "9"],
        ["summary", "--steps", "9-2"],
        ["summary", "--steps", "1:9"],
        ["summary", "--step", "1", "--steps", "1-9"],
        ["summary", "--json=xml"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(good: Path, arguments: list[str]) -> None:
    result = cli(*arguments, *([good] if arguments != ["layer"] else []))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_step_that_was_not_sampled_says_so(tmp_path: Path) -> None:
    write(tmp_path, interval=10)
    one_error(
        cli("layer", "1", "--step", "15", tmp_path),
        2,
        "step 15",
        "not sampled",
        "the last before it is step 10",
    )


def test_symbolic_link_is_not_followed(good: Path, tmp_path: Path) -> None:
    root = shutil.copytree(good, tmp_path / "dump")
    outside = tmp_path / "outside.parquet"
    victim = session(root) / "loads-000001.parquet"
    victim.rename(outside)
    victim.symlink_to(outside)
    result = cli("summary", root)
    assert result.returncode == 3
    assert "symbolic link" in result.stderr


@pytest.mark.parametrize(
    "name", [SESSION_FILE, MANIFEST_FILE, "loads-000001.parquet", "journal-000099.frames"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_pipe_or_folder_in_place_of_a_file_is_rejected_without_waiting(
    good: Path, tmp_path: Path, name: str, kind: str
) -> None:
    root = shutil.copytree(good, tmp_path / "dump")
    path = session(root) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    result = cli("summary", root)
    assert result.returncode == 3
    assert name in result.stderr
    assert "not a regular file" in result.stderr


@pytest.mark.parametrize(
    "claim", [{"num_logical_experts": 10**9}, {"ep_size": 10**9}, {"moe_layers": list(range(10_000))}]
)
def test_absurd_metadata_is_rejected(good: Path, tmp_path: Path, claim: dict[str, Any]) -> None:
    root = shutil.copytree(good, tmp_path / "dump")
    for rank in (0, 1):
        path = session(root, rank) / SESSION_FILE
        document = json.loads(path.read_text())
        del document["crc32"]
        path.write_bytes(dump_json({**document, **claim}))
    one_error(cli("summary", root), 3, "session metadata")


def test_manifest_with_false_shape_is_rejected(good: Path, tmp_path: Path) -> None:
    """The checksums are right, but lists are shorter than the manifest says."""
    root = shutil.copytree(good, tmp_path / "dump")
    for rank in (0, 1):
        path = session(root, rank) / MANIFEST_FILE
        with path.open("rb") as file:
            *found, _ = frames.scan(file, path.stat().st_size)
        data = b""
        for frame in found:
            assert isinstance(frame, frames.Frame)
            header = frame.header
            if frame.kind == "sealed":
                header = {**header, "shape": {**header["shape"], "num_physical_experts": 60_000}}
            data += frames.encode(frame.kind, header)
        path.write_bytes(data)
    result = cli("summary", root)
    assert result.returncode == 3
    assert "the lengths of its lists do not match the manifest" in result.stderr


def test_frame_of_absurd_size_is_rejected(good: Path, tmp_path: Path) -> None:
    root = shutil.copytree(good, tmp_path / "dump")
    folder = session(root)
    head = frames.HEAD.pack(frames.MAGIC, 0xFFFFFFF0, 0, 0)[:12]
    (folder / "journal-000099.frames").write_bytes(head + b"\0\0\0\0")
    result = cli("summary", root)
    assert result.returncode == 3
    assert "journal-000099.frames" in result.stderr


def test_numbers_with_too_many_digits_are_usage_errors(good: Path) -> None:
    many = "9" * 5000
    assert cli("summary", "--steps", f"0-{many}", good).returncode == 2
    assert cli("ranks", "--ranks-per-node", many, good).returncode == 2
    assert cli("traffic", "--ranks-per-node", many[:30], good).returncode == 2


def test_run_folder_that_is_a_symbolic_link_is_named(good: Path, tmp_path: Path) -> None:
    (tmp_path / "run=r").symlink_to(next(good.glob("run=*")))
    one_error(cli("summary", tmp_path), 3, "no run in it", "run=r: a symbolic link, which is not followed")


def test_policy_that_a_recording_names_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--policy module:function` imports code that the user names; a recording may come from anyone."""
    (tmp_path / "named_by_recording.py").write_text("import pathlib; pathlib.Path('imported').touch()")
    monkeypatch.chdir(tmp_path)
    config = {"eplb_config": {"policy": "named_by_recording:policy", "step_interval": 10, "window_size": 10}}
    write(tmp_path / "dump", engine="vllm", engine_config=config)
    for command in ("summary", "replay", "advise"):
        assert cli(command, "dump").returncode == 0
    assert not Path("imported").exists()
    one_error(cli("replay", "--policy", "named_by_recording:policy", "dump"), 2, "has no function policy")
    assert Path("imported").exists()


def test_phase_name_cannot_control_the_terminal(tmp_path: Path) -> None:
    """Our writer rejects such a name, but a dump may come from another one."""
    write(tmp_path, ranks=1, scope="global", ep_size=2)
    folder = session(tmp_path)
    write_as_journal(folder, "\x1b[2J\x9b")
    for command in (["summary", "--full"], ["layer", "1", "--step", "4"]):
        result = cli(*command, tmp_path)
        assert "\\x1b[2J\\x9b" in result.stdout
        assert not {c for c in result.stdout if not c.isprintable()} - {"\n"}


def write_as_journal(folder: Path, phase: str) -> None:
    """Replace the files of a session by a journal of eight steps of this phase."""
    with (folder / MANIFEST_FILE).open("rb") as file:
        opening = next(frames.scan(file, 1 << 20))
    assert isinstance(opening, frames.Frame)
    for path in folder.glob("*-0000*.parquet"):
        path.unlink()
    (folder / MANIFEST_FILE).unlink()
    step = np.arange(8, dtype=np.int64)
    load = np.arange(96, dtype=np.uint8).reshape(2, 8, 6)
    rows = dict.fromkeys(("step", "time_ns", "monotonic_ns", "num_tokens"), step)
    rows |= {"status": np.zeros(8, np.uint8), "phase": np.zeros(8, np.int16)}
    (folder / "journal-000000.frames").write_bytes(
        frames.encode("session", {**opening.header, "seq": 0})
        + frames.encode("loads", {"ep_size": 2}, {"step": step, "load": load})
        + frames.encode("steps", {"phases": [phase]}, rows)
    )
