"""`experts` of steps without experts' loads: what sums per minute name.

The truth is computed from the Parquet files of the recording before it was thinned, without our reader.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clocks import steady_clock
from helpers import cli, one_error, open_writer
from thinning import session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis.experts_minutes import experts_of_minutes
from eplb_analyze.analysis.layer import layer_report
from eplb_dump.format.minutes import MINUTE_NS, TOP_SLOTS
from eplb_dump.format.schema import Tier

RANKS, SLOTS, LOGICAL, LAYERS = 2, 8, 6, 2
STEPS, SEGMENT, CHANGE = 640, 64, 330


@pytest.fixture(scope="module", params=["global", "local"])
def whole(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Expert shares drift, and the placement changes once."""
    root = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(8)
    shares = rng.dirichlet(np.ones(SLOTS), 2)
    mix = np.linspace(0, 1, STEPS)[:, np.newaxis]
    load = rng.poisson(900 * (shares[0] * mix + shares[1] * (1 - mix))[:, np.newaxis], (STEPS, LAYERS, SLOTS))
    parts = rng.multinomial(load, [0.7, 0.3])
    for rank in range(RANKS if request.param == "local" else 1):
        own = parts[..., rank] if request.param == "local" else load
        with (
            steady_clock(400),
            open_writer(
                root, ep_rank=rank, num_logical_experts=LOGICAL, segment_steps=SEGMENT, scope=request.param
            ) as writer,
        ):
            for step in range(STEPS):
                slots = (np.arange(SLOTS) + (step >= CHANGE)) % LOGICAL
                writer.record(step, own[step], np.tile(slots, (LAYERS, 1)))
                assert step % 100 or writer.flush(60)
    return root


def thinned(whole: Path, to: Path, tiers: dict[Tier, range]) -> Path:
    root = Path(shutil.copytree(whole, to))
    for folder in session_folders(root):
        thin_to(folder, tiers)
    return root


def named_shares(root: Path, first: int, last: int) -> dict[tuple[int, int], float]:
    """The tokens of each layer's experts on the slots that minutes name, by those of the layer.

    Minutes are whole: those with more than their first step in the range.
    """
    named: dict[tuple[int, int], int] = defaultdict(int)
    total: dict[int, int] = defaultdict(int)
    minute_of: dict[int, int] = {}
    for file in root.rglob("steps-*.parquet"):
        steps = pq.ParquetFile(file).read()
        minutes = steps["time"].cast(pa.int64()).to_numpy() // MINUTE_NS
        minute_of |= dict(zip(steps["step"].to_pylist(), minutes.tolist(), strict=True))
    chosen = {minute_of[step] for step in range(first, last + 1)}
    begins = min(step for step in minute_of if minute_of[step] == minute_of[last])
    if begins == last > first:
        chosen.remove(minute_of[last])
    for file in root.rglob("loads-*.parquet"):
        rows: dict[tuple[int, int, bool], Any] = defaultdict(lambda: np.zeros(SLOTS, np.int64))
        loads = pq.ParquetFile(file).read(["step", "layer", "load"]).to_pydict()
        for step, layer, load in zip(*loads.values(), strict=True):
            if minute_of[step] in chosen:
                rows[layer, minute_of[step], step >= CHANGE] += load
        for (layer, _, changed), load in rows.items():
            total[layer] += int(load.sum())
            for slot in np.argsort(-load, kind="stable")[:TOP_SLOTS].tolist():
                named[layer, (slot + changed) % LOGICAL] += int(load[slot])
    return {(layer, expert): tokens / total[layer] for (layer, expert), tokens in named.items()}


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("tier", [Tier.RANKS, Tier.MINUTES])
def test_experts_are_those_that_minutes_name(
    whole: Path, tmp_path: Path, tier: Tier, layer: int | None
) -> None:
    root = thinned(whole, tmp_path / "thinned", {tier: range(STEPS // SEGMENT)})
    for first, last in ((0, STEPS - 1), (100, 400), (350, 351)):
        found = experts_of_minutes(open_run(root), layer, (first, last + 1))
        expected = {
            key: share
            for key, share in named_shares(whole, first, last).items()
            if share * LOGICAL > 1 and layer in (None, key[0])
        }
        assert {(e.layer, e.logical): e.share for e in found.experts} == pytest.approx(expected, rel=1e-12)
        assert [e.share for e in found.experts] == sorted(expected.values(), reverse=True)
        assert all(e.times_mean == pytest.approx(e.share * LOGICAL) for e in found.experts)
        placed = (np.arange(SLOTS) + (found.last_step >= CHANGE)) % LOGICAL
        assert all(e.replicas == np.count_nonzero(placed == e.logical) for e in found.experts)
        if layer is not None and tier is Tier.MINUTES:
            minutes = layer_report(open_run(root), layer, None, (first, last + 1)).minutes
            assert minutes is not None
            assert minutes.hot_experts == found.experts


def test_command_shows_what_is_kept_and_refuses_the_rest(whole: Path, tmp_path: Path) -> None:
    tiers = {Tier.GONE: range(2), Tier.MINUTES: range(2, 4), Tier.RANKS: range(4, 6)}
    root = thinned(whole, tmp_path / "thinned", tiers)
    kept = 6 * SEGMENT
    for steps in (f"{2 * SEGMENT}-{4 * SEGMENT - 1}", f"{3 * SEGMENT}-{kept - 1}"):
        result = cli("experts", "--steps", steps, root)
        assert (result.returncode, result.stderr) == (0, "")
        said = " ".join(result.stdout.split())
        assert "figures come from per-minute sums (22:14 to 22:" in said
        assert "experts' loads of single steps are not kept" in said
        assert "with at least these tokens" in said
        document = json.loads(cli("experts", "--steps", steps, "--json", root).stdout)
        assert (document["tier"], document["steps"]["incomplete"]) == ("minutes", 0)
        assert document["experts"]
    full = cli("experts", "--json", "--steps", f"{kept}-", root)
    assert full.stdout == cli("experts", "--json", "--steps", f"{kept}-", whole).stdout
    one_error(cli("experts", "--cold", "--steps", "200-300", root), 2, "do not show cold ones; remove --cold")
    gone = cli("experts", "--steps", "0-100", root)
    one_error(gone, 2, f"of which nothing is kept (budget); select steps {kept}-{STEPS - 1}")


def test_phase_of_single_ranks_is_refused(tmp_path: Path) -> None:
    with steady_clock(400), open_writer(tmp_path, ep_size=1, segment_steps=16) as writer:
        for step in range(32):
            writer.record(step, np.full((1, 6), step), np.arange(6)[np.newaxis], phase="decode")
    for folder in session_folders(tmp_path):
        thin_to(folder, {Tier.MINUTES: range(2)})
    one_error(cli("experts", "--phase", "decode", tmp_path), 2, "do not show the steps of one phase")
