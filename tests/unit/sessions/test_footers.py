"""The metadata in the footers of a segment's files is validated, also if other files had valid ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import load_of, map_of, open_writer

from eplb_analyze import open_run
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_dump.format.schema import METADATA_KEY, FormatError


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("session", [None, {}, {"format": "other"}])
def test_session_in_a_footer_must_be_one(session: Any, read_before: bool, tmp_path: Path) -> None:
    with open_writer(tmp_path, scope="global") as writer:
        writer.record(0, load_of(0), map_of())
        assert writer.close(60)
    segment = open_run(tmp_path).sessions[0].segments[0]
    assert isinstance(segment, ParquetSegment)
    if read_before:
        assert segment.load_steps().tolist() == [0]
    table = pq.read_table(segment.file_path("steps"))
    own = json.loads(table.schema.metadata[METADATA_KEY]) | {"session": session}
    changed = table.replace_schema_metadata({METADATA_KEY: json.dumps(own)})
    pq.write_table(changed, tmp_path / "changed")
    with pq.ParquetFile(tmp_path / "changed") as file, pytest.raises(FormatError, match="not the metadata"):
        segment._check_footer(file, "steps")
