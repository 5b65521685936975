"""A batch of runs that all tests of this folder read and none changes."""

from __future__ import annotations

import pytest
from batches import Batch, record_batch


@pytest.fixture(scope="session")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return record_batch(tmp_path_factory.mktemp("batch"))
