"""`prune` on hundreds of runs, live, broken and in a bucket, against what its documentation says; and kills.

The oracle follows the sentences of docs/cli.md ("prune"), from what the test knows of the runs that it made,
and simulates them one segment at a time. It shares no code with `prune`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aged_runs import DAY, aged_session, begin_journal, set_back
from helpers import ROOT, cli, start_child
from s3 import S3

from eplb_analyze.cli.commands import prune as command
from eplb_dump.format.manifest import Manifest, SealedSegment
from eplb_dump.format.schema import MANIFEST_FILE, SEGMENT_PATTERN, SESSION_FILE, Scope
from eplb_dump.format.session import SessionInfo, load_json

HOUR = DAY // 24
TIERS = ["full", "ranks", "minutes", "gone"]
KEPT = {
    "full": {"steps", "loads", "placements", "minutes"},
    "ranks": {"steps", "ranks", "placements", "minutes"},
    "minutes": {"minutes", "placements"},
    "gone": {"placements"},
}
SHARES = {"full": 0.60, "ranks": 0.25, "minutes": 0.15}


@dataclass(eq=False)
class Planted:
    """A run as the test made it: its segments' times by session, and what is special about it."""

    run_id: str
    folders: list[Path] = field(default_factory=list)
    #: By session: the time of the last step of each segment.
    ends: list[list[int]] = field(default_factory=list)
    rearranged: set[int] = field(default_factory=set)
    closed: bool = True
    #: Its writer is, or may be, alive.
    live: bool = False
    #: It can be thinned, but not removed for bytes; with ``never`` not by age either.
    stuck: bool = False
    never: bool = False
    #: When its newest journal was written; its manifest is damaged: nothing of it can be thinned.
    journal_ns: int = 0
    unreadable: bool = False
    #: (session, segment) of which a file is missing, and of which a page is damaged.
    missing: set[tuple[int, int]] = field(default_factory=set)
    damaged: set[tuple[int, int]] = field(default_factory=set)

    @property
    def newest(self) -> int:
        return max([self.journal_ns, 0, *(end for ends in self.ends for end in ends)])


KINDS = [
    *["plain"] * 12, "ranks", "ranks", "ranks", "rearranged", "crashed", "live", "idle", "journal",
    "manifest", "missing", "damaged", "foreign", "empty",
]  # fmt: skip


def plant(dump: Path, number: int, now: int, chance: random.Random, held: ExitStack) -> Planted:
    kind = KINDS[number % len(KINDS)]
    run = Planted(f"{kind}-{number:03}")
    # The older, the rarer; no age is near a limit of the tests.
    age = chance.choice([4, 8, 20, 30, 30, 60, 100, 200, 300, 500, 1000]) * HOUR + chance.randrange(HOUR)
    apart = chance.choice([1, 2, 60]) * HOUR // 60
    count = 0 if kind == "empty" else chance.choice([1, 1, 2, 4]) if kind != "rearranged" else 6
    last = [now - age - (count - 1 - k) * apart for k in range(count)]
    run.closed = kind not in ("crashed", "live", "idle", "journal", "empty")
    if kind == "idle":
        last = [end + age - min(age, 20 * HOUR) for end in last]
        run.live = True
    if kind in ("crashed", "empty"):
        last = [end - DAY for end in last]
    if kind == "rearranged":
        run.rearranged = {3}
    for rank in range(3 if kind == "ranks" else 1):
        run.ends.append(last)
        run.folders.append(
            aged_session(
                dump, run.run_id, last, rank=rank, scope=Scope.LOCAL if kind == "ranks" else Scope.GLOBAL,
                closed=run.closed, rearranged=sorted(run.rearranged), steps=32,
            )
        )  # fmt: skip
    folder = run.folders[0]
    info = SessionInfo.from_dict(load_json((folder / SESSION_FILE).read_bytes()))
    if kind in ("live", "journal"):
        run.journal_ns = last[-1] + HOUR // 60
        journal = begin_journal(folder, info, count, run.journal_ns)
        run.live, run.stuck = kind == "live", kind == "journal"
        if run.live:
            held.callback(journal.close)
        else:
            journal.close()
        os.utime(journal.path, ns=(run.journal_ns, run.journal_ns))
    elif kind == "manifest":
        data = bytearray((folder / MANIFEST_FILE).read_bytes())
        data[0] ^= 1
        (folder / MANIFEST_FILE).write_bytes(data)
        set_back(folder, last[-1])
        run.unreadable = run.stuck = True
    elif kind == "missing":
        (folder / f"loads-{count - 1:06}.parquet").unlink()
        run.missing, run.stuck = {(0, count - 1)}, True
    elif kind == "damaged":
        path = folder / "loads-000000.parquet"
        group = pq.read_metadata(path).row_group(0)
        (sums,) = [c for i in range(5) if (c := group.column(i)).path_in_schema.startswith("rank_load")]
        data = bytearray(path.read_bytes())
        data[sums.data_page_offset + sums.total_compressed_size - 1] ^= 1
        path.write_bytes(data)
        run.damaged = {(0, 0)}
    elif kind == "foreign":
        (folder.parent / "notes.txt").write_text("mine")
        run.never = True
    elif kind == "empty":
        run.ends = [
            [now - DAY]
        ]  # when it was created; it is not closed, so for a day its writer may be alive
        folder = run.folders[0]
        run.live = True
    return run


# ---- the oracle


@dataclass(eq=False)
class Segment:
    run: Planted
    session: int
    seq: int
    end: int
    tier: str
    sizes: dict[str, int]
    notable: bool
    fixed: bool


def manifest_of(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    with path.open("rb") as file:
        return Manifest.read(file, path.stat().st_size)


def tiers_of(folder: Path) -> dict[int, str]:
    return {
        seq: entry.tier.value
        for entry in manifest_of(folder).entries.values()
        for seq in range(entry.seq, entry.last_seq + 1)
    }


def sizes_of(folder: Path, entry: SealedSegment) -> dict[str, int]:
    """A segment's bytes in each tier that it can get; without the sums per rank, an upper bound."""
    found = {}
    files, tier = entry.files, entry.tier.value
    for to in TIERS[TIERS.index(tier) :]:
        found[to] = sum(file.bytes for table, file in files.items() if table in KEPT[to] or to == tier)
        if to == "ranks" and tier == "full" and (folder / files["loads"].name).exists():
            metadata = pq.read_metadata(folder / files["loads"].name)
            columns = [
                metadata.row_group(g).column(c)
                for g in range(metadata.num_row_groups)
                for c in range(metadata.num_columns)
            ]
            kept = [c.total_compressed_size for c in columns if not c.path_in_schema.startswith("load")]
            found[to] += sum(kept) + metadata.serialized_size + 8 + 4
    if tier == "full":  # the experts' sums in the manifest, of which 2 kB are not counted
        found[tier] += max(0, len(entry.to_frame()) - 2048)
    return found


def segments_of(run: Planted) -> list[Segment]:
    if run.unreadable:
        return []
    found = []
    for number, (folder, ends) in enumerate(zip(run.folders, run.ends, strict=True)):
        noted = {0, *run.rearranged} if ends else set()
        if not run.closed and ends:
            noted.add(len(ends) - 1)
        for entry in manifest_of(folder).entries.values() if (folder / MANIFEST_FILE).exists() else ():
            tier = entry.tier.value
            assert set(entry.notable) <= {"start", "rearrangement"}
            found.append(
                Segment(
                    run, number, entry.seq, ends[entry.last_seq], tier, sizes_of(folder, entry),
                    bool({entry.seq - 1, *range(entry.seq, entry.last_seq + 2)} & noted),
                    (number, entry.seq) in run.missing,
                )
            )  # fmt: skip
    return found


class Oracle:
    """What the limits keep: ``tiers`` by run, session and number; None: the run is removed."""

    def __init__(self, runs: list[Planted], now: int) -> None:
        self.now = now
        self.runs = {run: segments_of(run) for run in runs if run.folders[0].exists()}
        self.size = {
            run: sum(
                path.stat().st_size
                for folder in run.folders
                for path in folder.iterdir()
                if path.name != "notes.txt"
            )
            for run in self.runs
        }

    def ages(self, full: int, ranks: int, minutes: int) -> None:
        for run, segments in [*self.runs.items()]:
            if run.live:
                continue
            for segment in segments:
                age = self.now - segment.end
                to = TIERS[(age > full) + (age > ranks) + (age > minutes)]
                if not segment.fixed and TIERS.index(to) > TIERS.index(segment.tier):
                    self.put(segment, to)
            if self.now - run.newest > minutes and not run.never:
                del self.runs[run]

    def bytes(self, most: int) -> None:
        spared: set[Segment] = set()
        taken = 0
        # "The newest run is never removed for its bytes, and its newest segment is not thinned."
        newest_run = max(self.runs, key=lambda run: (run.newest, run.run_id))
        holding = [s for some in self.runs.values() for s in some if not s.fixed and s.tier != "gone"]
        newest = max(holding, key=lambda s: (s.end, s.run.run_id, s.seq), default=None)
        if newest is not None:
            mine = [s for s in holding if s.run is newest.run]
            newest = max(mine, key=lambda s: (s.tier == "full", s.end, s.seq))
        stays = {id(s) for s in holding if newest and s.run is newest.run and s.seq == newest.seq}
        free = [
            s
            for run, some in self.runs.items()
            if not run.live
            for s in some
            if not s.fixed and id(s) not in stays
        ]
        # Ranks of a run go together.
        together: dict[tuple[Planted, int], list[Segment]] = {}
        for segment in free:
            together.setdefault((segment.run, segment.seq), []).append(segment)
        groups = sorted(together.values(), key=lambda g: (max(s.end for s in g), g[0].run.run_id, g[0].seq))
        for group in reversed(groups):
            if any(s.notable for s in group) and any(s.tier == "full" for s in group):
                taken += sum(s.sizes[s.tier] for s in group)
                if taken > 0.20 * most:
                    break
                spared.update(group)
        for some in ([g for g in groups if g[0] not in spared], [g for g in groups if g[0] in spared]):
            while sum(self.size.values()) > most:
                left = [g for g in some if g[0].run in self.runs and g[0].tier != "gone"]
                of_tier = {
                    tier: sum(s.sizes[tier] for some in self.runs.values() for s in some if s.tier == tier)
                    for tier in SHARES
                }
                having = [tier for tier in SHARES if any(g[0].tier == tier for g in left)]
                if not having:
                    break
                above = [tier for tier in having if of_tier[tier] > SHARES[tier] * most]
                tier = (above or having)[0]
                group = next(g for g in left if g[0].tier == tier)
                for segment in group:
                    self.put(segment, TIERS[TIERS.index(tier) + 1])
                run = group[0].run
                if run is newest_run or run.stuck or run.never:
                    continue
                if all(s.tier == "gone" for s in self.runs[run]):
                    del self.runs[run], self.size[run]

    def put(self, segment: Segment, tier: str) -> None:
        self.size[segment.run] += segment.sizes[tier] - segment.sizes[segment.tier]
        segment.tier = tier

    def check(self, runs: list[Planted], dump: Path) -> None:
        """What is in a dump is what is to be kept."""
        for run in runs:
            top = dump / f"run={run.run_id}"
            assert top.exists() == (run in self.runs), run.run_id
            if run not in self.runs or run.unreadable:
                continue
            for number, planted in enumerate(run.folders):
                folder = top / planted.relative_to(planted.parents[2])
                mine = [s for s in self.runs[run] if s.session == number]
                expected = {s.seq: s.tier for s in mine}
                for s in mine:
                    if (number, s.seq) in run.damaged and s.tier == "ranks":
                        expected[s.seq] = "full"  # found when it was read
                found = tiers_of(folder) if mine else {}
                assert {seq: found[seq] for seq in expected} == expected, (run.run_id, number)
                assert_files(folder, run)


def assert_files(folder: Path, run: Planted) -> None:
    if not (folder / MANIFEST_FILE).exists():
        return
    listed = {f.name for e in manifest_of(folder).entries.values() for f in e.files.values()}
    inside = {p.name for p in folder.iterdir() if SEGMENT_PATTERN.fullmatch(p.name.removesuffix(".tmp"))}
    assert inside == listed if not run.missing else inside <= listed


def prune(dump: Path | str, *options: str) -> dict[str, Any]:
    result = cli("prune", *options, "--json", str(dump))
    assert result.returncode in (0, 1), result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def assert_dry_run_said_so(dry: dict[str, Any], real: dict[str, Any], runs: list[Planted]) -> None:
    damaged = {run.run_id for run in runs if run.damaged}
    for one, other in ((dry, real), (real, dry)):
        mine = {run["run_id"]: run for run in one["runs"]}
        theirs = {run["run_id"]: run for run in other["runs"]}
        for run_id, run in mine.items():
            if run_id not in damaged:
                same = ("action", "reason", "moves", "kept")
                assert [run[key] for key in same] == [theirs[run_id][key] for key in same]
    assert real["bytes_after"] <= dry["bytes_after"] or damaged


@contextmanager
def writers(dump: Path) -> Iterator[list[Path]]:
    """Two real writers, in processes of their own, that record until the block ends."""
    script = """
        import sys, time
        from helpers import load_of, map_of, open_writer
        with open_writer(sys.argv[1], run_id=sys.argv[2], scope="global", segment_steps=20) as writer:
            for step in range(90):
                writer.record(step, load_of(step), map_of())
            writer.flush(30)
            while writer.stats().segments_sealed < 4:
                time.sleep(0.01)
            print("ready", flush=True)
            sys.stdin.readline()
    """
    with ExitStack() as stack:
        for name in ("writer-1", "writer-2"):
            child = stack.enter_context(start_child(script, dump, name))
            assert child.stdout is not None
            stack.callback(child.kill)
            assert child.stdout.readline() == "ready\n"
        yield sorted(dump.glob("run=writer-*"))


def of_writer(top: Path) -> Planted:
    """A live run as its writer has left it so far."""
    (folder,) = top.glob("*/*/*")
    ends = [entry.times[1] for entry in manifest_of(folder).entries.values() if entry.times is not None]
    return Planted(top.name[4:], [folder], [ends], closed=False, live=True)


def test_300_runs_are_kept_as_the_documentation_says(
    tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LEAST_BYTES", 1)
    dump = tmp_path / "dump"
    now = time.time_ns()
    chance = random.Random(17)
    with ExitStack() as held:
        runs = [plant(dump, number, now, chance, held) for number in range(297)]
        bucket = f"{s3.bucket()}/dumps"
        in_bucket = [
            run for run in runs if not (run.live or run.never or run.journal_ns or run.unreadable)
        ][:60]  # fmt: skip
        for run in in_bucket:
            s3.put(dump / f"run={run.run_id}", f"{bucket}/run={run.run_id}")
        golden = dump / "run=golden"
        shutil.copytree(ROOT / "tests/golden/v1.0/run=golden", golden)
        for folder in golden.glob("*/*/*"):
            set_back(folder, now - 2 * DAY)
        runs += [of_writer(top) for top in held.enter_context(writers(dump))]
        written = {p: p.read_bytes() for p in dump.glob("run=writer*/**/*") if p.is_file()}

        by_age = ["--keep-full", "36h", "--keep-ranks", "7d", "--keep-minutes", "30d"]
        oracle = Oracle(runs, now)
        oracle.ages(36 * HOUR, 7 * DAY, 30 * DAY)
        before = state_of(dump)
        dry = prune(dump, *by_age, "--dry-run")
        assert state_of(dump) == before
        real = prune(dump, *by_age)
        assert_dry_run_said_so(dry, real, runs)
        oracle.check(runs, dump)
        assert sum(run["action"] == "removed" for run in real["runs"]) > 10
        tiers = {tier for folder in golden.glob("*/*/*") for tier in tiers_of(folder).values()}
        assert tiers <= {"ranks", "minutes", "gone"}  # of format 1.0, recorded in November 2026
        after = state_of(dump)
        prune(dump, *by_age)
        assert state_of(dump) == after

        address = s3.address(bucket)
        before_bucket = s3.get(bucket)
        dry = prune(address, *by_age, "--dry-run")
        assert s3.get(bucket) == before_bucket
        assert_dry_run_said_so(dry, prune(address, *by_age), in_bucket)
        for name, data in s3.get(bucket).items():
            path = tmp_path / "fetched" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        oracle.check(in_bucket, tmp_path / "fetched")
        assert not prune(address, *by_age)["failed"] or any(run.damaged for run in in_bucket)

        shutil.rmtree(golden)
        for share in (0.9, 0.6, 0.3, 0.1):
            oracle = Oracle(runs, now)
            most = int(share * sum(oracle.size.values()))
            oracle.bytes(most)
            dry = prune(dump, "--max-bytes", str(most), "--dry-run")
            real = prune(dump, "--max-bytes", str(most))
            assert_dry_run_said_so(dry, real, runs)
            oracle.check(runs, dump)
        assert {p: p.read_bytes() for p in written} == written
        held.close()  # nothing is alive any more
        ended = [run for run in runs if not run.live]
        for run in runs:
            if run.live:
                shutil.rmtree(dump / f"run={run.run_id}")
        for most in (400_000, 1):
            oracle = Oracle(ended, now)
            oracle.bytes(most)
            prune(dump, "--max-bytes", str(most))
            oracle.check(ended, dump)


def state_of(dump: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(dump)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in dump.rglob("*")
        if p.is_file()
    }


# ---- kills

PRUNE = """
    # Prunes the dumps that stdin names, each in a fork, which is killed after so many seconds, if they are
    # given. Prints how long it took, or null if it was killed.
    import json, os, signal, sys, time
    from pathlib import Path
    from eplb_analyze.transfer.prune import prune_dump
    from eplb_analyze.transfer.retention.plan import Policy
    day = 86_400 * 10**9
    policy = Policy(keep_full=3 * day, keep_ranks=5 * day, keep_minutes=9 * day)
    for line in sys.stdin:
        dump, kill_after = json.loads(line)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            prune_dump(Path(dump), policy)
            os._exit(0)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        print(json.dumps(None if code else time.monotonic() - began), flush=True)
"""


@pytest.fixture
def prune_in_fork() -> Iterator[Callable[..., float | None]]:
    """Prune in another process, and kill it after so many seconds. Returns how long it took, if it ended."""
    with start_child(PRUNE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def prune(dump: Path, kill_after: float | None = None) -> float | None:
            stdin.write(json.dumps([str(dump), kill_after]) + "\n")
            stdin.flush()
            took: float | None = json.loads(stdout.readline())
            return took

        yield prune
        assert child.communicate() == ("", "")
    assert child.returncode == 0


@pytest.mark.parametrize("kills", [8, pytest.param(120, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(
    kills: int, tmp_path: Path, prune_in_fork: Callable[..., float | None]
) -> None:
    now = time.time_ns()
    start = tmp_path / "start"
    ages = [20, 12, 8, 6, 4, 2]
    for number in range(3):
        ends = [now - age * DAY - number * HOUR for age in ages]
        aged_session(start, f"r{number}", ends, rearranged=[2], closed=number != 1)
    for number in range(3):
        aged_session(start, f"old{number}", [now - (30 + number) * DAY] * 2)
    done = Path(shutil.copytree(start, tmp_path / "done"))
    took = prune_in_fork(done)
    assert took is not None
    chance = random.Random(kills)
    expected = sorted((name, size) for name, (size, _) in state_of(done).items() if name != "pruned.jsonl")
    killed = 0
    for _ in range(kills):
        dump = Path(shutil.copytree(start, tmp_path / "dump"))
        for _ in range(chance.choice([1, 1, 2])):
            killed += prune_in_fork(dump, chance.uniform(0, took)) is None
            for folder in dump.glob("run=*/*/*/*"):
                for entry in manifest_of(folder).entries.values():
                    for file in entry.files.values():
                        assert (folder / file.name).stat().st_size == file.bytes
        assert prune_in_fork(dump) is not None
        found = sorted((name, size) for name, (size, _) in state_of(dump).items() if name != "pruned.jsonl")
        assert found == expected
        log = [json.loads(line)["run"] for line in (dump / "pruned.jsonl").read_text().splitlines()]
        assert sorted(log) == ["old0", "old1", "old2"]
        assert sorted(p.name for p in dump.iterdir()) == ["pruned.jsonl", "run=r0", "run=r1", "run=r2"]
        shutil.rmtree(dump)
    assert killed or kills < 100
