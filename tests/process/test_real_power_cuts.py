"""Power cuts on real file systems: every step that the writer counted as sealed is there afterwards.

A file system in an image loses what it had not written, and is mounted again. In tests/unit/transfer,
test_power_cut.py has the same without a file system of its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import load_of, start_child

from eplb_analyze import open_run
from eplb_analyze.transfer.recover import recover_dump

fcntl = pytest.importorskip("fcntl")

#: Options of mkfs, and the size that it needs, in MiB.
FILE_SYSTEMS = {"ext4": (["-q", "-F"], 64), "xfs": (["-q"], 320), "btrfs": (["-q"], 128)}
#: FS_IOC_SHUTDOWN without a flush of the log, from linux/fs.h.
SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, struct.pack("I", 2)
WRITER = """
    import sys, time
    from helpers import load_of, map_of, open_writer
    writer = open_writer(
        sys.argv[1] + "/new/dump", scope="global", segment_steps=int(sys.argv[2]), flush_interval=0.05
    )
    for step in range(10**6):
        writer.record(step, load_of(step), map_of(step // 70))
        time.sleep(0.002)
        if step % 10 == 0:
            print(writer.stats().segments_sealed, flush=True)
"""


def run(*command: str | Path) -> str:
    found = shutil.which(str(command[0])) or f"/sbin/{command[0]}"  # the PATH of a user lacks /sbin
    done = subprocess.run([found, *command[1:]], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextlib.contextmanager
def mounted(image: Path, where: Path, *options: str) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    device = run("losetup", "--show", "-f", image)
    try:
        run("mount", *options, device, where)
        try:
            yield where
        finally:
            run("umount", "-l", where)
    finally:
        run("losetup", "-d", device)


@dataclass(frozen=True)
class Disk:
    """A file system in an image, whose power can be cut."""

    kind: str
    folder: Path

    def make(self, name: str) -> Path:
        image = self.folder / name
        options, megabytes = FILE_SYSTEMS[self.kind]
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        run(f"mkfs.{self.kind}", *options, image)
        return image

    def cut(self, where: Path, image: Path, left: Path) -> None:
        """Leave in the image ``left`` what is on the disk at this moment."""
        if self.kind == "btrfs":  # it has no shutdown: take what it has written so far, at one moment
            run("cp", "--reflink=always", image, left)
            return
        fd = os.open(where, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, NO_LOG_FLUSH)
        finally:
            os.close(fd)

    @property
    def mount_options(self) -> list[str]:
        return ["-o", "nouuid"] if self.kind == "xfs" else []


@pytest.fixture(params=list(FILE_SYSTEMS))
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """Skips the test if this machine cannot mount such a file system."""
    kind = request.param
    if os.geteuid() != 0:
        pytest.skip("power cuts: only root can mount file systems")
    with contextlib.ExitStack() as held:
        folder = tmp_path
        try:
            if kind == "btrfs":  # its image lies on a file system that copies files at one moment
                host = Disk("xfs", tmp_path)
                image = tmp_path / "host"
                with image.open("wb") as file:
                    file.truncate(1 << 30)
                run("mkfs.xfs", "-q", image)
                folder = held.enter_context(mounted(image, tmp_path / "on", *host.mount_options))
            found = Disk(kind, folder)
            with mounted(found.make("trial"), tmp_path / "trial-mount"):
                pass
        except (OSError, subprocess.CalledProcessError):
            pytest.skip(f"power cuts: no {kind} can be made and mounted here (mkfs.{kind}, loop devices)")
        yield found


def steps_of(dump: Path) -> list[int]:
    rows = open_run(dump).loads(layers=[0]).rows(named=True)
    assert all(row["load"] == load_of(row["step"])[0].tolist() for row in rows)
    return [row["step"] for row in rows]


def cut_and_judge(disk: Disk, tmp_path: Path, number: int, rng: random.Random) -> None:
    image, left = disk.make(f"image{number}"), disk.folder / f"left{number}"
    steps, wanted = rng.choice([20, 50, 100]), rng.choice([1, 1, 2, 4])
    with mounted(image, tmp_path / "before") as where, start_child(WRITER, where, steps) as child:
        assert child.stdout is not None
        sealed = 0
        while sealed < wanted:
            sealed = int(child.stdout.readline())
        for _ in range(rng.randrange(30)):
            sealed = int(child.stdout.readline())
        disk.cut(where, image, left)
        child.kill()
    if not left.exists():
        os.replace(image, left)
    with mounted(left, tmp_path / "after", *disk.mount_options) as where:
        dump = where / "new/dump"
        found = steps_of(dump)
        assert found == list(range(len(found)))
        assert len(found) >= sealed * steps, (disk.kind, number)
        recover_dump(dump)
        assert steps_of(dump)[: len(found)] == found
    for path in (image, left):
        path.unlink(missing_ok=True)


def test_power_cut_loses_no_sealed_step(disk: Disk, tmp_path: Path) -> None:
    for number in range(3):
        cut_and_judge(disk, tmp_path, number, random.Random(number))


@pytest.mark.long
def test_hundred_power_cuts_lose_no_sealed_step(disk: Disk, tmp_path: Path) -> None:
    for number in range(100):
        cut_and_judge(disk, tmp_path, number, random.Random(1000 + number))
