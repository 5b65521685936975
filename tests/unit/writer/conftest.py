"""Fixtures for the tests of the writer."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from eplb_dump import background


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, no background thread takes anything off its queue."""
    event = threading.Event()
    real = background.Background._drain

    def wait_and_drain(self: background.Background) -> None:
        event.wait(60)
        real(self)

    monkeypatch.setattr(background.Background, "_drain", wait_and_drain)
    yield event
    event.set()
