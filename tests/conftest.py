"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from eplb_dump import rendezvous

if TYPE_CHECKING:
    from s3 import S3


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's variables around the test run must not leak into what the tests write."""
    for name in (rendezvous.RUN_ID_VARIABLE, *rendezvous._LAUNCH_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server of this machine, and credentials for it in the environment."""
    from s3 import S3

    with S3.started() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in S3.ENVIRONMENT.items():
            patch.setenv(name, value)
        yield server
