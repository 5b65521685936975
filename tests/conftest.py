"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from eplb_dump import budget, rendezvous, start
from eplb_dump.format import files

if TYPE_CHECKING:
    from s3 import S3


# How long an example takes depends on the machine and on what else it does.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half as many workers again as cores: tests also wait, for engines, servers, a browser and the disk."""
    cores = len(os.sched_getaffinity(0))
    return cores + (cores + 1) // 2


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's variables around the test run must not leak into what the tests write."""
    own = budget.MAX_BYTES_VARIABLE, budget.MAX_AGE_VARIABLE, budget.MIN_FREE_VARIABLE
    for name in (rendezvous.RUN_ID_VARIABLE, *own, *start.LAUNCH_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server of this machine, and credentials for it in the environment."""
    from s3 import S3

    with S3.started() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in S3.ENVIRONMENT.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def swaps(tmp_path: Path) -> None:
    """Skip the test if two names cannot be swapped here."""
    for name in ("swap-a", "swap-b"):
        (tmp_path / name).mkdir()
    try:
        files.exchange(tmp_path / "swap-a", tmp_path / "swap-b")
    except OSError:
        pytest.skip("the file system of temporary files cannot swap two names: `prune --merge-ranks`")
    finally:
        for name in ("swap-a", "swap-b"):
            (tmp_path / name).rmdir()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """The last lines say what was not tested, and why: a skipped test must not look like a passed one."""
    result = yield
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
    for reason, count in reasons.items():
        tests = "1 test" if count == 1 else f"{count} tests"
        terminalreporter.write_line(f"NOT TESTED: {tests}: {reason}", yellow=True, bold=True)
    return result
