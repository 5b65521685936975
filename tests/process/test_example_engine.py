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
REARRANGED = [25, 50, 75]
WINDOW = 40  # steps, the engine's default
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


def engine(*options: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.moe_engine", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("engine")
    options = {
        "--steps": STEPS,
        "--rearrange-every": REARRANGE_EVERY,
        "--train-steps": 40,
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

    def test_routing_is_skewed(self, run: Run) -> None:
        """If all experts were equally likely, chi-square would be 15 with a deviation of 5.5."""
        load = run.logical_loads().sum(0)
        expected = load.mean(1, keepdims=True)
        assert (((load - expected) ** 2 / expected).sum(1) > 100).all()

    def test_topic_changes_half_way(self, run: Run) -> None:
        for rank in run.ranks:
            assert rank["topic"].tolist() == ["code"] * (STEPS // 2) + ["prose"] * (STEPS // 2)


class TestRearranging:
    def test_all_ranks_change_the_placement_at_the_same_steps(self, run: Run) -> None:
        for rank in run.ranks[1:]:
            np.testing.assert_array_equal(rank["physical_to_logical_map"], run.placements)
        changes = (np.diff(run.placements, axis=0) != 0).any((1, 2))
        assert set(np.flatnonzero(changes) + 1) <= set(REARRANGED)

    def test_every_expert_keeps_a_slot(self, run: Run) -> None:
        for placement in run.placements.reshape(-1, run.placements.shape[2]):
            assert set(placement) == set(range(EXPERTS))

    def test_each_placement_follows_from_the_loads_of_all_ranks_in_the_window(self, run: Run) -> None:
        from examples.moe_engine.balancer import balancedness, rebalance

        printed = re.findall(r"balancedness of the last (\d+) steps ([\d.]+ -> [\d.]+)", run.output)
        for step, figures in zip(REARRANGED, printed, strict=True):
            window = run.logical_loads()[max(step - WINDOW, 0) : step]
            load, old = torch.from_numpy(window.sum(0)), torch.from_numpy(run.placements[step - 1])
            new = rebalance(load, old, RANKS)
            assert run.placements[step].tolist() == new.tolist()
            before, after = (balancedness(load, placement, RANKS) for placement in (old, new))
            assert figures == (str(len(window)), f"{before:.2f} -> {after:.2f}")

    def test_it_reports_the_slots_it_moved_and_that_outputs_are_unchanged(self, run: Run) -> None:
        lines = [line for line in run.output.splitlines() if "rearranged" in line]
        moved = [int(re.search(r"moved (\d+) slots", line)[1]) for line in lines]  # type: ignore[index]
        assert moved == [(run.placements[step - 1] != run.placements[step]).sum() for step in REARRANGED]
        assert all("outputs unchanged" in line for line in lines)


class TestPlanted:
    """A model whose router is known: every load follows from the tokens, on any processor.

    Byte b is in group b % 16. Layer i routes group g to the experts (g + 3 i) % 16 and the next one. Users
    ask about code in bytes of groups 0 to 7 and about prose in groups 8 to 15, more often in the lower ones.
    """

    def test_loads_are_those_of_the_router_for_each_topic(self, tmp_path: Path) -> None:
        import torch.distributed as dist

        from examples.moe_engine.config import EngineConfig
        from examples.moe_engine.model import ModelConfig
        from examples.moe_engine.rank import Rank

        config = EngineConfig(
            ModelConfig(), steps=STEPS, ep_size=1, num_redundant_experts=4, rearrange_every=REARRANGE_EVERY,
            window=WINDOW, seed=0, device="cpu", run_id="planted", truth=tmp_path,
        )  # fmt: skip
        random = np.random.default_rng(0)
        chances = 1 / np.arange(1, 9) / (1 / np.arange(1, 9)).sum()
        corpora = {
            topic: (
                random.choice(8, 100_000, p=chances) + first + 16 * random.integers(0, 16, 100_000)
            ).astype(np.uint8)
            for topic, first in (("code", 0), ("prose", 8))
        }
        served: list[Any] = []  # of each forward pass: the bytes that are no padding

        def keep(_: Any, arguments: tuple[Any, ...]) -> None:
            batch = arguments[0]
            if batch.cache is not None:  # the probe has none
                served.append(batch.tokens.flatten()[batch.token_index].numpy())

        dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            with torch.inference_mode():
                rank = Rank(0, config, planted_checkpoint(config.model), corpora)
                rank.server.model.register_forward_pre_hook(keep)
                rank.run()
        finally:
            dist.destroy_process_group()
        truth = arrays(tmp_path / "rank-00000.npz")
        busy = np.flatnonzero(~truth["dummy"])
        expected = np.zeros_like(truth["expert_load"])
        for step, tokens in zip(busy, served, strict=True):
            for layer in range(len(MOE_LAYERS)):
                placement = truth["physical_to_logical_map"][step, layer]
                for position, group in enumerate(tokens % 16):
                    for choice in range(TOP_K):  # the copies of an expert take turns
                        copies = np.flatnonzero(placement == (group + 3 * layer + choice) % EXPERTS)
                        expected[step, layer, copies[(position + step) % len(copies)]] += 1
        np.testing.assert_array_equal(truth["expert_load"], expected)

        first_layer = truth["physical_to_logical_map"][:, 0, :, None] == np.arange(EXPERTS)
        load = (truth["expert_load"][:, 0, :, None] * first_layer).sum(1)
        code, prose = load[: STEPS // 2].sum(0), load[STEPS // 2 :].sum(0)
        assert code.max() > 2 * code.mean()
        assert code[9:].sum() == 0
        assert prose[9:].sum() > prose[:8].sum()  # which holds what is left of the requests about code


def planted_checkpoint(config: Any) -> Any:
    """A router that knows only the byte; attention and experts add nothing to it."""
    from examples.moe_engine.model import MoeTransformer
    from examples.moe_engine.training import Checkpoint

    model, experts = MoeTransformer(config), config.local_experts()
    with torch.no_grad():
        torch.nn.init.zeros_(experts.weights)
        model.embedding.weight.zero_()
        model.embedding.weight[torch.arange(256), torch.arange(256) % 16] = 4.0
        for layer in model.layers:
            torch.nn.init.zeros_(layer.attention.out.weight)
            if layer.router is None:
                for part in layer.dense[::2]:
                    torch.nn.init.zeros_(part.weight)
                    torch.nn.init.zeros_(part.bias)
                continue
            gate = layer.router.gate.weight
            gate.zero_()
            for group in range(16):
                for choice, weight in enumerate((1.0, 0.5)):
                    gate[(group + 3 * layer.moe_layer + choice) % EXPERTS, group] = weight
    return Checkpoint(config, model.state_dict(), experts.weights.detach())


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


def assert_close(found: Any, expected: Any) -> None:
    """Equal but for the order of sums, which depends on the processor; another route differs by 0.1."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


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
                assert_close(prefilled[request, :length], expected[request, :length])
            for extra in range(5):
                at = (lengths + extra).unsqueeze(1)
                longest = int(at.max()) + 1
                decoded = model(Batch(text.gather(1, at), at, torch.arange(2), cache, rows, longest), experts)
                for request in range(2):
                    assert_close(decoded[request, 0], expected[request, at[request, 0]])

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
                probe.check(experts)
                experts.weights[2][7].mul_(1.5)
                with pytest.raises(EngineError, match=r"MoE layer 2: slot 7 .* expert 7"):
                    experts.verify_weights()
                experts.weights[2].mul_(1.5)  # so that every token goes to a wrong one
                with pytest.raises(EngineError, match="logits differ"):
                    probe.check(experts)
        finally:
            dist.destroy_process_group()


class TestFailing:
    def test_a_killed_rank_ends_the_run_and_leaves_a_dump(self, tmp_path: Path) -> None:
        options = ("--train-steps", 2, "--steps", 100_000, "--kill-rank-at", 40, "--run-id", "killed")
        done = engine(*options, "--dump", tmp_path)
        assert done.returncode == 1
        assert done.stderr == "moe_engine: rank 0 was killed by SIGKILL; the other ranks were stopped\n"
        ranks = tmp_path / "run=killed" / "model=tiny-moe"
        journals = list((ranks / "rank=00000").rglob("journal-*.frames"))
        # The others do not wait for gloo's timeout of 60 s.
        assert time.time() - max(path.stat().st_mtime for path in journals) < 60
        for ep_rank in range(1, RANKS):  # they closed their recordings
            steps = read_table(ranks / f"rank={ep_rank:05d}", "steps")
            assert sorted(steps["step"].to_pylist()) == list(range(40))

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
