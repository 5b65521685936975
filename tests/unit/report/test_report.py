"""`report`: its document against the other commands and the arrays recorded, its page as a file.

What a reader sees and does with it is in test_report_in_chromium.py.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import report_dump as planted
from clocks import steady_clock
from helpers import ROOT, assert_golden, cli, one_error, without_times, write
from timed_run import write_timed

from eplb_analyze import open_run
from eplb_analyze.analysis.findings import summary_findings
from eplb_analyze.analysis.rearrangements import Verdict
from eplb_analyze.errors import Finding
from eplb_analyze.json_report import versioned
from eplb_analyze.reader.recorded_setting import why_not_due
from eplb_analyze.report import sentences
from eplb_analyze.report.bins import MAX_BINS, MAX_BYTES, bins_that_fit, pack
from eplb_analyze.report.document import report_document
from eplb_analyze.report.page import SCRIPTS, page
from eplb_analyze.report.write import write_report
from eplb_dump import ExpertLoadWriter

ASSETS = ROOT / "eplb_analyze/report/assets"
HOSTILE = "</script><script>window.stolen=1</script><img src=x onerror=window.stolen=1>&\u202e\x1b[31m"


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    with steady_clock(50):
        planted.record(root)
    return root


@pytest.fixture(scope="module")
def document(dump: Path) -> dict[str, Any]:
    return report_document(open_run(dump)).document


class Page(HTMLParser):
    """Elements, attributes and texts of scripts of a page."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.policy = ""
        self.title = ""
        self._inside = ""
        self.feed(data.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)
        if self._inside == "title":
            self.title += data

    @property
    def data(self) -> Any:
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "data"))


def unpacked(packed: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What the page's script makes of packed rows: ``[n, width]``."""
    octets = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), np.uint8)
    low, high = octets.reshape(2, -1).astype(np.uint16)
    rows = (low | high << 8).reshape(packed["shape"])
    stride = packed["stride"]
    if stride:
        for i in range(stride, len(rows)):
            rows[i] += rows[i - stride]
    units = 1 if packed["units"] is None else np.array(packed["units"])[:, None]
    return rows.astype(np.int64) * units


# ---- figures


def test_figures_equal_those_of_the_other_commands(dump: Path, document: dict[str, Any]) -> None:
    said = {
        name: without_times(json.loads(cli(name, *more, "--json", dump).stdout))
        for name, more in {
            "summary": (), "ranks": (), "rearrangements": (), "timeline": ("--bins", str(MAX_BINS)),
        }.items()
    }  # fmt: skip
    plain = json.loads(json.dumps(document))
    assert versioned(plain["summary"]) == said["summary"]
    left_out = ("schema_version", "run", "steps", "notes")
    for name in ("ranks", "rearrangements", "timeline"):
        ours = {key: value for key, value in said[name].items() if key not in left_out}
        assert plain[name] == ours
    assert plain["notes"] == [
        n for name in ("rearrangements", "timeline", "ranks") for n in said[name]["notes"]
    ]


def test_sentences_state_the_figures(dump: Path, document: dict[str, Any]) -> None:
    text = cli("summary", "--full", dump).stdout
    words = " ".join(document["words"])
    s = document["summary"]["balancedness"]
    assert document["answer"]["figures"] == f"balancedness {s['mean']:.3f} (5th percentile {s['p5']:.3f})"
    assert f"Balancedness was {s['mean']:.3f} on average over 396 steps" in words
    assert f"the worst {s['min']:.3f} at step {s['min_step']} (" in words
    idle = re.search(r"idle fraction ([\d.]+ ?%)", text)
    assert idle
    assert words.count(idle[1]) == 1
    hot = document["summary"]["hot_experts"][0]
    assert (hot["layer"], hot["logical"]) == (4, 4)
    assert f"The hottest expert is expert 4 of layer 4: {100 * hot['share']:.2f}%" in words
    assert len(document["rearrangements"]["rearrangements"]) == 2
    assert "2 rearrangements: " in words


def test_experts_have_the_verdicts_of_the_experts_command(dump: Path, document: dict[str, Any]) -> None:
    told = json.loads(cli("experts", "--json", dump).stdout)
    ours = document["experts"]
    assert {key: ours[key] for key in ("counts", "window", "windows")} == {
        key: told[key] for key in ("counts", "window", "windows")
    }
    for expert in told["experts"]:
        code = ours["flags"][planted.NUMBERS.index(expert["layer"])][expert["logical"]]
        assert ["never", "bursts", "always"][code & 3] == expert["verdict"]
        for bit, name in enumerate(ours["flag_names"]):
            assert bool(code & 4 << bit) is expert[name], name
    assert {e["verdict"] for e in told["experts"]} > {"never"}


def test_loads_of_every_bin_equal_the_reference(document: dict[str, Any]) -> None:
    loads = document["loads"]
    edges, apart = loads["edges"], loads["apart"]
    assert edges == [i * planted.STEPS // MAX_BINS for i in range(MAX_BINS + 1)]
    by_slot = unpacked(loads["slots"]).reshape(MAX_BINS, planted.LAYERS, planted.SLOTS)
    placed = np.where(
        unpacked(loads["placements"]["slots"]) == 65535, -1, unpacked(loads["placements"]["slots"])
    )
    changed = list(zip(apart["bin"], apart["layer"], strict=True))
    own = [max(b for b in range(MAX_BINS) if edges[b] <= change) for change in planted.CHANGES]
    # Where a layer's change lies within a bin, its experts' sums are kept for that bin.
    assert changed == [(own[0], 0), (own[2], 2)]
    assert edges[own[1]] == planted.CHANGES[1]
    rows = list(zip(loads["placements"]["bin"], loads["placements"]["layer"], strict=True))
    assert rows == [(b, layer) for layer in range(planted.LAYERS) for b in (0, own[layer])]
    for b, (first, after) in enumerate(itertools.pairwise(edges)):
        steps = planted.complete_steps(first, after - 1)
        assert loads["steps"][b] == len(steps)
        slots, _, experts = planted.sums(first, after - 1)
        np.testing.assert_array_equal(by_slot[b], slots)
        for layer in range(planted.LAYERS):
            if (b, layer) in changed:
                kept = unpacked(apart["experts"])[changed.index((b, layer))]
            else:
                row = max(i for i, (since, of) in enumerate(rows) if since <= b and of == layer)
                np.testing.assert_array_equal(placed[row], planted.placement(after - 1)[layer])
                kept = np.bincount(
                    placed[row][placed[row] >= 0], by_slot[b, layer][placed[row] >= 0], planted.LOGICAL
                )
            np.testing.assert_array_equal(kept, experts[layer])


def test_time_of_a_bin_is_that_of_its_first_complete_step(dump: Path, document: dict[str, Any]) -> None:
    when = dict(open_run(dump).steps().select("step", "time").iter_rows())
    loads = document["loads"]
    for first, ms in zip(loads["edges"], loads["times"], strict=False):
        step = planted.complete_steps(first)[0]
        # The steps' column is the wall clock, ours the monotonic one, set at the session's start.
        assert abs(when[step].timestamp() * 1000 - ms) < 1000


@pytest.mark.parametrize("largest", [100, 65_535, 65_536, 10_000_000])
def test_packing_rounds_counts_beyond_16_bits_only(largest: int) -> None:
    rng = np.random.default_rng(largest)
    counts = rng.integers(0, largest + 1, (40, 7))
    counts[:, 3] = largest
    back = unpacked(pack(counts, 5))
    unit = -(-largest // 65_535)
    assert np.abs(back - counts).max() <= unit / 2
    if unit == 1:
        np.testing.assert_array_equal(back, counts)


def test_token_replication_is_divided_out_by_the_page(tmp_path: Path, document: dict[str, Any]) -> None:
    planted.record(tmp_path, token_replication=4)
    loads = report_document(open_run(tmp_path)).document["loads"]
    assert (loads["per_token"], loads["slots"]) == (4, document["loads"]["slots"])


def test_range_limits_the_report(dump: Path) -> None:
    found = report_document(open_run(dump), (60, 100))
    loads = found.document["loads"]
    assert (found.bins, loads["edges"]) == (40, list(range(60, 101)))
    total = unpacked(loads["slots"]).reshape(40, planted.LAYERS, planted.SLOTS).sum(axis=0)
    np.testing.assert_array_equal(total, planted.sums(60, 99)[0])
    assert found.document["summary"]["steps"]["seen"] == 40


def test_elastic_runs_show_loads_of_the_last_configuration(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=4, ep_size=2, run_id="r", scope="global"
    ) as writer:
        for step in range(30):
            slots = 6 if step < 20 else 4
            writer.record(None, rng.poisson(50, (2, slots)), np.tile(np.arange(slots) % 4, (2, 1)))
    document = report_document(open_run(tmp_path)).document
    loads = document["loads"]
    assert loads["steps"] == [0] * 20 + [1] * 10
    assert loads["slots"]["shape"] == [30 * 2, 4]
    assert len(document["timeline"]["configurations"]) == 2
    assert any("steps 0 to 19 are left out" in note for note in document["notes"])
    whole = open_run(tmp_path).loads(steps=(20, 30))
    assert unpacked(loads["slots"]).sum() == whole["load"].list.sum().sum()


def test_report_without_any_placement(tmp_path: Path) -> None:
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=4, ep_size=2, run_id="r", scope="global"
    ) as writer:
        for _ in range(10):
            writer.record(None, np.full((2, 4), 100), None)
    document = report_document(open_run(tmp_path)).document
    assert document["experts"] is None
    assert document["loads"]["placements"]["bin"] == []
    assert any("not known" in sentence for sentence in document["words"])


def test_report_without_a_complete_step(tmp_path: Path) -> None:
    write(tmp_path, ranks=1)
    document = report_document(open_run(tmp_path)).document
    assert document["words"] == []
    assert (document["answer"]["title"], document["answer"]["figures"]) == ("INCOMPLETE DATA", "")
    assert document["timeline"]["missing_ranks"] == [1]
    assert document["answer"]["estimates"][0].startswith("estimate from 1 of 2 ranks, ")
    assert document["findings"]


# ---- the page


def test_page_loads_nothing_from_elsewhere(document: dict[str, Any]) -> None:
    data = page(document)
    found = Page(data)
    assert not [
        a for a in found.attributes if a[1] in ("src", "href", "srcset", "action") or a[1].startswith("on")
    ]
    assert found.title == "Expert load report · org/planted"
    code = [text for attrs, text in found.scripts if attrs.get("id") != "data"]
    assert code == [(ASSETS / name).read_text() for name in SCRIPTS]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    assert found.policy.startswith(f"default-src 'none'; script-src {allowed};")
    assert "unsafe-eval" not in found.policy
    assert "http" not in found.policy
    assert found.data == json.loads(json.dumps(document))


def test_untrusted_names_are_escaped(tmp_path: Path) -> None:
    planted.record(tmp_path, model=HOSTILE, engine=HOSTILE, engine_version="1" + HOSTILE)
    data = page(report_document(open_run(tmp_path)).document)
    found = Page(data)
    assert len(found.scripts) == len(SCRIPTS) + 1
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert found.data["title"] == shown
    assert found.title == f"Expert load report · {shown}"
    assert "img" not in {tag for tag, _, _ in found.attributes}
    assert "\u202e".encode() not in data
    assert found.data["summary"]["run"]["engine"] == shown


def test_redacted_report_has_no_names(tmp_path: Path) -> None:
    folder = tmp_path / "customer-seven"
    planted.record(folder, model="secret-lab/Unreleased-9B", run_id="night-of-cluster-x", absent=(3,))
    run = open_run(folder)
    open_page = page(report_document(run).document).decode()
    hidden = page(report_document(run, redact=True).document).decode()
    hosts = {session.info.host for session in run.sessions}
    sessions = {session.info.session_id for session in run.sessions}
    names = {"secret-lab", "Unreleased-9B", "night-of-cluster-x", "customer-seven", str(tmp_path)}
    assert hosts
    text = re.sub(r'"data":"[^"]*"', "", hidden.split('id="data">')[1].split("</script>")[0])
    for name in names | hosts | sessions:
        assert name not in text, name
        assert len(name) < 6 or name not in hidden, name
    assert all(name in open_page for name in ("secret-lab/Unreleased-9B", "night-of-cluster-x"))
    data = Page(hidden.encode()).data
    assert (data["title"], data["redacted"]) == ("a model", True)
    assert "missing_ranks" in {f["code"] for f in data["findings"]}
    assert "of 4 ranks, rank 3 wrote nothing" in {f["text"] for f in data["findings"]}
    assert data["answer"]["warnings"] == ["INCOMPLETE DATA: Of 4 ranks, these wrote nothing: 3."]


def test_redacted_report_hides_findings_that_may_contain_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, sessions, and what no one has thought of; not which rank stopped."""
    folder = tmp_path / "customer-seven"
    for rank, steps in ((0, 300), (1, 120)):
        write_rank(folder, rank, steps)
    write_rank(folder, 1, 50)  # a second session with the same steps
    path = next(folder.glob("**/rank=00000/**/loads-000001.parquet"))
    path.write_bytes(path.read_bytes()[:-50])
    new = Finding("error", "of_tomorrow", "a text that nobody has judged")
    monkeypatch.setattr("eplb_analyze.report.document.summary_findings", added(summary_findings, new))
    told = {f["code"]: f["text"] for f in report_document(open_run(folder)).document["findings"]}
    hidden = {
        f["code"]: f["text"] for f in report_document(open_run(folder), redact=True).document["findings"]
    }
    assert hidden.keys() == told.keys()
    assert "customer-seven" in told["damaged_file"]
    assert hidden.pop("damaged_file") == hidden.pop("overlapping_sessions") == hidden.pop("of_tomorrow") == ""
    assert "rank 1 has none after 119" in hidden["rank_stopped"]
    assert hidden.items() <= told.items()


def added(function: Callable[..., list[Finding]], finding: Finding) -> Callable[..., list[Finding]]:
    return lambda *args: [*function(*args), finding]


def write_rank(root: Path, rank: int, steps: int) -> None:
    with ExpertLoadWriter(
        root, model="m", run_id="r", num_logical_experts=4, ep_size=2, ep_rank=rank, segment_steps=64
    ) as writer:
        for step in range(steps):
            writer.record(step, np.full((1, 4), 10), np.arange(4)[None])


def test_largest_report_stays_below_8_mb(tmp_path: Path) -> None:
    """58 layers × 288 slots on 32 ranks, as many bins as fit, counts that nothing can compress, a
    placement that is new every four steps: no length of a run makes a report larger."""
    rng = np.random.default_rng(0)
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=256, ep_size=32, run_id="r", scope="global", queue_steps=1000
    ) as writer:
        slots = np.tile(np.arange(288) % 256, (58, 1))
        for step in range(MAX_BINS):
            if step % 4 == 0:
                slots = rng.permuted(slots, axis=1)
            writer.record(None, rng.integers(0, 65_536, (58, 288)), slots)
    run = open_run(tmp_path)
    document = report_document(run).document
    assert bins_that_fit(run) < MAX_BINS  # the placements alone are a third of a megabyte each
    assert len(document["loads"]["steps"]) == bins_that_fit(run)
    packed = [document["loads"]["slots"], document["loads"]["placements"]["slots"]]
    packed.append(document["loads"]["apart"]["experts"])
    assert sum(2 * np.prod(p["shape"]) for p in packed) <= MAX_BYTES
    size = len(page(document))
    assert 6e6 < size < 8e6
    tokens = run.loads()["load"].list.sum().sum()
    assert unpacked(document["loads"]["slots"]).sum() == pytest.approx(tokens, rel=1e-4)


def test_chart_library_is_the_documented_version() -> None:
    text = (ROOT / "docs/investigate/report.md").read_text()
    data = (ASSETS / "echarts.min.js").read_bytes()
    version = re.search(r't\.version="([\d.]+)"', data.decode())
    assert version
    assert f"echarts@{version[1]}" in text
    assert hashlib.sha256(data).hexdigest() in text
    assert "Apache License" in (ASSETS / "echarts.LICENSE").read_text()


# ---- the command


def shown(text: str, file: Path) -> str:
    """The output of the command without what differs from run to run."""
    return text.replace(str(file), "report.html").replace(f"{file.stat().st_size:,}", "N").replace(
        f'"bytes": {file.stat().st_size}', '"bytes": 0'
    )  # fmt: skip


def test_text_and_json_output(dump: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    result = cli("report", "-o", file, "--redact", dump)
    assert (result.returncode, result.stderr) == (
        0,
        "eplb-analyze: warning: 2 steps lack a rank and are left out of all figures: rank 1 absent in 2\n",
    )
    assert_golden("report.txt", shown(result.stdout, file))
    assert Page(file.read_bytes()).data["redacted"]
    again = cli("report", "-o", file, "--force", "--json", dump)
    assert_golden("report.json", shown(again.stdout, file))
    assert json.loads(again.stdout)["bytes"] == file.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_existing_file_is_not_overwritten(dump: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text("mine")
    one_error(cli("report", "-o", file, dump), 2, "report.html", "--force")
    assert file.read_text() == "mine"
    one_error(cli("report", "-o", dump / "report.html", dump), 2, "is inside the dump")
    one_error(cli("report", "-o", tmp_path / "no/report.html", dump), 2, "no folder")
    one_error(cli("report", "-o", tmp_path / "new.html", "--steps", "900-", dump), 2, "900-")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_missing_rank_is_reported_as_in_summary(tmp_path: Path) -> None:
    folder, file = tmp_path / "dump", tmp_path / "report.html"
    write(folder, ranks=2, ep_size=3, num_logical_experts=6)
    result = cli("report", "-o", file, folder)
    assert result.returncode == 3
    warnings = Page(file.read_bytes()).data["answer"]["warnings"]
    assert warnings
    assert all(line.partition(": ")[2] in cli("summary", folder).stdout for line in warnings)


def test_placement_that_never_changed_is_reported_as_in_summary(tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    write(folder, steps=15, engine="vllm", engine_config={"eplb_config": {"step_interval": 10}})
    answer = report_document(open_run(folder)).document["answer"]
    never = "never changed: 15 steps ran with an interval of 10 steps."
    warning = f"The placement and its 2 redundant experts {never}"
    assert answer["warnings"] == [f"EPLB NEVER ACTED: {warning}"]
    told = " ".join(cli("summary", folder).stdout.split())
    assert f"{answer['title']} {answer['figures']} {warning} " in told
    told = " ".join(cli("rearrangements", folder).stdout.split())
    ran = never.removeprefix("never changed: ").rstrip(".")
    assert f"EPLB NEVER ACTED: {ran}, and no placement changed. next eplb-analyze advise" in told


@pytest.mark.parametrize(
    ("first", "interval", "said"),
    [
        (0, 3000, "No placement changed: the engine's interval of 3,000 steps was not reached by step 39."),
        (0, 40, "No placement changed: the engine's interval of 40 steps was not reached by step 39."),
        # vLLM acts first a quarter of the interval after its start.
        (500, 300, "No placement changed: none was due from step 500 to 539, with an interval of 300 steps."),
        (3740, 3000, None),
        (0, 30, None),
    ],
)  # fmt: skip
def test_no_warning_before_the_first_rearrangement_is_due(
    tmp_path: Path, first: int, interval: int, said: str | None
) -> None:
    with ExpertLoadWriter(
        tmp_path, model="m", run_id="r", num_logical_experts=4, ep_size=2, scope="global", engine="vllm",
        engine_config={"eplb_config": {"step_interval": interval, "policy": "default"}},
    ) as writer:  # fmt: skip
        for step in range(first, first + 40):
            writer.record(step, np.full((1, 6), 10), np.array([[0, 1, 2, 3, 0, 1]]))
    document = report_document(open_run(tmp_path)).document
    warnings = document["answer"]["warnings"]
    assert len(warnings) == (said is None)
    assert all(f"never changed: 40 steps ran with an interval of {interval:,} steps." in w for w in warnings)
    assert document["not_due"] == said
    assert (document["words"][-1] == said) is (said is not None)
    for command in ("summary", "rearrangements"):
        told = " ".join(cli(command, tmp_path).stdout.split())
        assert ("NEVER ACTED" in told) is (said is None)
        assert said is None or said in told
        assert "eplb-analyze advise" in told or command == "summary"


def test_when_a_rearrangement_is_due() -> None:
    """The first at step 25, then every 100; before a whole interval nothing is asked for."""
    rng = np.random.default_rng(0)
    due = [25 + 100 * k for k in range(20)]
    for first, length in zip(rng.integers(0, 1000, 500), rng.integers(0, 250, 500), strict=True):
        last = int(first + length)
        expected = last >= 100 and any(first < step <= last for step in due)
        assert (why_not_due(int(first), last, 100, 25) is None) is expected
    assert why_not_due(None, None, 100, 25) is None


def test_engine_without_a_stated_interval_has_the_default() -> None:
    assert why_not_due(7, 3006, None, None) is None
    said = "No placement changed in 2,999 steps. The recording does not show how often EPLB should rearrange."
    assert why_not_due(7, 3005, None, None) == said


def test_engine_without_a_load_balancer_is_never_early(tmp_path: Path) -> None:
    with ExpertLoadWriter(
        tmp_path, model="m", run_id="r", num_logical_experts=4, ep_size=2, scope="global", engine="sglang",
        engine_config={"enable_eplb": False, "eplb_rebalance_num_iterations": 1000},
    ) as writer:  # fmt: skip
        writer.record(None, np.full((1, 4), 10), np.arange(4)[None])
    (warning,) = report_document(open_run(tmp_path)).document["answer"]["warnings"]
    off = "The placement never changed: 1 step ran with EPLB switched off (enable_eplb)."
    assert warning.startswith(f"EPLB NEVER ACTED: {off}")


def test_report_with_one_window_does_not_mention_bursts(tmp_path: Path) -> None:
    write(tmp_path, steps=99)
    document = report_document(open_run(tmp_path)).document
    assert document["experts"]["windows"] == 1
    said = json.dumps([document[key] for key in ("words", "notes", "meanings")])
    assert "burst" not in said
    assert "--window-steps" not in said
    hot = document["experts"]["counts"]["always"]
    assert f"{hot} {'is' if hot == 1 else 'are'} hot: at least 2x the layer's mean." in " ".join(
        document["words"]
    )


def test_damaged_segment_is_left_out_and_reported(tmp_path: Path) -> None:
    folder, file = tmp_path / "dump", tmp_path / "report.html"
    planted.record(folder)
    path = next(folder.glob("**/rank=00002/**/loads-000001.parquet"))
    path.write_bytes(path.read_bytes()[:-50])
    one_error(cli("report", "-o", file, folder), 3, "loads-000001.parquet")
    data = Page(file.read_bytes()).data
    good = [s for s in planted.complete_steps() if not 64 <= s < 128 or planted.idle(2, s)]
    assert sum(data["loads"]["steps"]) == len(good) == data["summary"]["steps"]["recorded"]
    assert unpacked(data["loads"]["slots"]).sum() == sum(planted.physical(s).sum() for s in good)


def test_write_report_returns_what_it_wrote(dump: Path, tmp_path: Path) -> None:
    written = write_report(open_run(dump), tmp_path / "a.html", top=3)
    assert written.bytes == (tmp_path / "a.html").stat().st_size
    assert (written.bins, written.run_id, written.model) == (MAX_BINS, "monday", "org/planted")
    assert Page((tmp_path / "a.html").read_bytes()).data["top"] == 3


def test_every_verdict_has_a_sentence(tmp_path: Path) -> None:
    assert set(sentences._VERDICTS) == set(get_args(Verdict))
    rng = np.random.default_rng(1)
    with ExpertLoadWriter(
        tmp_path / "dump", model="m", num_logical_experts=4, ep_size=2, scope="global", run_id="r"
    ) as writer:
        for step in range(1200):
            # A gain that goes when the load comes back.
            hot = 30 if 200 <= step < 260 else 60 + rng.integers(0, 30 + (step >= 260))
            slots = np.array([[0, 1, 2, 3]]) if step < 200 else np.array([[2, 1, 0, 3]])
            writer.record(step, np.array([[hot, 30, 30, 30]]), slots)
            assert step % 300 < 299 or writer.flush()
    out = cli("report", "-o", tmp_path / "page.html", tmp_path / "dump")
    assert out.returncode == 0, out.stderr
    assert "helped at first, until the load drifted" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("price", "value"), [(0.02, " ms"), (0.0, "none")])
def test_cost_section_says_what_summary_says(tmp_path: Path, price: float, value: str) -> None:
    write_timed(tmp_path, price, phases=("decode", "prefill"))
    document = report_document(open_run(tmp_path)).document
    told = document["cost"]
    assert value in told["tile"][0]
    (sentence,) = (text for text in document["answer"]["sentences"] if text in told["text"])
    assert sentence.startswith("Imbalance ")
    assert document["answer"]["sentences"][0] in " ".join(cli("summary", tmp_path).stdout.split())
    assert [row[0] for row in told["rows"]] == ["decode", "prefill"]
    assert [row[1] for row in told["rows"]] == ["200", "200"]


def test_cost_that_cannot_be_measured_is_no_figure(tmp_path: Path) -> None:
    write_timed(tmp_path, 0.02, steps=60)
    document = report_document(open_run(tmp_path)).document
    assert document["cost"]["tile"][0] == "not measured"
    assert document["cost"]["text"].startswith("The cost of imbalance is not known: ")
    assert "not measurable in this run" in document["tokens"]
