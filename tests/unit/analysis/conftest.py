"""Fixtures that several tests of `analysis` share."""

from __future__ import annotations

import pytest
from small_run import KINDS, Truth, write


@pytest.fixture(scope="module", params=KINDS)
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """The small run in each of its kinds."""
    return write(tmp_path_factory.mktemp(request.param), **KINDS[request.param])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return write(tmp_path_factory.mktemp("local"))
