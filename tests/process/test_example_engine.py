"""examples/moe_engine: it serves what it should, behaves as an EP engine does, and its dump is the truth."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, arrays

torch = pytest.importorskip("torch")
sys.path.append(str(ROOT))  # examples are not installed


RANKS, STEPS, REARRANGE_EVERY, TOP_K, EXPERTS = 4, 100, 25, 2, 16
MOE_LAYERS = [1, 2, 3, 4]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Run:
    output: str
    dump: Path
    ranks: list[dict[str, Array]]  # the truth of each

    @property
    def loads(self) -> Array:
        """[steps, layers, slots] over all ranks."""
        return sum(rank["expert_load"].astype(np.int64) for rank in self.ranks)  # type: ignore[return-value]

    @property
    def placements(self) -> Array:
        return self.ranks[0]["physical_to_logical_map"]

    def logical_loads(self) -> Array:
        """[steps, layers, experts] over all ranks."""
        holds = self.placements[..., None] == np.arange(EXPERTS)
        return (self.loads[..., None] * holds).sum(2)  # type: ignore[no-any-return]

    def balancedness(self, first: int, last: int) -> float:
        """Of the loads of steps first to last - 1, summed."""
        load = self.loads[first:last].sum(0).reshape(len(MOE_LAYERS), RANKS, -1).sum(2)
        return float((load.mean(1) / load.max(1)).mean())


def engine(*options: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.moe_engine", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("engine")
    options = {
        "--steps": STEPS,
        "--rearrange-every": REARRANGE_EVERY,
        "--train-steps": 100,
        "--run-id": "test",
    }
    flat = [part for option in options.items() for part in option]
    done = engine(*flat, "--truth", folder / "truth", "--dump", folder / "dump")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    ranks = [arrays(path) for path in sorted((folder / "truth").glob("rank-*.npz"))]
    assert len(ranks) == RANKS
    return Run(done.stdout, folder / "dump", ranks)


def read_table(folder: Path, table: str) -> pa.Table:
    """All sealed segments of a table under a folder."""
    parts = [pq.ParquetFile(path).read() for path in sorted(folder.rglob(f"{table}-*.parquet"))]
    assert parts, f"no {table} under {folder}"
    return pa.concat_tables(parts)


class TestServing:
    def test_every_layer_gets_top_k_of_each_token_and_each_rank_counts_its_own(self, run: Run) -> None:
        for rank in run.ranks:
            assert rank["expert_load"].shape == (STEPS, len(MOE_LAYERS), 20)
            expected = np.repeat(TOP_K * rank["num_tokens"][:, None], len(MOE_LAYERS), axis=1)
            np.testing.assert_array_equal(rank["expert_load"].sum(2), expected)

    def test_ranks_prefill_decode_and_run_dry_independently(self, run: Run) -> None:
        for rank in run.ranks:
            np.testing.assert_array_equal(rank["dummy"], rank["num_tokens"] == 0)
            assert {"prefill", "decode"} <= set(rank["phase"])
        assert any(rank["dummy"].any() for rank in run.ranks)
        phases = np.stack([rank["phase"] for rank in run.ranks])
        assert (phases != phases[0]).any()

    def test_copies_of_an_expert_share_its_tokens(self, run: Run) -> None:
        for layer in range(len(MOE_LAYERS)):
            placement = run.placements[-1, layer]
            loads = run.loads[-REARRANGE_EVERY:, layer].sum(0)
            for expert in np.flatnonzero(np.bincount(placement) > 1):
                copies = loads[placement == expert]
                assert copies.max() < 1.5 * copies.min()

    def test_routing_is_skewed_and_the_hot_experts_change_with_the_topic(self, run: Run) -> None:
        loads = run.logical_loads()
        code = loads[run.ranks[0]["topic"] == "code"].sum(0)
        prose = loads[run.ranks[0]["topic"] == "prose"].sum(0)
        for load in (code, prose):
            assert (load.max(1) > 1.5 * load.mean(1)).all()
        ranking = np.argsort(-code, axis=1)[:, :4], np.argsort(-prose, axis=1)[:, :4]
        changed = [set(a) != set(b) for a, b in zip(*ranking, strict=True)]
        assert sum(changed) >= len(MOE_LAYERS) - 1


class TestRearranging:
    def test_all_ranks_change_the_placement_at_the_same_steps(self, run: Run) -> None:
        for rank in run.ranks[1:]:
            np.testing.assert_array_equal(rank["physical_to_logical_map"], run.placements)
        changes = (np.diff(run.placements, axis=0) != 0).any((1, 2))
        assert (np.flatnonzero(changes) + 1).tolist() == [25, 50, 75]

    def test_every_expert_keeps_a_slot(self, run: Run) -> None:
        for placement in run.placements.reshape(-1, run.placements.shape[2]):
            assert set(placement) == set(range(EXPERTS))

    def test_the_first_one_balances_the_ranks(self, run: Run) -> None:
        before = run.balancedness(0, REARRANGE_EVERY)
        after = run.balancedness(REARRANGE_EVERY, 2 * REARRANGE_EVERY)
        assert after > before + 0.1

    def test_it_says_what_it_did_and_that_outputs_are_unchanged(self, run: Run) -> None:
        lines = [line for line in run.output.splitlines() if "rearranged" in line]
        moved = [int(re.search(r"moved (\d+) slots", line)[1]) for line in lines]  # type: ignore[index]
        steps = np.flatnonzero(np.diff(run.placements, axis=0).any((1, 2)))
        assert moved == [(run.placements[step] != run.placements[step + 1]).sum() for step in steps]
        assert all("outputs unchanged" in line for line in lines)


class TestDump:
    @pytest.mark.parametrize("ep_rank", range(RANKS))
    def test_it_is_what_the_rank_did(self, run: Run, ep_rank: int) -> None:
        truth = run.ranks[ep_rank]
        folder = run.dump / "run=test" / "model=tiny-moe" / f"rank={ep_rank:05d}"
        steps = read_table(folder, "steps").drop_columns("time").sort_by("step").to_pydict()
        assert steps["step"] == list(range(STEPS))
        statuses = ["dummy" if dummy else "recorded" for dummy in truth["dummy"]]
        assert steps["status"] == statuses
        assert [tokens or 0 for tokens in steps["num_tokens"]] == truth["num_tokens"].tolist()
        assert [phase or "" for phase in steps["phase"]] == truth["phase"].tolist()

        loads = read_table(folder, "loads").sort_by([("step", "ascending"), ("layer", "ascending")])
        recorded = np.flatnonzero(~truth["dummy"])
        assert loads["step"].to_pylist() == np.repeat(recorded, len(MOE_LAYERS)).tolist()
        assert loads["layer"].to_pylist() == MOE_LAYERS * len(recorded)
        expected = truth["expert_load"][recorded].reshape(-1, 20)
        assert loads["load"].to_pylist() == expected.tolist()
        assert loads["rank_load"].to_pylist() == expected.reshape(-1, RANKS, 5).sum(2).tolist()

    @pytest.mark.parametrize("ep_rank", range(RANKS))
    def test_each_placement_holds_from_its_step(self, run: Run, ep_rank: int) -> None:
        folder = run.dump / "run=test" / "model=tiny-moe" / f"rank={ep_rank:05d}"
        truth = run.ranks[ep_rank]
        in_force = np.full((len(MOE_LAYERS), 20), -1)
        rows = read_table(folder, "placements").sort_by("step").to_pylist()
        for step in range(STEPS):
            while rows and rows[0]["step"] == step:
                row = rows.pop(0)
                in_force[MOE_LAYERS.index(row["layer"])] = row["physical_to_logical"]
            if not truth["dummy"][step]:  # a dummy step comes without a placement
                np.testing.assert_array_equal(in_force, truth["physical_to_logical_map"][step])


class TestParts:
    def test_decoding_from_the_cache_is_what_one_pass_over_the_text_is(self) -> None:
        from examples.moe_engine.model import Batch, KVCache, ModelConfig, MoeTransformer

        torch.manual_seed(0)
        config = ModelConfig()
        model, experts = MoeTransformer(config).eval(), config.local_experts()
        text = torch.randint(256, (2, 12))
        lengths = torch.tensor([7, 4])  # the second prompt is padded
        cache, rows = KVCache(config, 4, torch.device("cpu")), torch.tensor([2, 0])
        positions = torch.arange(12).expand(2, 12)
        with torch.inference_mode():
            expected = model(Batch(text, positions, torch.arange(24)), experts)
            real = (torch.arange(7) < lengths.unsqueeze(1)).flatten().nonzero().flatten()
            prompt = torch.where(torch.arange(7) < lengths.unsqueeze(1), text[:, :7], 0)
            prefilled = model(Batch(prompt, positions[:, :7], real, cache, rows, 7), experts)
            for request, length in enumerate(lengths):
                torch.testing.assert_close(prefilled[request, :length], expected[request, :length])
            for extra in range(5):
                at = (lengths + extra).unsqueeze(1)
                longest = int(at.max()) + 1
                decoded = model(Batch(text.gather(1, at), at, torch.arange(2), cache, rows, longest), experts)
                for request in range(2):
                    torch.testing.assert_close(decoded[request, 0], expected[request, at[request, 0]])

    def test_the_balancer_finds_a_perfect_placement_and_stays_with_it(self) -> None:
        from examples.moe_engine.balancer import balancedness, initial_placement, rebalance

        load = torch.tensor([[20, 20, 20, 20, 20, 60]])
        start = initial_placement(1, 6, 8)
        placement = rebalance(load, start, ep_size=4)
        assert balancedness(load, start, ep_size=4) == pytest.approx(40 / 80)
        assert balancedness(load, placement, ep_size=4) == pytest.approx(1)
        assert sorted(placement[0].tolist()) == [0, 1, 2, 3, 4, 5, 5, 5]
        assert torch.equal(rebalance(load, placement, ep_size=4), placement)

    def test_a_wrong_weight_and_a_wrong_output_are_found(self, tmp_path: Path) -> None:
        import torch.distributed as dist

        from examples.moe_engine.balancer import initial_placement
        from examples.moe_engine.errors import EngineError
        from examples.moe_engine.expert_parallel import ExpertParallel
        from examples.moe_engine.model import ModelConfig, MoeTransformer
        from examples.moe_engine.probe import Probe
        from examples.moe_engine.text import read_corpora

        torch.manual_seed(0)
        device, config = torch.device("cpu"), ModelConfig()
        model, local = MoeTransformer(config).eval(), config.local_experts()
        dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            with torch.inference_mode():
                probe = Probe(model, local, read_corpora(100_000), [0], device)
                experts = ExpertParallel(local.weights.detach(), initial_placement(4, 16, 20), 0, 1, device)
                experts.verify_weights()
                assert probe.check(experts) < 1e-5
                experts.weights[2][7].mul_(1.5)
                with pytest.raises(EngineError, match=r"MoE layer 2: slot 7 .* expert 7"):
                    experts.verify_weights()
                with pytest.raises(EngineError, match="logits differ"):
                    probe.check(experts)
        finally:
            dist.destroy_process_group()


class TestFailing:
    def test_a_killed_rank_ends_the_run_and_leaves_a_dump(self, tmp_path: Path) -> None:
        start = time.monotonic()
        options = ("--train-steps", 2, "--steps", 100_000, "--kill-rank-at", 20, "--run-id", "killed")
        done = engine(*options, "--dump", tmp_path)
        assert done.returncode == 1
        assert done.stderr == "moe_engine: rank 0 was killed by SIGKILL; the other ranks were stopped\n"
        assert time.monotonic() - start < 60
        ranks = tmp_path / "run=killed" / "model=tiny-moe"
        assert list((ranks / "rank=00000").rglob("journal-*.frames"))
        for ep_rank in range(1, RANKS):  # they closed their recordings
            steps = read_table(ranks / f"rank={ep_rank:05d}", "steps")
            assert sorted(steps["step"].to_pylist()) == list(range(20))

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (["--steps", "0"], "argument --steps: 0 is less than 1"),
            (["--ranks", "3"], "20 expert slots (with --redundant-experts) do not divide evenly by 3 ranks"),
            (["--truth", __file__], f"--truth: [Errno 17] File exists: '{__file__}'"),
            (["--nonsense"], "unrecognized arguments: --nonsense"),
        ],
    )
    def test_wrong_usage_is_one_line(
        self, options: list[str], text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from examples.moe_engine.cli import main

        with pytest.raises(SystemExit) as exit_:
            main(options)
        assert exit_.value.code == 2
        assert capsys.readouterr().err == f"moe_engine: {text}\n"
