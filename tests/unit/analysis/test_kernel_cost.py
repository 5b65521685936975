"""The estimate for a run whose step times do not show the cost, next to a computation by plain loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli, open_writer

from eplb_analyze import open_run
from eplb_analyze.analysis.cost import cost_of
from eplb_analyze.analysis.kernel_cost import estimate
from eplb_analyze.cli.options import GpuName
from eplb_analyze.metrics.cost import CostStatus, StepTimes
from eplb_analyze.metrics.kernel_times import KERNELS

STEPS, LAYERS, RANKS = 130, 2, 8


def loads(step: int) -> Any:
    """Decode steps, and a prefill every tenth."""
    rng = np.random.default_rng(step)
    tokens = 20_000 if step % 10 == 0 else 300
    return np.stack([rng.multinomial(tokens, rng.dirichlet(np.full(256, 0.3))) for _ in range(LAYERS)])


def write(root: Path, load: Any = loads, experts: int = 256) -> Path:
    """Every second step is recorded, so no time between neighbors is known."""
    placement = np.tile(np.arange(experts), (LAYERS, 1))
    with open_writer(root, scope="global", num_logical_experts=experts, ep_size=RANKS) as writer:
        for step in range(STEPS):
            writer.record(2 * step, load(step), placement)
            assert step % 50 or writer.flush(60)
    return root


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dump"))


def truth(gpu: str, phase: str, steps: list[int]) -> tuple[float, float]:
    """The mean cost and time of steps."""
    kernel = KERNELS[gpu][phase]

    def ms(active: float, tokens: float) -> float:
        return max(
            kernel.floor, kernel.fixed + math.hypot(kernel.per_expert * active, kernel.per_token * tokens)
        )

    costs, times = [], []
    for step in steps:
        cost = time = 0.0
        for layer in loads(step).tolist():
            ranks = [layer[r * 32 : (r + 1) * 32] for r in range(RANKS)]
            active = [sum(n > 0 for n in rank) for rank in ranks]
            tokens = [sum(128 * math.ceil(n / 128) for n in rank) for rank in ranks]
            slowest = max(ms(a, n) for a, n in zip(active, tokens, strict=True))
            cost += slowest - ms(sum(active) / RANKS, sum(tokens) / RANKS)
            time += slowest
        costs.append(cost)
        times.append(time)
    return float(np.mean(costs)), float(np.mean(times))


@pytest.mark.parametrize("gpu", KERNELS)
def test_the_estimate_is_the_sum_over_layers_of_slowest_less_balanced(dump: Path, gpu: str) -> None:
    found = estimate(open_run(dump), gpu, (0, 2 * STEPS))
    assert isinstance(found, dict)
    prefill = list(range(0, STEPS, 10))
    decode = [step for step in range(STEPS) if step % 10]
    for phase, steps in (("decode", decode), ("prefill", prefill)):
        cost, time = truth(gpu, phase, steps)
        error = KERNELS[gpu][phase].error * time
        assert found[phase].steps == len(steps)
        assert found[phase].ms == pytest.approx(time)
        own = found[phase].cost
        assert (own.value, own.low, own.high) == pytest.approx((cost, max(0, cost - error), cost + error))


def test_it_is_used_only_if_the_run_does_not_show_the_cost(dump: Path) -> None:
    run = open_run(dump)
    assert cost_of(run).status is CostStatus.NOT_IDENTIFIABLE
    cost = cost_of(run, gpu="h200")
    assert (cost.status, cost.basis, cost.share_of_step, cost.prices) == (
        CostStatus.ESTIMATED,
        "kernel_times",
        None,
        {},
    )
    assert {phase.status for phase in cost.phases.values()} == {CostStatus.ESTIMATED}
    assert "by H200 kernel times, assuming DeepSeek-V3's experts in fp8" in cost.message
    step = np.arange(0, 2 * STEPS, 2)
    times = StepTimes(step, np.random.default_rng(1).normal(9, 0.1, STEPS), "engine", "")
    assert cost_of(run, timings=times, gpu="h200").basis != "kernel_times"


def test_runs_that_the_tables_do_not_cover(tmp_path: Path) -> None:
    other = write(tmp_path / "other", lambda step: loads(step)[:, :128], experts=128)
    cost = cost_of(open_run(other), gpu="h100")
    assert cost.status is CostStatus.NOT_IDENTIFIABLE
    assert "the kernel times are for 256 experts per layer, but this run has 128" in cost.message
    large = write(tmp_path / "large", lambda step: loads(step) * 1000)
    cost = cost_of(open_run(large), gpu="h100")
    assert "of the steps, a rank has more tokens than the kernel times cover" in cost.message


def test_the_command_line_labels_it(dump: Path, tmp_path: Path) -> None:
    assert {gpu.value for gpu in GpuName} == set(KERNELS)
    text = cli("summary", "--gpu", "b200", dump).stdout
    assert "Imbalance would cost" in text
    assert "not times of this run" in " ".join(text.split())
    cost = json.loads(cli("summary", "--gpu", "b200", "--json", dump).stdout)["cost"]
    assert (cost["status"], cost["basis"]) == ("estimated", "kernel_times")
    assert cli("summary", "--gpu", "v100", dump).returncode == 2
    page = tmp_path / "report.html"
    assert cli("report", "--gpu", "b200", "-o", page, dump).returncode == 0
    assert "estimated from kernel times, not measured" in page.read_text()
    assert "none measurable" not in page.read_text()
