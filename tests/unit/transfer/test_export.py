"""`export`: independent readers check the files: the engines' rules, DuckDB, csv, numpy, PyYAML."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from clocks import steady_clock
from helpers import ROOT, arrays, assert_golden, cli, one_error, without_times

from eplb_analyze import atomic, open_run
from eplb_analyze.cli.commands.export import LoadFormat, Target
from eplb_analyze.errors import UsageError
from eplb_analyze.policies.policy import POLICIES, Problem
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.replay.replay import replay_run
from eplb_analyze.transfer.exporters import loads as long_form
from eplb_analyze.transfer.exporters import vllm_ascend
from eplb_analyze.transfer.exporters.engines import ENGINES, sglang, trtllm, vllm_mapping
from eplb_analyze.transfer.exporters.loads import export_loads
from eplb_analyze.transfer.exporters.placement import Placement
from eplb_analyze.transfer.exporters.placements import policy_placement, recorded_placement
from eplb_analyze.transfer.importers.placement_files import read_placement
from eplb_dump import ExpertLoadWriter

NUMBERS, LOGICAL, SLOTS, RANKS, STEPS, HIDDEN = [1, 2, 4], 6, 8, 2, 40, 6
#: Rank 1 does not record step 13; rank 0 is idle in step 7, all ranks in step 30.
INCOMPLETE, IDLE, ALL_IDLE = 13, 7, 30
SAMPLES = ROOT.parent / "shared/samples"
Array = np.ndarray[Any, np.dtype[np.int64]]

A = [0, 1, 2, 3, 4, 5, 0, 1]
B = [5, 4, 3, 2, 1, 0, 5, 4]
#: Rank 0 has two replicas of expert 1.
DOUBLE = [1, 1, 2, 3, 0, 4, 5, 2]


def placement(step: int) -> Array:
    return np.array([B if step >= 20 else A, A if step >= 25 else DOUBLE, A])


def part(rank: int, step: int) -> Array:
    return np.random.default_rng(100 * step + rank).poisson(30, (3, SLOTS)) * (1 + np.arange(SLOTS))


def record(root: Path, **options: Any) -> Path:
    defaults: dict[str, Any] = {
        "model": "org/moe", "num_logical_experts": LOGICAL, "ep_size": RANKS, "run_id": "r",
        "moe_layers": NUMBERS, "segment_steps": 16,
    }  # fmt: skip
    for rank in range(RANKS):
        with steady_clock(50), ExpertLoadWriter(root, ep_rank=rank, **{**defaults, **options}) as writer:
            for step in range(STEPS):
                if step == INCOMPLETE and rank == 1:
                    writer.skip("dropped")
                elif step == ALL_IDLE or (step, rank) == (IDLE, 0):
                    writer.skip("dummy")
                else:
                    writer.record(step, part(rank, step), placement(step))
    return root


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("export") / "dump")


def complete(low: int = 0, high: int = STEPS) -> list[int]:
    return [s for s in range(low, high) if s not in (INCOMPLETE, ALL_IDLE)]


def physical(step: int) -> Array:
    return np.sum([part(r, step) for r in range(RANKS) if (step, r) != (IDLE, 0)], axis=0)


def logical(steps: list[int]) -> Array:
    out = np.zeros((3, LOGICAL), np.int64)
    for step in steps:
        for layer, slots in enumerate(placement(step)):
            for slot, expert in enumerate(slots):
                out[layer, expert] += physical(step)[layer, slot]
    return out


def write_placement(dump: Path, file: Path, target: str, *options: str | int) -> dict[str, Any]:
    command = ["export", "placement", "--for", target, "-o", str(file), "--json", *map(str, options)]
    result = cli(*command, dump)
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert document["bytes"] == file.stat().st_size
    return document


# ---- readers that follow the engines' rules and use none of our code


def read_sglang(file: Path) -> Array:
    data = json.loads(file.read_text())
    assert list(data) == ["physical_to_logical_map"]
    return np.array(data["physical_to_logical_map"])


def read_trtllm(file: Path) -> dict[int, list[int]]:
    """``MoeLoadBalancerConfig`` forbids other keys; TensorRT-LLM makes the same checks of a layer."""
    data = yaml.safe_load(file.read_text())
    assert set(data) == {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert data["layer_updates_per_iter"] == 0
    found: dict[int, list[int]] = data["initial_global_assignments"]
    for layer, slots in found.items():
        assert isinstance(layer, int)
        assert len(slots) == data["num_slots"]
        assert set(slots) == set(range(LOGICAL))
    return found


def read_vllm_mapping(file: Path) -> Array:
    """One record with the engine's own sizes and layers counted from 0."""
    (line,) = file.read_text().splitlines()
    record = json.loads(line)
    assert (record["record_type"], record["version"]) == ("eplb_initial_mapping", 1)
    assert record["num_redundant_experts"] == record["num_slots"] - LOGICAL
    rows = [record["initial_global_assignments"][str(i)] for i in range(3)]
    assert len(record["initial_global_assignments"]) == 3
    assert {len(row) for row in rows} == {record["num_slots"]}
    assert all(set(row) == set(range(LOGICAL)) for row in rows)
    return np.array(rows)


def read_vllm_ascend(text: str) -> Array:
    """The slots that tokens are sent to, computed as vllm-ascend's ``init_eplb_config`` does.

    Each rank's slots as it numbers them must hold the expert asked for.
    """
    data = json.loads(text)
    assert data["moe_layer_count"] == len(data["layer_list"])
    rows = []
    for layer in data["layer_list"]:
        assert len(layer["device_list"]) == layer["device_count"]
        local = np.array([device["device_expert"] for device in layer["device_list"]])
        experts = local.max() + 1
        maps = np.full((len(local), experts), -1)
        for expert_map, own in zip(maps, local, strict=True):
            expert_map[own] = np.arange(len(own))
        valid = (maps[0] >= 0).sum()
        for expert in range(experts):
            ranks = np.flatnonzero(maps[:, expert] >= 0)
            assert len(ranks)
            for rank in ranks:
                slot = maps[rank, expert] + rank * valid
                assert local.reshape(-1)[slot] == expert, f"the tokens of {expert} go to another expert"
        assert (maps >= 0).sum() == local.size, "a slot that no expert's tokens go to"
        rows.append(local.reshape(-1))
    return np.array(rows)


# ---- recorded placements


@pytest.mark.parametrize("step", [10, 24, None])
def test_recorded_placement_is_written_for_each_engine(step: int | None, dump: Path, tmp_path: Path) -> None:
    expected = placement(STEPS if step is None else step)
    at = [] if step is None else ["--step", step]
    document = write_placement(dump, tmp_path / "s.json", "sglang", *at, "--num-hidden-layers", HIDDEN)
    rows = read_sglang(tmp_path / "s.json")
    assert rows.shape == (HIDDEN, SLOTS)
    assert np.array_equal(rows[NUMBERS], expected)
    # Layers missing in the dump get SGLang's initial placement: each expert, then the first ones again.
    assert document["filled_layers"] == [0, 3, 5]
    assert rows[document["filled_layers"]].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]] * 3

    write_placement(dump, tmp_path / "t.yaml", "trtllm", *at)
    assert read_trtllm(tmp_path / "t.yaml") == dict(zip(NUMBERS, expected.tolist(), strict=True))

    write_placement(dump, tmp_path / "m.jsonl", "vllm-mapping", *at)
    assert np.array_equal(read_vllm_mapping(tmp_path / "m.jsonl"), expected)

    document = write_placement(dump, tmp_path / "p.json", "json", *at)
    plain = json.loads((tmp_path / "p.json").read_text())
    assert plain["physical_to_logical_map"] == expected.tolist()
    assert plain["layers"] == NUMBERS
    assert (plain["ep_size"], plain["num_logical_experts"], plain["num_physical_experts"]) == (2, 6, 8)
    assert plain["origin"]["step"] == (STEPS - 1 if step is None else step)
    origin = {k: v for k, v in plain["origin"].items() if k not in document["run"]}
    assert origin == without_times(document["origin"])


def test_duplicate_expert_on_a_device_is_refused_or_repaired(dump: Path, tmp_path: Path) -> None:
    write_placement(dump, tmp_path / "fine.json", "vllm-ascend", "--step", 30)
    assert np.array_equal(read_vllm_ascend((tmp_path / "fine.json").read_text()), placement(30))
    file = tmp_path / "double.json"
    command = ["export", "placement", "--for", "vllm-ascend", "-o", str(file), "--step", "10", str(dump)]
    one_error(cli(*command), 2, "device 0 holds expert 1 twice in layer 2", "--repair")
    assert not file.exists()
    document = write_placement(dump, file, "vllm-ascend", "--step", 10, "--repair")
    assert document["repair"] == {"layers": 1, "swaps": 1, "replaced": 0}
    assert "repaired in 1 layer: 1 swap of two slots\n" in cli(*command, "--repair", "--force").stdout
    rows = read_vllm_ascend(file.read_text())
    assert np.array_equal(rows[[0, 2]], placement(10)[[0, 2]])
    assert np.bincount(rows[1]).tolist() == np.bincount(DOUBLE).tolist()
    assert (rows[1] != DOUBLE).sum() == 2


def test_vllm_ascend_reader_of_these_tests_rejects_duplicates(tmp_path: Path) -> None:
    slots = np.array(DOUBLE, np.int32).reshape(1, 2, 4).tolist()
    devices = [{"device_id": d, "device_expert": own} for d, own in enumerate(slots[0])]
    layer = {"layer_id": 0, "device_count": 2, "device_list": devices}
    with pytest.raises(AssertionError, match=r"another expert|no expert"):
        read_vllm_ascend(json.dumps({"moe_layer_count": 1, "layer_list": [layer]}))


def make(rows: Any, ep_size: int, experts: int) -> Placement:
    table = np.atleast_2d(np.array(rows, np.int32))
    return Placement(tuple(range(len(table))), ep_size, experts, table)


def doubles(devices: Array) -> int:
    return sum(len(own) - len(set(own)) for own in devices.tolist())


@pytest.mark.parametrize("seed", range(300))
def test_repair_keeps_replicas_and_leaves_no_duplicate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices, experts = int(rng.integers(2, 7)), int(rng.integers(3, 12))
    slots = int(rng.integers(-(-experts // devices), experts + 1))
    spare = devices * slots - experts
    # Hot experts get most of the redundant slots: there are many duplicates, and some experts have too many.
    copies = rng.choice(experts, spare, p=rng.dirichlet(np.full(experts, 0.3)))
    row = rng.permutation(np.concatenate([np.arange(experts), copies]))
    weight = rng.integers(1, 1000, (1, experts))
    before = make(row, devices, experts)
    after, repair = vllm_ascend.repaired(before, weight)
    old, new = (p.physical_to_logical_map[0] for p in (before, after))
    assert doubles(after.devices()[0]) == 0
    assert np.array_equal(before.physical_to_logical_map[0], row)
    counts, now = (np.bincount(p, minlength=experts) for p in (old, new))
    assert repair.replaced == np.maximum(counts - devices, 0).sum()
    assert repair.swaps <= doubles(before.devices()[0])
    if not repair.replaced:
        assert np.array_equal(counts, now)
        assert (old != new).sum() <= 2 * repair.swaps
    assert now.min() >= 1
    assert now.max() <= devices
    assert repair.layers == (old != new).any()
    assert np.array_equal(read_vllm_ascend(vllm_ascend.text(after))[0], new)


def test_repair_swaps_with_the_closest_load() -> None:
    # Expert 0 is twice on device 0. It can be swapped with 3 or 4; 4 has about its load per replica.
    row = [0, 0, 1, 2, 3, 4]
    after, _ = vllm_ascend.repaired(make(row, 2, 5), np.array([[20, 5, 5, 90, 11]]))
    assert sorted(after.devices()[0, 0].tolist()) == [0, 1, 4]
    other, _ = vllm_ascend.repaired(make(row, 2, 5), np.array([[180, 5, 5, 85, 11]]))
    assert sorted(other.devices()[0, 0].tolist()) == [0, 1, 3]


def test_unrepairable_placement_is_refused() -> None:
    with pytest.raises(UsageError, match="exceed the model's 2 experts"):
        vllm_ascend.repaired(make([0, 1, 0, 1, 0, 1], 2, 2))


# ---- samples: files that the engines' own code wrote or accepted


def truth(path: Path) -> Any:
    return arrays(path.with_name("ground_truth.npz"))


def sample(name: str) -> Path:
    path = SAMPLES / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.mark.parametrize(
    ("name", "first", "rows_of", "write"),
    [
        (
            "sglang/init_expert_location/physical_to_logical_map.json",
            0,
            lambda path: json.loads(path.read_text())["physical_to_logical_map"],
            sglang,
        ),
        (
            "trtllm/moe_load_balancer.yaml",
            3,
            lambda path: list(yaml.safe_load(path.read_text())["initial_global_assignments"].values()),
            trtllm,
        ),
        ("vllm_pr41141/mapping.jsonl", 0, lambda path: truth(path)["mapping"], vllm_mapping),
        ("vllm_ascend/expert_map_record.json", 0, lambda path: truth(path)["placement"], vllm_ascend.text),
    ],
)
def test_samples_are_written_byte_for_byte(
    name: str, first: int, rows_of: Callable[[Path], Any], write: Callable[[Placement], str]
) -> None:
    path = sample(name)
    table = np.array(rows_of(path), np.int32).reshape(-1, 20)
    text = write(Placement(tuple(range(first, first + len(table))), 4, 16, table))
    assert text.rstrip() == path.read_text().rstrip()


@pytest.mark.parametrize("target", [*ENGINES, "json"])
def test_import_reads_exported_placements(target: str, dump: Path, tmp_path: Path) -> None:
    file = tmp_path / ("F.yaml" if target == "trtllm" else "F.json")
    write_placement(dump, file, target, *(["--num-hidden-layers", HIDDEN] if target == "sglang" else []))
    found = read_placement(file, None)
    rows = found.slots[NUMBERS] if target == "sglang" else found.slots
    assert np.array_equal(rows, placement(STEPS))
    assert found.numbers == (tuple(NUMBERS) if target in ("trtllm", "json") else None)


def test_assumptions_of_an_imported_run_are_noted(tmp_path: Path) -> None:
    source = tmp_path / "weights.npy"
    np.save(source, np.arange(24).reshape(3, 8))
    dump = tmp_path / "dump"
    result = cli("import", source, "--ep-size", "2", "--placement", "linear", dump)
    assert result.returncode == 0, result.stderr
    target = ["--for", "json", "-o", tmp_path / "F"]
    for more in ([], ["--force", "--policy", "deepseek"]):
        result = cli("export", "placement", *target, *more, dump)
        assert "assumed for this run, imported from" in " ".join(result.stdout.split())


# ---- placements made by a policy


@pytest.mark.parametrize("policy", ["deepseek", "vllm"])
@pytest.mark.parametrize(
    ("options", "steps", "shape"),
    [
        ([], complete(), (SLOTS, RANKS)),
        (["--steps", "-24", "--window-steps", 10], complete(15, 25), (SLOTS, RANKS)),
        (["--window-steps", 12, "--redundant-experts", 0], complete(28), (LOGICAL, RANKS)),
        (["--steps", "5-19", "--redundant-experts", 6, "--ep-size", 4], complete(5, 20), (12, 4)),
    ],
)
def test_policy_gets_the_loads_of_the_window(
    policy: str, options: list[Any], steps: list[int], shape: tuple[int, int], dump: Path, tmp_path: Path
) -> None:
    document = write_placement(dump, tmp_path / "p.json", "json", "--policy", policy, *options)
    same = shape == (SLOTS, RANKS)
    current = placement(steps[-1]).astype(np.int32) if same else None
    expected = POLICIES[policy](Problem(logical(steps), *shape, current=current))
    plain = json.loads((tmp_path / "p.json").read_text())
    assert plain["physical_to_logical_map"] == expected.tolist()
    assert (plain["num_physical_experts"], plain["ep_size"]) == shape
    origin = document["origin"]
    assert (origin["policy"], origin["step"]) == (policy, None)
    assert (origin["first_step"], origin["last_step"]) == (steps[0], steps[-1])
    assert origin["recorded"] == len(steps)


@pytest.mark.parametrize("policy", ["deepseek", "flash_lb", "active_experts"])
def test_policy_placement_is_that_of_replay(policy: str, dump: Path) -> None:
    """Each placement that replay made can be exported with the same settings, if it is the first."""
    run = open_run(dump)
    setting = Setting(policy, 4, 2, interval=8, window=12, start=5)
    kept = replay_run(run, [setting], keep_placements=True).placements
    assert kept is not None
    made = [(step, slots) for step, slots in kept[0] if step >= 0]
    assert [step for step, _ in made] == [5, 13, 21, 29, 37]
    # The others depend on the placement before, which an export does not know.
    for step, slots in made if policy == "deepseek" else made[:1]:
        found = policy_placement(
            run, setting.policy, (0, step), window=setting.window, redundant=setting.num_redundant_experts,
            ep_size=setting.ep_size,
        )  # fmt: skip
        both = found.placement.physical_to_logical_map, slots
        # Without a placement before, an export has no slots to keep.
        same = [np.sort(each.reshape(len(each), setting.ep_size, -1), axis=2) for each in both]
        assert np.array_equal(*(both if policy == "deepseek" else same)), step


def test_placement_with_empty_slots_is_not_exported(dump: Path) -> None:
    with pytest.raises(
        UsageError, match="--policy layer_budgets leaves slots empty, which no engine can load"
    ):
        policy_placement(open_run(dump), "layer_budgets", redundant=8, ep_size=2)


def test_nodes_default_to_those_of_the_recording(tmp_path: Path) -> None:
    run = open_run(record(tmp_path / "dump", ranks_per_node=1))
    weight = logical(complete())
    current = placement(STEPS).astype(np.int32)
    for given, nodes in ((None, 2), (1, 1)):
        found = policy_placement(run, "deepseek", num_nodes=given, num_groups=2)
        expected = POLICIES["deepseek"](Problem(weight, SLOTS, RANKS, nodes, 2, current))
        assert np.array_equal(found.placement.physical_to_logical_map, expected)
        assert found.origin.num_nodes == nodes


def test_nodes_that_divide_neither_ranks_nor_groups_are_not_silent(tmp_path: Path) -> None:
    run = open_run(record(tmp_path / "dump", ranks_per_node=1))
    with pytest.raises(UsageError, match="2 EP ranks cannot be divided evenly among 3 nodes"):
        policy_placement(run, "deepseek", num_nodes=3, num_groups=3)
    found = policy_placement(run, "deepseek", num_nodes=2, num_groups=3)
    assert ["3 groups of experts cannot be divided evenly among 2 nodes" in note for note in found.notes] == [
        True
    ]
    expected = POLICIES["deepseek"](Problem(logical(complete()), SLOTS, RANKS))
    assert np.array_equal(found.placement.physical_to_logical_map, expected)
    assert policy_placement(run, "deepseek").notes == []
    assert policy_placement(run, "deepseek", num_groups=2).notes == []


def test_nodes_that_the_ranks_do_not_fill_are_one_node_with_a_note(tmp_path: Path) -> None:
    run = open_run(record(tmp_path / "dump", ranks_per_node=3))
    found = policy_placement(run, "deepseek", redundant=4, ep_size=5, num_groups=2)
    assert found.origin.num_nodes == 1
    assert found.notes == [
        "5 EP ranks cannot be divided evenly into nodes of 3: the last node has 2 ranks; the policy assumes "
        "one node "
        "(--num-nodes)"
    ]


def test_repair_of_a_user_policy_uses_the_window_loads(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "policy_of_test_export.py").write_text(
        "import numpy as np\n"
        "def doubled(problem):\n"
        "    row = np.r_[np.arange(problem.weight.shape[1]), 0, 0][[0, 6, 1, 2, 3, 4, 5, 7]]\n"
        "    return np.tile(row, (len(problem.weight), 1))\n"
    )
    target = tmp_path / "out.json"
    options = ["--policy", "policy_of_test_export:doubled", "--repair"]
    command = ["export", "placement", "--for", "vllm-ascend", "-o", str(target), *options, str(dump)]
    monkeypatch.syspath_prepend(tmp_path)
    result = cli(*command)
    # Expert 0 has three replicas on two devices: one goes to the expert with the most tokens per replica.
    assert result.returncode == 0, result.stderr
    assert "3 slots with another expert" in result.stdout
    rows = read_vllm_ascend(target.read_text())
    weight = logical(complete())
    for row, load in zip(rows, weight, strict=True):
        counts = np.bincount(row, minlength=LOGICAL)
        hottest = int(np.argmax(np.where(np.arange(LOGICAL) == 0, 0, load)))
        assert counts.tolist() == [2 if e in (0, hottest) else 1 for e in range(LOGICAL)]


# ---- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--for", "sglang", "-o", "F.json"], ["--num-hidden-layers", "every hidden layer"]),
        (["--for", "sglang", "-o", "F.json", "--num-hidden-layers", "4"], ["more than 4 hidden layers"]),
        (["--for", "sglang", "-o", "F.txt", "--num-hidden-layers", "6"], [".json"]),
        (["--for", "trtllm", "-o", "F.yaml", "--first-layer", "3"], ["names its layers", "1 to 4"]),
        (["--for", "trtllm", "-o", "F.yaml", "--step", "99"], ["no step 99", "0 to 39"]),
        (["--for", "json", "-o", "F", "--policy", "none"], ["there is no policy 'none'", "deepseek"]),
        (
            ["--for", "json", "-o", "F", "--policy", "static", "--redundant-experts", "1"],
            ["7 slots", "2 EP ranks"],
        ),
        (
            ["--for", "json", "-o", "F", "--policy", "static", "--steps", "50-"],
            ["the run has no steps in 50-"],
        ),
        (["--for", "json", "-o", "F", "--policy", "static", "--redundant-experts", "1000000000"], ["65,536"]),
        (["--for", "sglang", "-o", "F.json", "--num-hidden-layers", "1000000000"], ["4,096"]),
        (["--for", "json", "-o", "nowhere/F"], ["there is no folder"]),
        (["--for", "json", "-o", "."], ["is a folder"]),
        (["--for", "json", "-o", "DUMP/F"], ["is inside the dump"]),
        (["--for", "json", "-o", "DUMP/run=r/F"], ["is inside the dump"]),
    ],
)
def test_impossible_placement_is_one_error(
    options: list[str], words: list[str], dump: Path, tmp_path: Path
) -> None:
    at = options.index("-o") + 1
    name = options[at]
    target = dump / name[5:] if name.startswith("DUMP") else tmp_path / name
    one_error(cli("export", "placement", *options[:at], target, *options[at + 1 :], dump), 2, *words)
    assert list(tmp_path.iterdir()) == []
    assert [p.name for p in dump.iterdir()] == ["run=r"]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--for", "json", "--window-steps", "5"], "--window-steps"),
        (["--for", "json", "--steps", "5-"], "--steps"),
        (["--for", "json", "--redundant-experts", "0"], "--redundant-experts"),
        (["--for", "json", "--step", "5", "--policy", "static"], "--step"),
        (["--for", "json", "--repair"], "--repair"),
        (["--for", "trtllm", "--num-hidden-layers", "6"], "--num-hidden-layers"),
        (["--for", "vllm"], "--for"),
    ],
)
def test_conflicting_options_are_refused(options: list[str], hint: str, dump: Path, tmp_path: Path) -> None:
    result = cli("export", "placement", *options, "-o", tmp_path / "F", dump)
    assert result.returncode == 2
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_replaced_only_with_force(dump: Path, tmp_path: Path) -> None:
    file = tmp_path / "F"
    file.write_text("mine")
    for command in (["placement", "--for", "json"], ["loads", "--as", "csv"]):
        one_error(cli("export", *command, "-o", file, dump), 2, "already exists", "--force")
        assert file.read_text() == "mine"
        assert cli("export", *command, "-o", file, "--force", dump).returncode == 0
        assert file.read_text() != "mine"
        file.write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    one_error(cli("export", "placement", "--for", "json", "-o", link, dump), 2, "already exists")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["F", "link"]
    # Replacing a device would destroy it: as root, /dev/null would become a file.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for command in (["placement", "--for", "json"], ["loads", "--as", "csv"]):
        one_error(cli("export", *command, "-o", pipe, "--force", dump), 2, "device or pipe")
        link = tmp_path / f"link-{command[0]}"
        link.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_text("mine")
        one_error(cli("export", *command, "-o", link, "--force", dump), 2, "symbolic link")
        assert (link.is_symlink(), link.read_text()) == (True, "mine")
    assert pipe.is_fifo()


def test_file_created_meanwhile_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "F"

    def write() -> None:
        with atomic.new_file(file, force=False) as out:
            out.write(b"new")
            file.write_text("theirs")

    with pytest.raises(UsageError, match="already exists"):
        write()
    assert file.read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["F"]


def test_empty_slots_and_unknown_placements_are_refused(tmp_path: Path) -> None:
    rows = np.array([[0, 1, 2, -1], [0, 1, 2, 0]])
    with ExpertLoadWriter(tmp_path / "dump", model="m", num_logical_experts=3, ep_size=2, run_id="r",
                          scope="global") as writer:  # fmt: skip
        for step in range(6):
            writer.record(step, np.ones((2, 4), np.int64), None if step < 3 else rows)
    for target in ENGINES:
        command = ["export", "placement", "--for", target, "-o", str(tmp_path / "F.json")]
        hidden = ["--num-hidden-layers", "2"] if target == "sglang" else []
        result = cli(*command, *hidden, tmp_path / "dump")
        one_error(result, 2, "layer 0 has 1 empty slots", "--for json")
    write_placement(tmp_path / "dump", tmp_path / "p.json", "json")
    assert json.loads((tmp_path / "p.json").read_text())["physical_to_logical_map"] == rows.tolist()
    command = ["export", "placement", "--for", "trtllm", "-o", str(tmp_path / "F"), "--step", "1"]
    one_error(cli(*command, tmp_path / "dump"), 2, "no placement is known at step 1")
    policy = ["export", "placement", "--for", "json", "-o", str(tmp_path / "F"), "--policy", "deepseek"]
    one_error(cli(*policy, "--steps", "-2", tmp_path / "dump"), 3, "placement is not known in these steps")
    result = cli(*policy, tmp_path / "dump")
    assert "steps before 3 are left out" in result.stdout
    # Slot 3 of layer 0 was empty and still got one token per step.
    assert "12% of the tokens went to slots without an expert" in result.stdout


def test_missing_layer_numbers_are_assumed_or_given(tmp_path: Path) -> None:
    root = record(tmp_path / "dump", moe_layers=None)
    document = write_placement(root, tmp_path / "a.yaml", "trtllm")
    assert list(read_trtllm(tmp_path / "a.yaml")) == [0, 1, 2]
    assert ["--first-layer" in note for note in document["notes"]] == [True]
    document = write_placement(root, tmp_path / "b.yaml", "trtllm", "--first-layer", 3)
    assert list(read_trtllm(tmp_path / "b.yaml")) == [3, 4, 5]
    assert document["notes"] == []
    options = ["--first-layer", 2, "--num-hidden-layers", 5]
    assert write_placement(root, tmp_path / "c.json", "sglang", *options)["filled_layers"] == [0, 1]
    assert read_sglang(tmp_path / "c.json")[2:].tolist() == placement(STEPS).tolist()


def test_sglang_dump_without_layer_numbers_has_all_hidden_layers(tmp_path: Path) -> None:
    root = record(tmp_path / "dump", moe_layers=None, engine="sglang")
    document = write_placement(root, tmp_path / "s.json", "sglang")
    assert read_sglang(tmp_path / "s.json").tolist() == placement(STEPS).tolist()
    assert (document["filled_layers"], document["notes"]) == ([], [])


def elastic(root: Path) -> Path:
    """Two ranks with 8 slots; from step 8 on, three ranks with 9."""
    with ExpertLoadWriter(root, model="m", num_logical_experts=LOGICAL, ep_size=2, run_id="r",
                          scope="global") as writer:  # fmt: skip
        for step in range(12):
            ranks, slots = (2, 8) if step < 8 else (3, 9)
            load = np.arange(2 * slots).reshape(2, slots) + step
            table = np.tile(np.arange(slots) % LOGICAL, (2, 1))
            writer.record(step, load, table, ep_size=ranks)
    return root


def test_run_with_two_shapes_is_exported(tmp_path: Path) -> None:
    run = open_run(elastic(tmp_path / "dump"))
    for step, shape in ((5, (2, 8)), (11, (3, 9))):
        found = recorded_placement(run, step)
        assert (found.placement.ep_size, found.placement.num_physical_experts) == shape
    found = policy_placement(run, "deepseek")
    assert (found.origin.first_step, found.origin.last_step, found.placement.ep_size) == (8, 11, 3)
    assert "steps 0 to 7 are left out" in found.notes[0]
    assert policy_placement(run, "deepseek", (0, 8)).placement.ep_size == 2
    report = export_loads(run, "csv", tmp_path / "loads.csv")
    assert report.rows == 8 * 2 * 8 + 4 * 2 * 9
    rows = read_csv(tmp_path / "loads.csv")
    assert rows[11, 1, 8] == (2, 2, 17 + 11)
    assert rows[7, 1, 7] == (1, 1, 15 + 7)


# ---- loads


def read_csv(file: Path) -> dict[tuple[int, int, int], tuple[int, int | None, float]]:
    with file.open(newline="") as lines:
        return {
            (int(r["step"]), int(r["layer"]), int(r["physical"])): (
                int(r["rank"]), int(r["logical"]) if r["logical"] else None, float(r["load"])
            )
            for r in csv.DictReader(lines)
        }  # fmt: skip


def read_parquet(file: Path) -> dict[tuple[int, int, int], tuple[int, int | None, float]]:
    query = f"select step, layer, physical, rank, logical, load from read_parquet('{file}')"
    return {tuple(row[:3]): tuple(row[3:]) for row in duckdb.sql(query).fetchall()}


READERS = {"csv": read_csv, "parquet": read_parquet}


def expected_rows(
    steps: list[int], layers: list[int], replication: int = 1
) -> dict[tuple[int, int, int], tuple[int, int, float]]:
    return {
        (step, layer, slot): (
            slot // (SLOTS // RANKS),
            int(placement(step)[NUMBERS.index(layer), slot]),
            physical(step)[NUMBERS.index(layer), slot] / replication,
        )
        for step in steps
        for layer in layers
        for slot in range(SLOTS)
    }


@pytest.mark.parametrize("name", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("options", "steps", "layers"),
    [
        ([], complete(), NUMBERS),
        (["--steps", "18-26"], complete(18, 27), NUMBERS),
        (["--layer", "4", "--layer", "1", "--steps", "-13"], complete(0, 14), [1, 4]),
    ],
)
def test_long_form_has_one_row_per_step_layer_and_slot(
    name: str, options: list[str], steps: list[int], layers: list[int], dump: Path, tmp_path: Path
) -> None:
    file = tmp_path / "loads"
    result = cli("export", "loads", "--as", name, "-o", file, "--json", *options, dump)
    assert result.returncode == 0, result.stderr
    expected = expected_rows(steps, layers)
    assert READERS[name](file) == expected
    document = json.loads(result.stdout)
    assert (document["rows"], document["recorded"]) == (len(expected), len(steps))
    assert (document["first_step"], document["last_step"]) == (steps[0], steps[-1])
    assert (document["layers"], document["bytes"]) == (layers, file.stat().st_size)
    assert document["steps"]["incomplete"] == (0 if "18-26" in options else 1)


def test_parquet_file_names_its_run_and_has_checksums(dump: Path, tmp_path: Path) -> None:
    export_loads(open_run(dump), "parquet", tmp_path / "loads.parquet")
    file = pq.ParquetFile(tmp_path / "loads.parquet", page_checksum_verification=True)
    about = json.loads(file.schema_arrow.metadata[long_form.METADATA_KEY])
    assert about == {
        "run_id": "r", "model": "org/moe", "scope": "local", "num_logical_experts": 6, "token_replication": 1,
    }  # fmt: skip
    assert file.read().num_rows == len(expected_rows(complete(), NUMBERS))


def test_batch_size_is_bounded(dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_form, "BATCH_ROWS", 3 * SLOTS)
    run = open_run(dump)
    batches = run.retry_without_damaged(lambda: list(long_form.batches(run, run.blocks(), [0, 1, 2])))
    assert max(b.num_rows for b in batches) == 3 * SLOTS
    keys = [tuple(row.values()) for b in batches for row in b.select([0, 1, 2]).to_pylist()]
    assert sorted(keys) == sorted(expected_rows(complete(), NUMBERS))
    # Ordered by layer, step and slot within each segment of 16 steps.
    assert keys == sorted(keys, key=lambda key: (key[0] // 16, key[1], key[0], key[2]))


def test_unknown_placement_is_null(tmp_path: Path) -> None:
    with ExpertLoadWriter(tmp_path / "dump", model="m", num_logical_experts=3, ep_size=2, run_id="r",
                          scope="global") as writer:  # fmt: skip
        for step in range(3):
            writer.record(step, np.ones((1, 4), np.int64), None if step < 2 else np.array([[0, 1, 2, -1]]))
    run = open_run(tmp_path / "dump")
    for name, read in READERS.items():
        export_loads(run, name, tmp_path / name)
        rows = read(tmp_path / name)
        assert [rows[1, 0, slot][1] for slot in range(4)] == [None] * 4
        assert [rows[2, 0, slot][1] for slot in range(4)] == [0, 1, 2, -1]


@pytest.mark.parametrize("options", [[], ["--steps", "15-32"], ["--layer", "4"]])
def test_logical_npy_has_the_sums_for_deepseek_eplb(options: list[str], dump: Path, tmp_path: Path) -> None:
    file = tmp_path / "weight"
    result = cli("export", "loads", "--as", "logical-npy", "-o", file, *options, dump)
    assert result.returncode == 0, result.stderr
    weight = np.load(file, allow_pickle=False)
    expected = logical(complete(15, 33) if "--steps" in options else complete())
    assert weight.dtype == np.int64
    assert np.array_equal(weight, expected[[2]] if "--layer" in options else expected)


def test_loads_are_divided_by_token_replication(tmp_path: Path) -> None:
    run = open_run(record(tmp_path / "dump", token_replication=2))
    for name, read in READERS.items():
        export_loads(run, name, tmp_path / name)
        assert read(tmp_path / name) == expected_rows(complete(), NUMBERS, 2)
    export_loads(run, "logical-npy", tmp_path / "weight")
    assert np.array_equal(np.load(tmp_path / "weight", allow_pickle=False), logical(complete()) / 2)


def test_damaged_segment_is_left_out_and_reported(dump: Path, tmp_path: Path) -> None:
    copy = record(tmp_path / "dump")
    segment = next(copy.glob("run=*/model=*/rank=00001/session=*/loads-000001.parquet"))
    data = bytearray(segment.read_bytes())
    group = pq.ParquetFile(segment).metadata.row_group(0)
    data[group.column(group.num_columns - 1).data_page_offset + 60] ^= 0xFF
    segment.write_bytes(data)
    for name, read in READERS.items():
        result = cli("export", "loads", "--as", name, "-o", tmp_path / name, copy)
        one_error_of_damage = [line for line in result.stderr.splitlines() if "loads-000001" in line]
        assert (result.returncode, len(one_error_of_damage)) == (3, 1)
        # Without this segment of rank 1, steps 16 to 31 are incomplete.
        steps = [s for s in complete() if not 16 <= s < 32]
        assert read(tmp_path / name) == expected_rows(steps, NUMBERS)


def test_no_file_without_a_complete_step(dump: Path, tmp_path: Path) -> None:
    for name in LoadFormat:
        command = ["export", "loads", "--as", name.value, "-o", str(tmp_path / "F")]
        one_error(cli(*command, "--steps", "13-13", dump), 3, "complete")
        one_error(cli(*command, "--steps", "70-", dump), 2, "the run has no steps in 70-")
        one_error(cli(*command, "--layer", "3", dump), 2, "no MoE layer 3")
    assert list(tmp_path.iterdir()) == []


# ---- the command


def test_command_has_all_targets_of_the_library() -> None:
    assert [t.value for t in Target] == [*ENGINES, "json"]


@pytest.mark.parametrize("command", ["placement", "loads"])
def test_commands_have_help(command: str) -> None:
    text = cli("export", command, "--help").stdout
    assert "--output" in text
    assert len(text.split("\n\n")[1].strip()) > 20


@pytest.mark.parametrize("form", ["txt", "json"])
def test_golden_output(form: str, dump: Path, tmp_path: Path) -> None:
    output = ["--json"] if form == "json" else []
    commands = {
        "export-placement": ["placement", "--for", "sglang", "--num-hidden-layers", "6", "-o", "s.json"],
        "export-policy": [
            "placement",
            "--for",
            "trtllm",
            "--policy",
            "deepseek",
            "--window-steps",
            "20",
            "-o",
            "t.yaml",
        ],
        "export-loads": ["loads", "--as", "parquet", "--layer", "2", "-o", "l.parquet"],
    }
    for name, (*command, file) in commands.items():
        result = cli("export", *command, tmp_path / file, *output, dump)
        assert result.returncode == 0, result.stderr
        text = result.stdout.replace(str(tmp_path), "out")
        # The size of a Parquet file depends on the version of pyarrow.
        size = (tmp_path / file).stat().st_size
        if file.endswith("parquet"):
            text = text.replace(f"{size:,}", "N").replace(f'"bytes": {size}', '"bytes": 0')
        assert_golden(f"{name}.{form}", text)
