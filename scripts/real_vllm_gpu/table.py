"""The table of what ``measure.py`` stored: what the recorder costs, and whether recordings are right.

Reads recordings with ``eplb_dump.format``, numpy and pyarrow only, which the engine's environment has.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from eplb_dump.format.journal import JournalSegment, UnbegunJournal
from eplb_dump.format.manifest import Manifest
from eplb_dump.format.schema import JOURNAL_PATTERN, MANIFEST_FILE, SEGMENT_PATTERN, STATUS_LABELS
from eplb_dump.format.session import SessionInfo

Array = npt.NDArray[Any]
#: Steps at the beginning of a round, in which requests are admitted.
RAMP = 20
STEP, BEFORE, AFTER, PREPARE = 1, 2, 3, 4


class Step(NamedTuple):
    """A row of ``steps``."""

    step: int
    time_ns: int
    status: str
    tokens: int | None


@dataclass
class Session:
    """What one rank recorded."""

    rank: int
    closed: bool
    #: How many journals are not sealed.
    journals: int = 0
    steps: list[Step] = field(default_factory=list)
    #: step -> layer -> the experts in its slots.
    placements: dict[int, dict[int, Array]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Session:
        info = SessionInfo.from_dict(json.loads((folder / "session.json").read_text()))
        manifest = Manifest()
        if (path := folder / MANIFEST_FILE).exists():
            with path.open("rb") as file:
                manifest = Manifest.read(file, path.stat().st_size)
        session = cls(info.ep_rank, closed=manifest.closed is not None)
        names = sorted(path.name for path in folder.iterdir())
        journals = [m for name in names if (m := JOURNAL_PATTERN.fullmatch(name))]
        session.journals = len(journals)
        for match in (m for name in names if (m := SEGMENT_PATTERN.fullmatch(name))):
            # Where a journal is, its segment is not sealed yet.
            if match[2] not in (journal[1] for journal in journals):
                session._add_sealed(folder / match[0], match[1])
        for journal in journals:
            session._add_journal(folder / journal[0])
        session.steps.sort()
        return session

    def _add_sealed(self, path: Path, table: str) -> None:
        if table not in ("steps", "placements"):
            return
        found = pq.read_table(path, page_checksum_verification=True)
        if table == "steps":
            time_ns = found["time"].cast("int64").to_pylist()
            columns = (found[name].to_pylist() for name in ("step", "status", "num_tokens"))
            self.steps += [Step(n, t, *rest) for t, n, *rest in zip(time_ns, *columns, strict=True)]
        else:
            for row in found.to_pylist():
                layers = self.placements.setdefault(row["step"], {})
                layers[row["layer"]] = np.array(row["physical_to_logical"])

    def _add_journal(self, path: Path) -> None:
        try:
            journal = JournalSegment(path)
        except UnbegunJournal:
            return
        with journal:
            self.closed = self.closed or journal.closed is not None
            steps, changes = journal.steps, journal.placements
        for step, time_ns, code, tokens in zip(
            steps.step.tolist(), steps.time_ns.tolist(), steps.status, steps.num_tokens.tolist(), strict=True
        ):
            self.steps.append(Step(step, time_ns, STATUS_LABELS[code], None if tokens < 0 else tokens))
        for step, layer, slots in zip(
            changes.step.tolist(), changes.layer.tolist(), changes.physical_to_logical, strict=True
        ):
            self.placements.setdefault(step, {})[layer] = slots


def recording(dump: Path) -> list[Session]:
    """The sessions of a dump with one run, by rank."""
    sessions = [
        Session.read(path.parent) for path in dump.glob("run=*/model=*/rank=*/session=*/session.json")
    ]
    return sorted(sessions, key=lambda session: session.rank)


def iterations(log: str) -> dict[int, list[int]]:
    """The tokens of each iteration that vLLM logged, by data-parallel engine; dummy ones have no tokens."""
    found: dict[int, list[int]] = {}
    for engine, prompt, new in re.findall(
        r"(?:Engine (\d+): )?Iteration\(\d+\): \d+ context requests, (\d+) context tokens, "
        r"\d+ generation requests, (\d+) generation tokens",
        log,
    ):
        if int(prompt) + int(new):
            found.setdefault(int(engine or 0), []).append(int(prompt) + int(new))
    return found


@dataclass
class Probed:
    """What the workers of one engine measured in one round, by rank."""

    rows: list[Array]
    runner: str
    placements: dict[int, Array]


@dataclass
class Part:
    folder: Path
    events: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Part | None:
        path = folder / "results.jsonl"
        return (
            cls(folder, [json.loads(line) for line in path.read_text().splitlines()])
            if path.exists()
            else None
        )

    def of(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.events if one["event"] == event]

    @property
    def setting(self) -> dict[str, Any]:
        return self.of("part")[0]

    @property
    def ranks(self) -> int:
        return int(self.setting["tp"] * self.setting["dp"])

    def probed(self, engine: str, number: int) -> Probed | None:
        """None if the round did not end."""
        paths = [self.folder / "probe" / f"{engine}-{number}-{rank}.npz" for rank in range(self.ranks)]
        if not all(path.exists() for path in paths):
            return None
        rows = []
        for path in paths:
            with np.load(path) as file:
                rows.append(file["rows"])
                # Placements are the same on all ranks.
                placements = dict(zip(file["placement_steps"].tolist(), file["placements"], strict=True))
                runner = str(file["runner"])
        return Probed(rows, runner, placements)

    def tokens(self, engine: str, number: int) -> Array | None:
        path = self.folder / "tokens" / f"{engine}-{number}.npy"
        return np.load(path) if path.exists() else None


Row = tuple[str, str, str]


def rows_of(out: Path) -> list[Row]:
    """Measured, value and goal of each row."""
    cost, check = Part.read(out / "cost"), Part.read(out / "check")
    rows: list[Row] = []
    if cost is not None:
        rows += cost_rows(cost)
    if check is not None:
        rows += check_rows(check)
    rows += tokens_rows([part for part in (cost, check) if part is not None])
    if check is not None:
        rows += placement_rows(check)
    if cost is not None:
        rows += closed_rows(cost)
    if check is not None:
        rows += killed_rows(check)
    return rows


def cost_rows(part: Part) -> list[Row]:
    measured: dict[str, list[Probed]] = {}
    rounds = [one for one in part.of("round") if one["number"] > 0]  # 0 is the warm-up
    for name in "off", "on", "off2":
        found = [part.probed(name, one["number"]) for one in rounds]
        measured[name] = [one for one in found if one is not None]
    rounds = rounds[: min(map(len, measured.values()))]
    if not rounds:
        return [("cost", "not measured: no round was completed", "")]

    def all_rows(*names: str) -> Array:
        return np.concatenate([rows for name in names for one in measured[name] for rows in one.rows])

    on, off = all_rows("on"), all_rows("off", "off2")
    own = (on[:, BEFORE] + on[:, AFTER]) / 1e3
    rows = [
        ("`EplbState.step`, without and with the plugin, p50", _two(off[:, STEP], on[:, STEP]), ""),
        (
            "the recorder's own part of it, p50, p99, max",
            f"{np.median(own):.1f}, {np.quantile(own, 0.99):.1f}, {own.max():.0f} µs of {len(own):,} steps",
            "p50 ≤ 20, p99 ≤ 60 µs",
        ),
    ]
    if off[:, PREPARE].any():
        text = _two(off[:, PREPARE], on[:, PREPARE])
        rows.append(("`EplbState.prepare_forward`, without and with, p50", text, ""))
    for shape in dict.fromkeys((one["batch"], one["new"]) for one in rounds):
        chosen = [i for i, one in enumerate(rounds) if (one["batch"], one["new"]) == shape]
        period = {name: np.array([_period(measured[name][i]) for i in chosen]) for name in measured}
        without = (period["off"] + period["off2"]) / 2
        what = f"median step period, batch {shape[0]} ({np.median(without):.2f} ms)"
        noise = _ratio(period["off2"] / period["off"])
        rows.append((f"{what}, with over without", _ratio(period["on"] / without), "≤ +0.3%"))
        rows.append((f"{what}, without over without", noise, "the noise"))
    rows += [*first_step_rows(part), *complete_rows(part, rounds)]
    return rows


def first_step_rows(part: Part) -> list[Row]:
    warm_up = part.probed("on", 0)
    if warm_up is None or not all(len(one) for one in warm_up.rows):
        return []
    first = [f"{(one[0, BEFORE] + one[0, AFTER]) / 1e6:.1f}" for one in warm_up.rows]
    return [("the recorder's own part of the first step, by rank", f"{', '.join(first)} ms", "≤ 2 ms")]


def complete_rows(part: Part, rounds: list[dict[str, Any]]) -> list[Row]:
    """Whether the rounds that were timed, and the warm-up, are recorded completely."""
    made = 0
    for number in (0, *(one["number"] for one in rounds)):
        probed = part.probed("on", number)
        made += sum(map(len, probed.rows)) if probed is not None else 0
    steps = [step for session in recording(part.folder / "dump") for step in session.steps]
    kept = sum(step.status in ("recorded", "dummy") for step in steps)
    return [("steps recorded, of those that were timed", f"{kept:,} of {made:,}", "all")]


def _two(off: Array, on: Array) -> str:
    return f"{np.median(off) / 1e3:.1f} and {np.median(on) / 1e3:.1f} µs"


def _period(probed: Probed) -> float:
    """The median time between two steps, in ms, as mean over ranks."""
    return float(np.mean([np.median(np.diff(rows[:, 0])[RAMP:]) for rows in probed.rows]) / 1e6)


def _ratio(ratios: Array) -> str:
    """Mean of the rounds, with a 95% bootstrap interval."""
    chosen = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(chosen.mean(axis=1), [0.025, 0.975])
    text = f"{100 * (ratios.mean() - 1):+.2f}%"
    if len(ratios) == 1:
        return f"{text} in 1 round"
    return f"{text} ({100 * (low - 1):+.2f} to {100 * (high - 1):+.2f}) in {len(ratios)} rounds"


def check_rows(part: Part) -> list[Row]:
    before = part.of("before the kill")
    if not before:
        return [("steps recorded", "not measured: the rounds were not completed", "")]
    with (part.folder / "on.log").open("rb") as file:
        made = iterations(file.read(before[0]["log_bytes"]).decode(errors="replace"))
    sessions = recording(part.folder / "dump")
    if len(sessions) != part.ranks:
        return [("steps recorded", f"{len(sessions)} of {part.ranks} ranks recorded", "every step")]
    recorded = equal = known = expected = dummies = 0
    for session in sessions:
        real = [step for step in session.steps if step.status != "dummy"]
        dummies += len(session.steps) - len(real)
        # All ranks of one data-parallel engine take part in each of its iterations.
        logged = made.get(session.rank // part.setting["tp"], [])
        expected += len(logged)
        for step, tokens in zip(real, logged, strict=False):
            recorded += step.status == "recorded"
            known += step.tokens is not None
            equal += step.tokens == tokens
    text = f"{recorded:,} of {expected:,} on {part.ranks} ranks"
    if dummies:
        text += f", and {dummies:,} dummy steps"
    same = f"{equal:,} of {expected:,}" if known else "the recording does not have them"
    return [
        ("steps recorded, of the steps in vLLM's iteration log", text, "all"),
        ("tokens of a step, equal in the recording and the log", same, "all"),
    ]


def tokens_rows(parts: list[Part]) -> list[Row]:
    equal = {"on": 0, "off2": 0}
    compared = 0
    for part in parts:
        for one in part.of("round"):
            off, on, off2 = (part.tokens(name, one["number"]) for name in ("off", "on", "off2"))
            if off is None or on is None or off2 is None:
                continue
            compared += 1
            equal["on"] += np.array_equal(off, on)
            equal["off2"] += np.array_equal(off, off2)
    if not compared:
        return []
    text = f"{equal['on']} of {compared} rounds (without and without: {equal['off2']})"
    return [("generated tokens, equal with and without the plugin", text, "all")]


def placement_rows(part: Part) -> list[Row]:
    what = "placements, equal with and without the plugin"
    if part.setting["dp"] > 1:
        return [(what, "not compared: with data parallelism, vLLM admits requests as they arrive", "")]
    if part.setting["use_async"]:
        return [(what, "not compared: asynchronous EPLB moves each layer when it is ready", "")]
    numbers = [one["number"] for one in part.of("round")]
    found: dict[str, dict[int, Array]] = {"off": {}, "off2": {}}
    steps = 0
    for name, placements in found.items():
        for number in numbers:
            probed = part.probed(name, number)
            if probed is not None:
                placements |= {k: v for k, v in probed.placements.items() if k not in placements}
                steps += len(probed.rows[0]) if name == "off" else 0
    sessions = recording(part.folder / "dump")
    if not sessions or not steps:
        return [(what, "not compared: nothing was recorded", "")]
    on = dict(_whole_placements(sessions[0].placements, steps))
    text = _agreement(found["off"], on)
    return [(what, f"{text} (without and without: {_agreement(found['off'], found['off2'])})", "all")]


def _whole_placements(changes: dict[int, dict[int, Array]], steps: int) -> Iterator[tuple[int, Array]]:
    """Each placement that begins in the first ``steps`` steps: its first step, and [layers, slots]."""
    now: dict[int, Array] = {}
    for step, layers in sorted(changes.items()):
        if step < steps:
            now |= layers
            yield step, np.array([now[layer] for layer in sorted(now)])


def _agreement(one: dict[int, Array], other: dict[int, Array]) -> str:
    """Placements that begin at the same step and are equal."""
    steps = one.keys() | other.keys()
    equal = sum(s in one and s in other and np.array_equal(one[s], other[s]) for s in steps)
    return f"{equal} of {len(steps)}"


def closed_rows(part: Part) -> list[Row]:
    ended = [one for one in part.of("closed") if one["engine"] == "on"]
    if not ended:
        return []
    sessions = recording(part.folder / "dump")
    closed = sum(session.closed for session in sessions)
    sealed = sum(session.closed and session.journals == 0 for session in sessions)
    text = f"{closed} of {part.ranks} sessions closed, {sealed} sealed"
    if ended[0]["status"] is None:
        text += "; the engine did not end"
    return [("after an orderly shutdown", text, "all sealed")]


def killed_rows(part: Part) -> list[Row]:
    killed = part.of("killed")
    sessions = recording(part.folder / "dump")
    if not killed or not sessions:
        return []
    ages = [(killed[0]["time_ns"] - one.steps[-1].time_ns) / 1e9 for one in sessions if one.steps]
    text = f"{', '.join(f'{age:.2f}' for age in ages)} s before the kill"
    return [("last recorded step after `kill -9`, by rank", text, "≤ 1 s: the flush interval")]


def title(out: Path) -> str:
    parts = [part for part in (Part.read(out / name) for name in ("cost", "check")) if part is not None]
    if not parts:
        raise SystemExit(f"real_vllm_gpu.sh: error: {out} has no results: name the folder given as --out")
    part = parts[0]
    setting, ready = part.setting, part.of("ready")
    text = f"TP {setting['tp']}, DP {setting['dp']}"
    if setting["layers"] and setting["experts"]:
        text += (
            f"; {setting['layers']} layers × {setting['experts']} experts + {setting['redundant']} redundant"
        )
    for one in setting["set"]:
        text += f"; {one}"
    if ready:
        first = ready[0]
        runner = next((p.runner for p in (part.probed("on", n) for n in range(2)) if p is not None), "")
        version = "V2" if ".gpu.model_runner" in runner else "V1"
        text = (
            f"vLLM {first['vllm']} (model runner {version}), torch {first['torch']}, "
            f"{part.ranks} × {first['gpu']}, {text}"
        )
    return text


def print_table(out: Path) -> None:
    print(f"{title(out)}\n")
    print("| measured | value | goal |\n| --- | --- | --- |")
    for row in rows_of(out):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    print_table(Path(sys.argv[1]))
