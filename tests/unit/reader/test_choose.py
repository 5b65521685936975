"""Which run a command is about: --run with an id or a beginning of one, or the newest."""

from __future__ import annotations

from pathlib import Path

import pytest
from batches import EVEN, record
from helpers import cli, one_error

from eplb_analyze.errors import NotInDumpError
from eplb_analyze.reader.run import open_run
from eplb_analyze.sessions import discovery


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dump")
    with pytest.MonkeyPatch.context() as patch:
        for job, run_id in enumerate(("deploy-1", "deploy-12", "test-a", "twice", "twice")):
            patch.setenv("SLURM_JOB_ID", str(job))
            record(root, run_id, EVEN, steps=4, local=True)
    return root


@pytest.mark.parametrize(
    ("given", "meant"),
    [("test", "test-a"), ("deploy-1", "deploy-1"), ("deploy-12", "deploy-12"), ("tw", "twice@2"),
     ("twice", "twice@2"), ("twice@1", "twice@1"), ("twice@", "twice@2")],
)  # fmt: skip
def test_unique_beginning_of_an_id_is_enough(dump: Path, given: str, meant: str) -> None:
    assert open_run(dump, given).info.run_id == meant


@pytest.mark.parametrize("given", ["", "deploy", "t"])
def test_ambiguous_beginning_names_the_candidates(dump: Path, given: str) -> None:
    with pytest.raises(NotInDumpError, match="write more") as caught:
        open_run(dump, given)
    every = ("deploy-1", "deploy-12", "test-a", "twice")
    for run_id in every:
        assert (run_id in str(caught.value)) == run_id.startswith(given)
    one_error(cli("summary", "--run", given, dump), 2, "write more")


def test_unknown_id_names_runs_and_the_command_that_lists_them(dump: Path) -> None:
    one_error(
        cli("summary", "--run", "zz", dump), 2, "no run 'zz'", "deploy-12", f"`eplb-analyze runs {dump}`"
    )


def test_newest_run_is_used_and_a_note_says_so(dump: Path) -> None:
    result = cli("summary", dump)
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("eplb-analyze: note:")]
    for words in ("5 runs", "newest, twice@2", "--run", f"`eplb-analyze runs {dump}`"):
        assert words in note
    assert "note" not in cli("summary", "--run", "test", dump).stderr


def test_beginning_reads_only_runs_that_have_it(dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump can have thousands of runs."""
    read = []
    find_info = discovery.find_info
    monkeypatch.setattr(discovery, "find_info", lambda item: read.append(item[0][0]) or find_info(item))
    open_run(dump, "test")
    assert set(read) == {"run=test-a"}
