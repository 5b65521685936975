"""What identifies an engine start, in the metadata of a session."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from helpers import session_info

from eplb_dump import start
from eplb_dump.format.schema import FormatError
from eplb_dump.format.session import SessionInfo, dump_json, load_json


@pytest.mark.parametrize("start_id", [None, "x"])
def test_start_is_read_as_it_was_written(start_id: str | None) -> None:
    info = session_info(launch={"SLURM_JOB_ID": "1"}, start=start.own_start(start_id))
    assert SessionInfo.from_dict(load_json(dump_json(info.to_dict()))) == info
    without = replace(info, start=None)
    assert SessionInfo.from_dict(load_json(dump_json(without.to_dict()))) == without


def test_recording_of_before_and_of_a_newer_minor_version_is_read() -> None:
    fields = session_info(start=start.own_start(None)).to_dict()
    fields["start"]["of_tomorrow"] = 1
    assert SessionInfo.from_dict(json.loads(json.dumps(fields))).start is not None
    del fields["start"]
    assert SessionInfo.from_dict(fields).start is None


@pytest.mark.parametrize(
    "damage",
    [
        [],
        "x",
        {"id": 1},
        {"machine": None},
        {"process": ["1@2"]},
        {"parent": {}},
        {"spawned_unix_ns": -1},
        {"spawned_unix_ns": 1.5},
        {"spawned_unix_ns": True},
        {"spawned_unix_ns": 2**63},
    ],
)
def test_damaged_start_is_an_error(damage: Any) -> None:
    fields = session_info(start=start.own_start(None)).to_dict()
    fields["start"] = {**fields["start"], **damage} if isinstance(damage, dict) else damage
    with pytest.raises(FormatError, match="session metadata"):
        SessionInfo.from_dict(fields)
