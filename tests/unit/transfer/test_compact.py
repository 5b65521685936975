"""`compact`: the new run has the same figures as the old one, and appears whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import steady_clock
from helpers import (
    Array,
    _rounded,
    assert_golden,
    cli,
    load_of,
    manifest,
    map_of,
    one_error,
    open_writer,
    write,
)
from s3 import S3

from eplb_analyze import open_run
from eplb_analyze.atomic import new_run
from eplb_analyze.cli.views.compact import _gain
from eplb_analyze.storage.path import storage_path
from eplb_analyze.transfer import compact as compacting
from eplb_analyze.transfer.compact import Side, compact_run
from eplb_dump.format.schema import SESSION_FILE


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ranks with steps of every status, changing placements, phases and tokens."""
    root = tmp_path_factory.mktemp("dump")
    rng = np.random.default_rng(3)
    for rank in range(3):
        with steady_clock(50), open_writer(
            root, model="org/moe", ep_rank=rank, ep_size=3, num_logical_experts=6, segment_steps=8,
            moe_layers=[3, 5], engine="an engine", engine_config={"eplb": {"window": 10}}, ranks_per_node=2,
            token_replication=2,
        ) as writer:  # fmt: skip
            for step in range(60):
                if step % 10 == 4:
                    writer.skip("dummy")  # all ranks
                elif step % 10 == 5 and rank == 1:
                    writer.skip("dummy")  # one rank
                elif step == 33 and rank == 2:
                    writer.skip("dropped")
                else:
                    slots = (np.arange(9) + np.arange(2)[:, None] * (step // 20)) % 6
                    load = rng.integers(0, 100_000 if step == 50 else 90, (2, 9))
                    phase = ("prefill", "decode")[step % 2]
                    writer.record(
                        step, load, slots, num_tokens=None if step == 7 else 100 + rank, phase=phase
                    )
    return root


def figures(where: Path, run: str | None = None) -> dict[str, Any]:
    """Everything that the library reports about a run, except the recording ranks."""
    opened = open_run(where, run)
    return {
        "loads": opened.loads().rows(),
        "placements": opened.placements().rows(),
        "steps": opened.steps().drop("ranks_recorded", "state").rows(),
        "states": opened.steps()["state"].to_list(),
        "run": {**vars(opened.info), "run_id": 0, "scope": 0, "origin": 0},
    }


def compact(source: Path | str, to: Path, *arguments: str) -> dict[str, Any]:
    result = cli("compact", *arguments, "--json", source, to)
    assert (result.returncode, result.stderr) == (0, "")
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_all_figures_stay_the_same(dump: Path, tmp_path: Path) -> None:
    before = {f: f.read_bytes() for f in dump.rglob("*") if f.is_file()}
    document = compact(dump, tmp_path)
    assert {f: f.read_bytes() for f in dump.rglob("*") if f.is_file()} == before
    old, new = figures(dump), figures(tmp_path)
    assert old["states"].count("incomplete") == 1
    assert new["states"] == ["dropped" if state == "incomplete" else state for state in old["states"]]
    assert len(old["loads"]) == 2 * (60 - 6 - 1)
    without = [
        row if state != "incomplete" else (*row[:2], None, *row[3:])
        for row, state in zip(old["steps"], old["states"], strict=True)
    ]
    assert new["steps"] == without
    for key in ("loads", "placements", "run"):
        assert new[key] == old[key], key
    run = open_run(tmp_path)
    assert (run.info.run_id, run.info.scope) == ("r-compact", "global")
    assert (document["before"]["sessions"], document["after"]["sessions"]) == (3, 1)
    assert document["after"]["files"] == 6 < document["before"]["files"]
    assert document["steps"] == {"recorded": 53, "dummy": 6, "not_sampled": 0, "dropped": 1, "rejected": 0}
    assert document["incomplete"] == 1
    assert list(document["unknown"]) == ["incomplete_steps"]
    assert "rank 2 dropped in 1" in document["unknown"]["incomplete_steps"]
    sizes = [f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()]
    assert document["after"]["bytes"] == sum(sizes)


def test_loads_are_the_sums_over_ranks(tmp_path: Path) -> None:
    truth: dict[int, Array] = {}
    rng = np.random.default_rng(5)
    for rank in range(2):
        with open_writer(tmp_path / "dump", ep_rank=rank, segment_steps=4) as writer:
            for step in range(10):
                load = rng.integers(0, 2**30, (3, 8))
                truth[step] = truth.get(step, 0) + load
                writer.record(step, load, np.arange(8) % 6 + np.zeros((3, 1), int))
    compact(tmp_path / "dump", tmp_path / "new")
    for row in open_run(tmp_path / "new").loads().iter_rows(named=True):
        assert row["load"] == truth[row["step"]][row["layer"]].tolist()


def test_commands_print_the_same_figures(dump: Path, tmp_path: Path) -> None:
    compact(dump, tmp_path)
    for command in ("summary", "layer 3", "ranks", "experts", "rearrangements", "timeline --bins 4"):
        texts = [cli(*command.split(), "--json", where).stdout for where in (dump, tmp_path)]
        old, new = (json.loads(_rounded(text)) for text in texts)
        for document in (old, new):
            document.pop("run")
            if command == "summary":
                document.pop("ranks")
                for key in ("window_steps", "persistent_share"):  # windows end at segment boundaries
                    document["loss"].pop(key)
            for key in ("incomplete", "dropped"):
                document.get("steps", {}).pop(key, None) if isinstance(document.get("steps"), dict) else None
        assert new == old, command
    one_error(cli("traffic", tmp_path), 3, "does not show which rank sent which tokens")
    checked = json.loads(cli("check", "--json", tmp_path).stdout)
    (made,) = [f["text"] for f in checked["findings"] if f["code"] == "imported"]
    assert "made by compact from run=r/model=org--moe" in made
    assert "incomplete steps" in made
    assert "made by compact" in cli("summary", tmp_path).stdout


def test_each_shape_gets_its_own_segments(tmp_path: Path) -> None:
    """EP 2, then EP 3: the new run has one segment of each."""
    for rank in range(3):
        with open_writer(
            tmp_path / "dump", ep_rank=rank, segment_steps=8, ep_size=2 if rank < 2 else 3
        ) as writer:
            for step in range(0 if rank < 2 else 20, 40):
                size, slots = (2, 8) if step < 20 else (3, 9)
                load = np.full((3, slots), step + rank)
                writer.record(step, load, np.arange(slots) % 6 + np.zeros((3, 1), int), ep_size=size)
    compact(tmp_path / "dump", tmp_path / "new")
    old, new = figures(tmp_path / "dump"), figures(tmp_path / "new")
    assert old["states"] == ["recorded"] * 40
    assert {key: new[key] for key in old} == old
    (folder,) = (tmp_path / "new").glob("run=*/model=*/rank=*/session=*")
    shapes = [f.header["shape"]["ep_size"] for f in manifest(folder) if f.kind == "sealed"]
    assert shapes == [2, 3]


def test_many_small_segments_become_one(tmp_path: Path) -> None:
    for rank in range(2):
        with open_writer(tmp_path / "dump", ep_rank=rank, segment_steps=4) as writer:
            for step in range(200):
                writer.record(step, load_of(step, rank), map_of(step // 100))
    document = compact(tmp_path / "dump", tmp_path / "new")
    assert figures(tmp_path / "new")["loads"] == figures(tmp_path / "dump")["loads"]
    assert document["before"]["files"] > 200
    assert document["after"]["files"] == 6
    assert document["after"]["bytes"] < document["before"]["bytes"] / 5


def test_segment_size_is_bounded(dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compacting, "SEGMENT_BYTES", 10 * 2 * 9 * 4)
    monkeypatch.setattr(compacting, "SEGMENT_STEPS", 16)
    compact_run(storage_path(dump), tmp_path)
    (folder,) = tmp_path.glob("run=*/model=*/rank=*/session=*")
    spans = [(f.header["first_step"], f.header["last_step"]) for f in manifest(folder) if f.kind == "sealed"]
    assert len(spans) >= 6
    assert max(last - first for first, last in spans) < 10
    assert figures(tmp_path)["loads"] == figures(dump)["loads"]


def test_run_in_a_bucket_is_compacted(dump: Path, s3: S3, tmp_path: Path) -> None:
    path = s3.put(dump)
    compact(s3.address(f"{path}/run=r"), tmp_path, "--run-id", "another")
    assert open_run(tmp_path).info.run_id == "another"
    assert figures(tmp_path)["loads"] == figures(dump)["loads"]


def test_compacting_into_the_same_dump_adds_a_run(dump: Path, tmp_path: Path) -> None:
    """The new run appears beside the old one, never in its place."""
    root = shutil.copytree(dump, tmp_path / "dump")
    compact(root, root, "--run", "r")
    compact(root, root, "--run", "r")
    assert sorted(p.name for p in root.iterdir()) == ["run=r", "run=r-compact", "run=r-compact-2"]
    assert figures(root, "r-compact") == figures(root, "r-compact-2")
    again = compact(root, tmp_path / "new", "--run", "r-compact")  # of a compacted run
    assert again["after"]["run_id"] == "r-compact-compact"
    assert figures(tmp_path / "new")["loads"] == figures(dump)["loads"]


# ---- a damaged or incomplete run must not look complete


def write_with_killed_rank(root: Path, last: int, steps: int = 60) -> None:
    """Two ranks; the second has no step after ``last``, and the engine continues."""
    for rank in range(2):
        with open_writer(root, ep_rank=rank, segment_steps=8) as writer:
            for step in range(steps if rank == 0 else last + 1):
                writer.record(step, load_of(step, rank), map_of())


def test_run_with_many_incomplete_steps_is_refused(tmp_path: Path) -> None:
    root, to = tmp_path / "dump", tmp_path / "new"
    write_with_killed_rank(root, 23)
    assert cli("summary", root).returncode == 3
    said = ("36 steps (60.0%) lack a rank: rank 1 absent in 36", "would hide", "--steps 0-23")
    one_error(cli("compact", root, to), 3, str(root), *said)
    assert not to.exists()
    # The fix that the message suggests works.
    assert cli("copy", "--steps", "0-23", root, tmp_path / "part").returncode == 0
    document = compact(tmp_path / "part", to)
    assert (document["steps"]["recorded"], document["incomplete"]) == (24, 0)
    assert "segments that contain steps 0 to 23" in document["unknown"]["other_steps"]
    assert figures(to)["loads"] == open_run(root).loads((0, 24)).rows()


def test_run_without_one_of_its_ranks_is_refused(tmp_path: Path) -> None:
    """EP 2, then EP 3 for two steps; the third rank wrote nothing."""
    root = tmp_path / "dump"
    for rank in range(2):
        with open_writer(root, ep_rank=rank, segment_steps=8) as writer:
            for step in range(60):
                size, slots = (2, 8) if step < 58 else (3, 9)
                load = np.full((3, slots), step + rank)
                writer.record(step, load, np.arange(slots) % 6 + np.zeros((3, 1), int), ep_size=size)
    assert cli("summary", root).returncode == 3
    one_error(
        cli("compact", root, tmp_path / "new"), 3, "rank 2 (of 3 ranks) wrote nothing", "none is written"
    )


def test_cause_of_few_incomplete_steps_stays_known(dump: Path, tmp_path: Path) -> None:
    compact(dump, tmp_path)
    old, new = (cli("check", "--json", where) for where in (dump, tmp_path))
    assert old.returncode == new.returncode == 1
    texts = {f["code"]: f["text"] for f in json.loads(new.stdout)["findings"]}
    said = "1 step (1.9%) lacked a rank in the original run: rank 2 dropped in 1"
    assert texts["incomplete_steps"] == said
    assert "queue" not in texts["dropped_steps"]
    old, new = (cli("summary", where) for where in (dump, tmp_path))
    assert old.returncode == new.returncode == 0
    for result in (old, new):
        assert "rank 2 dropped in 1" in result.stderr
    # It is still known after the run is compacted again.
    compact(tmp_path, tmp_path / "again")
    assert cli("check", tmp_path / "again").returncode == 1


def test_incomplete_tail_stays_a_warning(tmp_path: Path) -> None:
    write_with_killed_rank(tmp_path / "dump", 57)
    compact(tmp_path / "dump", tmp_path / "new")
    for where in (tmp_path / "dump", tmp_path / "new"):
        checked = json.loads(cli("check", "--json", where).stdout)
        found = {f["code"]: f["severity"] for f in checked["findings"]}
        assert found["incomplete_end"] == "warning"
        assert not {"incomplete_steps", "rank_stopped"} & found.keys()


# ---- refusals, which leave nothing behind


@pytest.mark.parametrize(
    "name", ["loads-000001.parquet", "steps-000001.parquet", "placements-000000.parquet"]
)
@pytest.mark.parametrize("fault", ["flipped", "gone"])
def test_damaged_run_is_refused(name: str, fault: str, dump: Path, tmp_path: Path) -> None:
    root = shutil.copytree(dump, tmp_path / "dump")
    victim = next(root.glob(f"run=*/model=*/rank=00001/session=*/{name}"))
    data = bytearray(victim.read_bytes())
    data[20] ^= 1
    victim.unlink() if fault == "gone" else victim.write_bytes(data)
    one_error(cli("compact", root, tmp_path / "new"), 3, name, "none is written")
    assert not [*(tmp_path / "new").rglob("*")] if (tmp_path / "new").exists() else True


def test_run_without_a_complete_step_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "dump", ranks=1)
    one_error(cli("compact", tmp_path / "dump", tmp_path / "new"), 3, "no step is complete")
    assert not (tmp_path / "new").exists()


def test_sums_above_the_largest_count_of_a_rank_are_kept(tmp_path: Path) -> None:
    for rank in range(2):
        with open_writer(tmp_path / "dump", ep_rank=rank) as writer:
            for step in range(3):
                writer.record(step, np.full((1, 8), 2**31 - 1 - step), np.arange(8)[None] % 6)
    assert cli("compact", tmp_path / "dump", tmp_path / "new").returncode == 0
    assert open_run(tmp_path / "new").loads()["load"].to_list() == [
        [2 * (2**31 - 1 - step)] * 8 for step in range(3)
    ]


def test_taken_or_invalid_run_id_is_refused(dump: Path, tmp_path: Path) -> None:
    compact(dump, tmp_path, "--run-id", "x")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    one_error(cli("compact", "--run-id", "x", dump, tmp_path), 2, "already exists", "--run-id")
    one_error(cli("compact", "--run-id", "../x", dump, tmp_path), 2, "--run-id")
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_unwritable_target_is_one_error(dump: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one_error(cli("compact", dump, tmp_path / "file/x"), 3, "file", "Not a directory")


def test_unfinished_run_of_a_live_process_is_kept(dump: Path, tmp_path: Path) -> None:
    with new_run(tmp_path, None, "r-compact") as living:
        (living.root / "evidence").touch()
        assert compact(dump, tmp_path)["after"]["run_id"] == "r-compact-2"
        one_error(
            cli("compact", "--run-id", "r-compact", dump, tmp_path), 2, "another process is creating it"
        )
        assert (living.root / "evidence").exists()
        (living.root / f"run={living.run_id}/model=org--moe").mkdir(parents=True)
    assert [p.name for p in (tmp_path / "run=r-compact").iterdir()] == ["model=org--moe"]


@pytest.mark.parametrize(
    "inside", ["run=r", "run=r/model=org--moe", "run=r/model=org--moe/rank=00000", "run=r/new/folder"]
)
def test_target_inside_a_run_is_refused_before_anything_is_written(
    inside: str, dump: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(dump, tmp_path / "dump")
    before = sorted(root.rglob("*"))
    one_error(cli("compact", root, root / inside), 2, "is inside run=r", "pass the folder of the dump")
    (tmp_path / "link").symlink_to(root / "run=r")
    one_error(cli("compact", root, tmp_path / "link/x"), 2, "is inside run=r")
    assert sorted(root.rglob("*")) == before


# ---- output


@pytest.mark.parametrize("form", ["text", "json"])
def test_golden_output(form: str, dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dump, "dump")
    result = cli("compact", *["--json"] * (form == "json"), "dump", "new")
    assert (result.returncode, result.stderr) == (0, "")
    text = re.sub(r'"(bytes|summary_seconds)": [\d.e-]+', r'"\1": 0', result.stdout)
    text = re.sub(r"\d+% (smaller|larger)", "0% smaller", text)
    text = re.sub(r"\d\.\d\d +\d\.\d\d s", "0.00   0.00 s", text)
    assert_golden(f"compact.{'txt' if form == 'text' else 'json'}", text)
    assert (next(Path("new").rglob(SESSION_FILE))).exists()


def test_gain_mentions_only_what_changed() -> None:
    def side(files: int, size: int) -> Side:
        return Side("r", 1, files, size, 0.0)

    assert _gain(side(9, 1000), side(5, 250)) == "4 files fewer, 75% smaller; "
    assert _gain(side(5, 1000), side(5, 1100)) == "10% larger; "
    assert _gain(side(4, 1000), side(5, 1001)) == "1 file more; "
    assert _gain(side(5, 1000), side(5, 1000)) == _gain(side(5, 0), side(5, 0)) == ""
