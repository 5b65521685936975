"""Fixtures for all tests."""

from __future__ import annotations

import pytest

from eplb_dump import rendezvous


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's variables around the test run must not leak into what the tests write."""
    for name in (rendezvous.RUN_ID_VARIABLE, *rendezvous._LAUNCH_VARIABLES):
        monkeypatch.delenv(name, raising=False)
