"""What a power cut can leave of a session's folder, if the disk keeps only what was synced.

POSIX promises no more: a name is there for good once its folder was synced, content once its file was. What
came later can be there or not, each name and file for itself; unsynced content also in part, or as zeros.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Inode = int


@dataclass(frozen=True)
class Moment:
    """The folder before one system call: names and content, for good and at the moment."""

    call: str
    synced_names: dict[str, Inode]
    names: dict[str, Inode]
    synced: dict[Inode, bytes]
    content: dict[Inode, bytes]
    #: What the test knew to be safe.
    promised: int

    def cut(self, seed: int) -> dict[str, bytes]:
        """One of the states that a power cut can leave: content by name."""
        rng = random.Random(seed)
        left: dict[str, bytes] = {}
        for name in sorted({*self.synced_names, *self.names}):
            inode = rng.choice([self.synced_names.get(name), self.names.get(name)])
            if inode is None:
                continue
            safe, now = self.synced.get(inode, b""), self.content[inode]
            end = rng.randint(min(len(safe), len(now)), len(now))
            left[name] = rng.choice([safe, now, now[:end], safe + bytes(max(0, len(now) - len(safe)))])
        return left


class Disk:
    """Watches the calls that change or sync one session's folder, wherever it appears under ``root``."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, promised: Callable[[], int]) -> None:
        self.moments: list[Moment] = []
        self.calls: list[tuple[str, str]] = []
        self._root = root
        self._promised = promised
        self._lock = threading.RLock()
        self._synced_names: dict[str, Inode] = {}
        self._synced: dict[Inode, bytes] = {}
        self._content: dict[Inode, bytes] = {}
        #: Kept, so that no later file gets the inode number of a removed one.
        self._open: dict[Inode, int] = {}
        for name in ("fsync", "replace", "unlink", "link"):
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    @property
    def folder(self) -> Path:
        """The session's folder."""
        return next(self._root.glob("run=*/model=*/rank=*/session=*"), self._root)

    def _names(self) -> dict[str, Inode]:
        names: dict[str, Inode] = {}
        folder = self.folder
        for path in folder.iterdir() if folder != self._root and folder.is_dir() else ():
            if not path.is_file():
                continue
            inode = path.stat().st_ino
            names[path.name] = inode
            self._content[inode] = path.read_bytes()
            if inode not in self._open:
                self._open[inode] = os.open(path, os.O_RDONLY)
        return names

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with self._lock:
                names = self._names()
                target = self._target(name, args, names)
                self.calls.append((name, target))
                self.moments.append(
                    Moment(
                        f"{name} {target}",
                        dict(self._synced_names),
                        names,
                        dict(self._synced),
                        dict(self._content),
                        self._promised(),
                    )
                )
                result = real(*args, **options)
                if name == "fsync" and target == ".":
                    self._synced_names = self._names()
                elif name == "fsync" and target in names:
                    self._synced[names[target]] = self._content[names[target]]
                return result

        return call

    def _target(self, name: str, args: tuple[Any, ...], names: dict[str, Inode]) -> str:
        """The file's name in the folder, ``.`` for the folder, else the path relative to the root."""
        if name != "fsync":
            return Path(args[-1]).name
        inode = os.fstat(args[0]).st_ino
        if inode == self.folder.stat().st_ino:
            return "."
        known = [file for file, its in names.items() if its == inode]
        above = [path for path in (self.folder, *self.folder.parents) if path.stat().st_ino == inode]
        return known[0] if known else os.path.relpath(above[0], self.folder) if above else "?"

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)


def restore(state: dict[str, bytes], session: Path, root: Path, into: Path) -> Path:
    """A dump ``into`` with a session's folder as a power cut left it."""
    folder = into / session.relative_to(root)
    folder.mkdir(parents=True)
    for name, content in state.items():
        (folder / name).write_bytes(content)
    return into
