"""The changelog's form, and what keeps a commit from being released."""

from __future__ import annotations

import re
import subprocess

import pytest
from helpers import ROOT

import eplb_dump
from scripts.package import changelog, release_problems

TEXT = (ROOT / "CHANGELOG.md").read_text()


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_changelog_begins_with_what_is_not_released() -> None:
    assert TEXT.startswith("# Changelog\n\nWhat a user notices, newest first.\n\n## Unreleased\n")


def test_changelog_has_every_release_in_order() -> None:
    headings = list(changelog(TEXT))[1:]
    released = [re.fullmatch(r"(\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)", heading) for heading in headings]
    assert all(released), headings
    versions = [number(one[1]) for one in released if one]
    dates = [one[2] for one in released if one]
    assert versions == sorted(set(versions), reverse=True)
    assert dates == sorted(dates, reverse=True)
    assert number(eplb_dump.__version__) >= max(versions, default=(0,))
    tags = subprocess.run(
        ["git", "tag", "--list", "v*"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {number(tag[1:]) for tag in tags.stdout.split()} <= set(versions)


def test_changelog_is_lists_under_topics() -> None:
    for heading, text in changelog(TEXT).items():
        for topic in re.split(r"^### .+\n", text, flags=re.MULTILINE)[1:]:
            assert topic.strip().startswith("- "), heading
        for line in text.splitlines():
            assert re.match(r"(- \S|  \S|### \S|[A-Z]|$)", line), line


RELEASED = "# Changelog\n\n## Unreleased\n\n## 1.2.0 (2027-01-31)\n\n- A change.\n"


def problems(**changed: object) -> list[str]:
    ready = {"status": "", "tags": ["v1.2.0"], "changes": RELEASED, "project": "github.com/someone/"}
    return release_problems("1.2.0", **(ready | changed))  # type: ignore[arg-type]


def test_commit_that_is_ready_can_be_released() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"status": " M README.md"}, "not committed"),
        ({"tags": ["v1.1.0"]}, "no tag v1.2.0"),
        ({"changes": RELEASED.replace("1.2.0", "1.1.0")}, "no heading `## 1.2.0"),
        ({"changes": RELEASED.replace(" (2027-01-31)", "")}, "no heading"),
        ({"changes": RELEASED.replace("Unreleased\n", "Unreleased\n\n- Another.\n")}, "under Unreleased"),
        ({"project": 'Source = "https://github.com/OWNER/eplb-dump"'}, "placeholder"),
    ],
)
def test_commit_that_is_not_ready_is_refused(changed: dict[str, object], words: str) -> None:
    (problem,) = problems(**changed)
    assert words in problem
