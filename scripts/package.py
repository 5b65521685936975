"""Build the source archive and the wheel of the current commit: `python -m scripts.package dist`.

Builds twice, in two folders, and writes the files only if both builds have the same bytes. `--release` also
checks that the commit is ready to be released (RELEASING.md).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Stands for the account that will publish the project.
PLACEHOLDER = "github.com/OWNER/"


def build(source: Path, out: Path, epoch: int) -> list[Path]:
    """Build both packages of a source tree. Their times are ``epoch``, whatever the files' times are."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", out],
        cwd=source, check=True, stdout=subprocess.DEVNULL,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "HATCH_QUIET": "1"},
    )  # fmt: skip
    return sorted(out.iterdir())


def build_twice(out: Path) -> list[Path]:
    """Build the commit in two folders; an error if the files differ, or if an index would refuse them."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        builds = []
        for name in ("one", "another"):
            source = Path(folder, name)
            source.mkdir()
            subprocess.run(["tar", "-x"], cwd=source, input=archive, check=True)
            builds.append(build(source, source / "dist", int(git("log", "-1", "--format=%ct"))))
        for file, again in zip(*builds, strict=True):
            if file.read_bytes() != again.read_bytes():
                sys.exit(f"scripts.package: error: two builds of {file.name} differ")
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *builds[0]], check=True)
        out.mkdir(parents=True, exist_ok=True)
        for file in builds[0]:
            (out / file.name).write_bytes(file.read_bytes())
        return [out / file.name for file in builds[0]]


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def changelog(text: str) -> dict[str, str]:
    """The text below each heading of the changelog, newest first."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def release_problems(version: str, *, status: str, tags: list[str], changes: str, project: str) -> list[str]:
    """What keeps a commit from being released.

    ``status`` is what git prints about the work tree, ``tags`` are those of the commit, ``changes`` and
    ``project`` are the texts of CHANGELOG.md and pyproject.toml.
    """
    sections = changelog(changes)
    conditions = {
        "there are changes that are not committed": bool(status),
        f"the commit has no tag v{version}": f"v{version}" not in tags,
        f"CHANGELOG.md has no heading `## {version} (YYYY-MM-DD)`": not any(
            re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", heading) for heading in sections
        ),
        "CHANGELOG.md still has lines under Unreleased": bool(sections.get("Unreleased", "").strip()),
        f"pyproject.toml still has the placeholder {PLACEHOLDER}": PLACEHOLDER in project,
    }
    return [problem for problem, holds in conditions.items() if holds]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.package", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("out", type=Path, help="the folder that gets the files")
    parser.add_argument(
        "--release", action="store_true", help="refuse a commit that is not ready to be released"
    )
    arguments = parser.parse_args()
    if arguments.release:
        source = (ROOT / "eplb_dump/format/__init__.py").read_text()
        (version,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
        problems = release_problems(
            version,
            status=git("status", "--porcelain"),
            tags=git("tag", "--points-at", "HEAD").splitlines(),
            changes=(ROOT / "CHANGELOG.md").read_text(),
            project=(ROOT / "pyproject.toml").read_text(),
        )
        for problem in problems:
            print(f"scripts.package: error: {problem}", file=sys.stderr)
        if problems:
            sys.exit(1)
    for file in build_twice(arguments.out):
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}")


if __name__ == "__main__":
    main()
