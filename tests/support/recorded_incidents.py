"""Runs with planted incidents as recordings: written by the writer, with planted clock times."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
from clocks import START_NS, PlantedClock
from helpers import open_writer
from planted_incidents import PlantedRun

from eplb_analyze.analysis.incidents import Cause, EndedBy, Incident, IncidentCost
from eplb_dump import ExpertLoadWriter

Array = np.ndarray[Any, Any]


def record(
    run: PlantedRun,
    root: Path,
    monkeypatch: Any,
    *,
    local: bool = False,
    seed: int = 0,
    **options: Any,
) -> Array:
    """Write a run; the clock time of each step, int64 ``[steps]``, ns since 1970.

    Args:
        local: each EP rank records the tokens that it sent, and a lost rank records nothing; else one rank
            records for all.
        options: of the writers.
    """
    steps, layers, _ = run.load.shape
    rng = np.random.default_rng(seed)
    times: Array = START_NS + np.cumsum(rng.integers(8_000_000, 30_000_000, steps))
    lost = {t.ranks[0]: range(t.first, t.end) for t in run.truths if t.kind == "rank_lost" and local}
    clock = PlantedClock()
    writers: dict[int, ExpertLoadWriter] = {}
    maps = [run.history.layer(layer) for layer in range(layers)]
    changes = {step for history in maps for step in history.steps}
    placement = np.empty(run.load.shape[1:], np.int32)
    monkeypatch.setattr("eplb_dump.writer.time", clock)
    for step, load in enumerate(run.load):
        clock.ns = int(times[step])
        if step in changes:
            placement = np.stack([history.at(step) for history in maps])  # type: ignore[arg-type]
        serving = [rank for rank in range(run.ranks if local else 1) if step not in lost.get(rank, ())]
        sent = rng.multinomial(load, [1 / len(serving)] * len(serving)) if local else load[..., np.newaxis]
        for rank in writers.keys() - set(serving):
            writers.pop(rank).close(60)
        for number, rank in enumerate(serving):
            if rank not in writers:
                writers[rank] = open_writer(
                    root, num_logical_experts=run.num_logical, ep_size=run.ranks, ep_rank=rank,
                    scope="local" if local else "global", **options,
                )  # fmt: skip
            writers[rank].record(step, sent[..., number], placement)
        if step % 100 == 99:
            assert all(writer.flush(60) for writer in writers.values())
    assert all(writer.close(60) for writer in writers.values())
    return times


def incidents_of(document: dict[str, Any], times: Array) -> list[Incident]:
    """The incidents of ``summary --json``, whose clock times must be the planted ones, to a millisecond."""
    found = []
    for row in document["incidents"]:
        ended = dict(row["ended_by"])
        shown = {row["first_step"]: row["since"], row["last_step"]: row["until"]}
        shown[ended["step"]] = ended.pop("time")
        for step, text in shown.items():
            time = datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
            assert abs(time - times[step] / 1e9) < 0.0011, (row, times[step])
        values = {
            "layers": tuple(row["layers"]),
            "ranks": tuple(row["ranks"]),
            "cause": Cause(**row["cause"]),
            "ended_by": EndedBy(**ended),
            "cost": IncidentCost(None, row["cost"]["tokens_per_step"]),
        }
        found.append(Incident(**{**row, **values}))
    return found
