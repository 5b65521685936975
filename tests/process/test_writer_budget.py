"""A writer with a budget, in real processes: on a volume that fills up, and killed while it thins."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import Array, cli, run_child, start_child, survived_loads

from eplb_dump.format.manifest import Manifest
from eplb_dump.format.schema import MANIFEST_FILE, Tier


def manifest_of(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    if not path.exists():
        return Manifest()
    with path.open("rb") as file:
        manifest = Manifest.read(file, path.stat().st_size)
    assert manifest.fault is None
    return manifest


def assert_readable(root: Path) -> None:
    """``summary`` prints figures, and ``check`` finds no error."""
    for command in "summary", "check":
        done = cli(command, root)
        assert done.returncode == 0, (root, done.stdout, done.stderr)


# ---- a volume of 50 MB

RECORDER = """
    import json, sys
    from dataclasses import asdict
    import numpy as np
    from helpers import assert_accounted, open_writer

    root, steps = sys.argv[1], int(sys.argv[2])
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(288, 0.5), 58)
    loads = [rng.multinomial(4096 * 8, shares).astype(np.int32) for _ in range(64)]
    placement = np.tile(np.arange(288) % 256, (58, 1))
    writer = open_writer(root, num_logical_experts=256, ep_size=32, scope="global")

    def record():
        step = writer.stats().seen
        writer.record(step, loads[step % 64], placement, num_tokens=4096, phase="decode")
        return step % 100 != 99 or writer.flush(60)

    for _ in range(steps // 3):
        record()
    assert writer.flush(60)
    before = writer.stats()
    assert (before.dropped, before.off, before.paused) == (0, None, None), before
    print("filled?", flush=True)
    sys.stdin.readline()
    while writer.stats().paused is None:
        record()
    print("paused", flush=True)
    sys.stdin.readline()
    while writer.stats().paused is not None or not writer.flush(60):
        pass
    first = writer.stats().seen
    while writer.stats().seen < steps:
        record()
    assert writer.close(60)
    stats = writer.stats()
    assert_accounted(stats)
    assert stats.off is None, stats
    print(json.dumps([first, str(writer.folder), asdict(stats)]))
"""


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "volume"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def record_on_full_volume(volume: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_LOAD_DUMP_MIN_FREE", "1M")
    done = threading.Event()

    def fill() -> None:
        """Take whatever is free, also what the writer frees."""
        with (volume / "filler").open("wb", buffering=0) as file:
            while not done.is_set():
                try:
                    file.write(bytes(1 << 16))
                except OSError:
                    done.wait(0.002)

    filler = threading.Thread(target=fill)
    with start_child(RECORDER, volume / "dump", steps) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "filled?\n", child.communicate()
            filler.start()
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "paused\n", child.communicate()
        finally:
            done.set()
            if filler.ident is not None:
                filler.join()
                (volume / "filler").unlink()
        out, err = child.communicate("\n")
    assert child.returncode == 0, err
    texts = [line.split(":")[0] for line in err.splitlines()]
    assert texts[0] == "expert-load recording is paused; the engine continues", err
    assert "expert-load recording continues" in texts
    assert not [text for text in texts if "is off" in text]
    first, folder, stats = json.loads(out)
    assert set(stats["drop_reasons"]) <= {"No space left on device", "the queue is full"}
    assert stats["seen"] == steps
    entries = sorted(manifest_of(Path(folder)).entries.values(), key=lambda entry: entry.seq)
    # Steps that were dropped have rows in segments without loads.
    assert sum(entry.recorded for entry in entries) == stats["recorded"]
    # It recorded again after the pause, how much depends on the machine; the newest is there in full.
    assert entries[-1].tier is Tier.FULL
    assert any(entry.recorded for entry in entries if entry.first_step >= first)
    assert stats["oldest_full_step"] is not None
    assert_readable(volume / "dump")


def test_small_volume_is_never_full_for_the_writer(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_on_full_volume(volume, 6_000, monkeypatch)


@pytest.mark.long
def test_small_volume_is_never_full_in_an_hour_of_steps(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_on_full_volume(volume, 72_000, monkeypatch)


# ---- kills

HERE = Path(__file__).parent
KILLS = """
    # Forks children that record within a small budget, and kills each at a random moment after the first
    # thinning. Prints how many steps each had flushed.
    import mmap, os, random, signal, struct, sys, time
    sys.path.append(sys.argv[4])
    import numpy as np
    from helpers import open_writer
    from test_writer_budget import load_of
    from eplb_dump import budget

    budget.LEAST_BUDGET, budget.LEAST_SEGMENT = 1 << 18, 1 << 16
    root, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    maps = [(np.arange(256) + np.arange(4)[:, None] + n) % 192 for n in range(2)]
    for number in range(count):
        shared = mmap.mmap(-1, 16)
        every, scope, kept = rng.choice([20, 80]), rng.choice(["local", "global"]), rng.randint(400, 800)
        pid = os.fork()
        if pid == 0:
            writer = open_writer(f"{root}/{number}", scope=scope, ep_size=8 if scope == "global" else 1,
                                 num_logical_experts=192, max_bytes=kept << 10,
                                 segment_steps=rng.choice([30, 10_000]))
            step = 0
            while True:
                writer.record(step, load_of(step), maps[step // 500 % 2])
                step += 1
                if step % every == 0 and writer.flush():
                    shared[:16] = struct.pack("<qq", step, writer.stats().segments_thinned)
        while struct.unpack("<qq", shared[:16])[1] == 0:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.3)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        print(struct.unpack("<qq", shared[:16])[0], flush=True)
"""


def load_of(step: int) -> Array:
    """The same tokens in each layer, ``[4, 256]``; no two steps are alike."""
    return np.stack([np.roll(np.arange(256), step * 7 + 31 * layer) + step // 256 for layer in range(4)])


def kill_while_thinning(root: Path, count: int, seed: int) -> None:
    flushed = [int(line) for line in run_child(KILLS, root, count, seed, HERE, timeout=3600).splitlines()]
    assert len(flushed) == count
    for number, steps in enumerate(flushed):
        (folder,) = (root / str(number)).glob("run=*/model=*/rank=*/session=*")
        found = survived_loads(folder)
        for step, load in found.items():
            assert (load == load_of(step)).all(), (number, step)
        thinned = [entry for entry in manifest_of(folder).entries.values() if entry.thinned]
        assert thinned
        retired = {step for entry in thinned for step in range(entry.first_step, entry.last_step + 1)}
        assert set(range(steps)) <= found.keys() | retired, number
        # What is newer than the last thinned segment is complete; some segments are always kept in full.
        assert max(found) >= steps - 1 > max(retired), number
        assert_readable(root / str(number))


def test_recording_killed_while_thinning_stays_readable(tmp_path: Path) -> None:
    kill_while_thinning(tmp_path, 15, seed=1)


@pytest.mark.long
def test_recording_killed_three_hundred_times_while_thinning_stays_readable(tmp_path: Path) -> None:
    kill_while_thinning(tmp_path, 300, seed=2)
