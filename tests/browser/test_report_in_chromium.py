"""The report in a real browser: what its reader sees, against the arrays that were recorded.

Skipped where the machine has no Chromium (Debian and Ubuntu: apt-get install chromium).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
import report_dump as planted
from chromium import needs_chromium
from helpers import write
from thinning import session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis.experts import expert_report
from eplb_analyze.analysis.ranks import rank_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.report.answer import cost_sentence
from eplb_analyze.report.write import write_report
from eplb_dump import ExpertLoadWriter
from eplb_dump.format.schema import Tier

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = needs_chromium
#: The charts' margins, in CSS pixels, as assets/charts.js sets them.
LINE_LEFT, LINE_RIGHT = 48, 18
MAP_LEFT, MAP_RIGHT, MAP_TOP, MAP_BOTTOM = 48, 30, 4, 60
#: The first step of each bin of time, and the step after the last.
EDGES = [i * planted.STEPS // 128 for i in range(129)]
LAPTOP = {"width": 1366, "height": 768}
#: Between a figure and its unit, so that no line ends there.
NO_BREAK = "\u00a0"


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    planted.record(root)
    return root


@pytest.fixture(scope="module")
def report(dump: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("html") / "report.html"
    write_report(open_run(dump), file)
    return file


class Opened:
    """A page that was loaded, and all that it asked the network for or complained about."""

    def __init__(self, page: Page, file: Path) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready=true]")
        self.file = file

    def settle(self) -> None:
        """Until what was asked for has been drawn."""
        self.page.evaluate(
            "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def fine(self) -> None:
        assert self.complaints == []
        assert self.requests == [self.file.as_uri()]

    def cell(self, chart: str, row: int, column: int, shape: tuple[int, int]) -> tuple[float, float]:
        """The middle of a heat map's cell, in the window."""
        self.page.locator(chart).scroll_into_view_if_needed()
        self.settle()
        box = self.page.locator(chart).bounding_box()
        assert box
        width = (box["width"] - MAP_LEFT - MAP_RIGHT) / shape[1]
        height = (box["height"] - MAP_TOP - MAP_BOTTOM) / shape[0]
        x = box["x"] + MAP_LEFT + (column + 0.5) * width
        return x, box["y"] + MAP_TOP + (row + 0.5) * height

    def hover(self, chart: str, row: int, column: int, shape: tuple[int, int]) -> list[str]:
        """What is said of a cell that is pointed at, line by line."""
        x, y = self.cell(chart, row, column, shape)
        self.page.mouse.move(x - 2, y - 2)
        self.page.mouse.move(x, y)
        self.page.wait_for_selector("#tip", state="visible")
        return plain(self.page.locator("#tip").inner_text()).splitlines()

    def drag_over_time(self, first: float, last: float) -> None:
        """Choose steps, as shares of the chart's width."""
        self.page.evaluate("scrollTo(0, 0)")
        self.page.locator("#timeline").scroll_into_view_if_needed()
        self.settle()
        box = self.page.locator("#timeline").bounding_box()
        assert box
        width, y = box["width"] - LINE_LEFT - LINE_RIGHT, box["y"] + 60
        at = [box["x"] + LINE_LEFT + share * width for share in (first, last)]
        self.page.mouse.move(at[0], y)
        self.page.mouse.down()
        self.page.mouse.move(sum(at) / 2, y, steps=3)
        self.page.mouse.move(at[1], y, steps=3)
        self.page.mouse.up()
        self.settle()

    def chosen(self) -> tuple[int, int]:
        return tuple(int(self.page.input_value(name)) for name in ("#from", "#to"))  # type: ignore[return-value]

    def map_values(self, name: str) -> np.ndarray[Any, Any]:
        """What a heat map draws: [rows, columns], times the row's mean; NaN is null."""
        values, rows = self.page.evaluate(f"[Array.from({name}.data.values), {name}.data.rows.length]")
        return np.array([np.nan if v is None else v for v in values], float).reshape(rows, -1)

    def pixel(self, chart: str, row: int, column: int, shape: tuple[int, int]) -> list[int]:
        """The color in the lower left of a cell, which no number covers."""
        box = self.page.locator(chart).bounding_box()
        assert box
        width = (box["width"] - MAP_LEFT - MAP_RIGHT) / shape[1]
        height = (box["height"] - MAP_TOP - MAP_BOTTOM) / shape[0]
        x, y = MAP_LEFT + (column + 0.1) * width, MAP_TOP + (row + 0.85) * height
        code = """([chart, x, y]) => {
            const canvas = document.querySelector(`${chart} canvas`);
            const scale = canvas.width / canvas.clientWidth;
            const one = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            one.drawImage(canvas, Math.floor(x * scale), Math.floor(y * scale), 1, 1, 0, 0, 1, 1);
            return [...one.getImageData(0, 0, 1, 1).data].slice(0, 3);
        }"""
        return list(self.page.evaluate(code, [chart, x, y]))


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Opened]:
    context = browser.new_context(viewport=LAPTOP, color_scheme="light", reduced_motion="reduce")
    yield Opened(context.new_page(), report)
    context.close()


def plain(text: str) -> str:
    return text.replace(NO_BREAK, " ")


def times_mean(values: Any) -> np.ndarray[Any, Any]:
    return values / values.mean(axis=1, keepdims=True)


def test_it_loads_and_shows_what_the_document_says(opened: Opened, dump: Path) -> None:
    page = opened.page
    summary = summarize(open_run(dump))
    assert page.inner_text("h1") == "org/planted"
    assert "run monday · example" in page.inner_text("#subtitle")
    assert f"{summary.spreads['balancedness'].mean:.3f}" in page.inner_text("#tiles")
    assert f"{100 * (summary.idle_fraction or 0):.1f}%" in page.inner_text("#tiles")
    assert page.locator("#words li").count() == 6
    cost = page.inner_text("#cost-text").replace(NO_BREAK, " ")
    assert cost.startswith(cost_sentence(summary.cost))
    answer = page.inner_text("#answer").replace(NO_BREAK, " ")
    assert cost_sentence(summary.cost) in answer
    assert f"balancedness {summary.spreads['balancedness'].mean:.3f}" in page.inner_text("#verdict")
    assert page.locator("#cost-table tbody tr").count() == len(summary.cost.phases)
    assert page.locator("#meanings dt").count() == page.locator("#meanings dd").count() > 8
    for chart in ("#timeline", "#ranks-map", "#experts-map", "#layer-map"):
        colours = page.evaluate(
            """(chart) => {
                const canvas = document.querySelector(`${chart} canvas`);
                const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                return new Set(new Uint32Array(data.buffer)).size;
            }""",
            chart,
        )
        assert colours > 20, chart
    line = page.evaluate("line.chart.getOption().series.find((s) => s.name === 'balancedness').data")
    bins = [planted.balancedness(a, b - 1) for a, b in itertools.pairwise(EDGES)]
    assert [v for _, v in line[::2]] == pytest.approx(bins)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    opened.fine()


def test_maps_of_the_whole_run_are_those_of_the_commands(opened: Opened, dump: Path) -> None:
    run = open_run(dump)
    ranks = [layer.ranks for layer in rank_report(run).layers]
    np.testing.assert_allclose(opened.map_values("rankMap"), np.array(ranks, float), rtol=1e-12)
    by_slot, _, _ = planted.sums(0, 399)
    np.testing.assert_allclose(opened.map_values("expertMap"), times_mean(by_slot), rtol=1e-12)
    opened.page.click("#by-expert")
    opened.settle()
    experts = expert_report(run).experts["times_mean"].to_numpy().reshape(planted.LAYERS, planted.LOGICAL)
    np.testing.assert_allclose(opened.map_values("expertMap"), experts, rtol=1e-12)
    # The table's first rows are those that `summary` calls the hottest.
    rows = opened.page.locator("#hot-table tbody tr").all_inner_texts()
    for row, hot in zip(rows, summarize(run).hot_experts, strict=False):
        cells = plain(row).split("\t")
        assert (int(cells[0]), int(cells[1])) == (hot.layer, hot.logical)
        assert cells[2:4] == [f"{100 * hot.share:.2f}%", f"{hot.times_mean:.2f}"]
        assert int(cells[5]) == hot.replicas
    assert len(rows) == 10
    opened.fine()


def test_hovering_shows_expert_rank_replicas_and_load(opened: Opened, dump: Path) -> None:
    by_slot, by_rank, by_expert = planted.sums(0, 399)
    shape = (planted.LAYERS, planted.SLOTS)
    lines = opened.hover("#experts-map", 1, 6, shape)
    share = by_expert[1, 2] / by_expert[1].sum()
    assert lines[0] == "Layer 4, slot 6 on rank 3"
    assert lines[1] == f"{by_slot[1, 6]:,} tokens, {times_mean(by_slot)[1, 6]:.2f}x the layer's mean slot"
    assert lines[2] == "logical expert 2 (at the end of these steps)"
    assert (
        lines[3]
        == f"the expert has {100 * share:.2f}% of the layer's tokens, {6 * share:.2f}x the mean expert"
    )
    assert lines[4] == f"3 replicas, on ranks 1, 3; due: {8 * share:.1f}"
    row = expert_report(open_run(dump)).experts.row(
        by_predicate=(pl.col("layer") == 4) & (pl.col("logical") == 2), named=True
    )
    assert ("over-replicated" in " ".join(lines[5:])) is row["over_replicated"]
    lines = opened.hover("#ranks-map", 2, 0, (planted.LAYERS, planted.RANKS))
    assert lines[:2] == [
        "Layer 7, rank 0",
        f"{by_rank[2, 0]:,} tokens, {times_mean(by_rank)[2, 0]:.2f}x the layer's mean rank",
    ]
    assert lines[2] == "experts 5, 4 (at the end of these steps)"
    opened.page.click("#by-expert")
    opened.settle()
    lines = opened.hover("#experts-map", 1, 4, (planted.LAYERS, planted.LOGICAL))
    assert lines[0] == "Layer 4, logical expert 4"
    assert lines[1].startswith(f"{by_expert[1, 4]:,} tokens, ")
    assert lines[3].startswith("1 replica, on rank 0; due: ")
    opened.fine()


def test_dragging_chooses_steps_and_the_maps_are_of_these(opened: Opened) -> None:
    page = opened.page
    before = opened.map_values("rankMap")
    opened.drag_over_time(0.15, 0.25)
    first, last = opened.chosen()
    assert (abs(first - 60), abs(last - 99)) <= (3, 3)
    by_slot, by_rank, by_expert = planted.sums(first, last)
    np.testing.assert_allclose(opened.map_values("rankMap"), times_mean(by_rank), rtol=1e-12)
    np.testing.assert_allclose(opened.map_values("expertMap"), times_mean(by_slot), rtol=1e-12)
    assert np.abs(opened.map_values("rankMap") - before).max() > 0.3
    steps = planted.complete_steps(first, last)
    value = planted.balancedness(first, last)
    chosen = f"{len(steps)} complete steps with tokens · balancedness {value:.3f}"
    assert page.inner_text("#chosen-text") == chosen
    # Layer 3's expert 3 was hot only then, and the table says so.
    cells = plain(page.locator("#hot-table tbody tr").first.inner_text()).split("\t")
    share = by_expert[0, 3] / by_expert[0].sum()
    assert cells[:5] == ["3", "3", f"{100 * share:.2f}%", f"{6 * share:.2f}", f"{by_expert[0, 3]:,}"]
    lines = opened.hover("#ranks-map", 0, 1, (planted.LAYERS, planted.RANKS))
    assert lines[1] == f"{by_rank[0, 1]:,} tokens, {times_mean(by_rank)[0, 1]:.2f}x the layer's mean rank"
    # The hottest rank of the map is painted red, the coldest blue.
    drawn = times_mean(by_rank)
    for cell, redder in ((drawn.argmax(), True), (drawn.argmin(), False)):
        red, _, blue = opened.pixel(
            "#ranks-map", *divmod(int(cell), planted.RANKS), (planted.LAYERS, planted.RANKS)
        )
        assert (red > blue + 20) if redder else (blue > red), (red, blue)
    page.click("#whole")
    opened.settle()
    np.testing.assert_array_equal(opened.map_values("rankMap"), before)
    opened.fine()


def test_steps_can_be_typed_and_moved(opened: Opened) -> None:
    page = opened.page
    page.fill("#from", "100")
    page.press("#from", "Tab")
    page.fill("#to", "199")
    page.press("#to", "Tab")
    opened.settle()
    assert opened.chosen() == (100, 199)
    page.click("#later")
    opened.settle()
    assert opened.chosen() == (200, 299)
    np.testing.assert_allclose(
        opened.map_values("rankMap"), times_mean(planted.sums(200, 299)[1]), rtol=1e-12
    )
    page.click("#earlier")
    page.click("#earlier")
    opened.settle()
    assert opened.chosen() == (0, 99)
    np.testing.assert_allclose(opened.map_values("expertMap"), times_mean(planted.sums(0, 99)[0]), rtol=1e-12)
    opened.fine()


def test_rearrangements_are_marked_and_lead_to_their_steps(opened: Opened, dump: Path) -> None:
    page = opened.page
    marks = page.evaluate(
        "line.chart.getOption().series.find((s) => s.name === 'rearrangements').data.map((m) => m.value[0])"
    )
    assert marks == [r.first_step for r in open_run(dump).history.rearrangements()] == [47, 251]
    x, y = page.evaluate(
        "line.chart.convertToPixel({gridIndex: 0}, [251, line.chart.getOption().yAxis[0].min])"
    )
    page.locator("#timeline").scroll_into_view_if_needed()
    box = page.locator("#timeline").bounding_box()
    assert box
    page.mouse.move(box["x"] + x, box["y"] + y - 6)
    assert page.locator("#tip").inner_text().startswith("Rearrangement at step 251")
    page.mouse.click(box["x"] + x, box["y"] + y - 6)
    picked = page.locator("#rearrangements-table tr.picked")
    assert picked.inner_text().startswith("251\t")
    assert opened.chosen() == (0, 399)
    picked.locator("button").first.click()
    opened.settle()
    first, last = opened.chosen()
    # Whole bins of the steps before it, up to the rearrangement before that.
    assert 90 <= first <= 94
    assert 246 <= last <= 250
    np.testing.assert_allclose(
        opened.map_values("expertMap"), times_mean(planted.sums(first, last)[0]), rtol=1e-12
    )
    opened.fine()


def test_one_layer_over_time(opened: Opened) -> None:
    page = opened.page
    x, y = opened.cell("#ranks-map", 0, 2, (planted.LAYERS, planted.RANKS))
    page.mouse.click(x, y)
    opened.settle()
    assert page.locator("#layer option:checked").inner_text() == "3"
    truth = np.array([planted.sums(a, b - 1)[1][0] for a, b in itertools.pairwise(EDGES)])
    np.testing.assert_allclose(opened.map_values("layerMap"), times_mean(truth).T, rtol=1e-12)
    page.select_option("#layer", label="7")
    opened.settle()
    truth = np.array([planted.sums(a, b - 1)[1][2] for a, b in itertools.pairwise(EDGES)])
    np.testing.assert_allclose(opened.map_values("layerMap"), times_mean(truth).T, rtol=1e-12)
    opened.fine()


def test_dragging_in_a_map_zooms(opened: Opened) -> None:
    shape = (planted.LAYERS, planted.SLOTS)
    start, end = opened.cell("#experts-map", 0, 2, shape), opened.cell("#experts-map", 1, 5, shape)
    page = opened.page
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=3)
    page.mouse.move(*end, steps=3)
    page.mouse.up()
    opened.settle()
    zoomed = "expertMap.chart.getOption().dataZoom.slice(0, 2).map((z) => [z.startValue, z.endValue])"
    assert page.evaluate(zoomed) == [[2, 5], [0, 1]]
    # What is pointed at is the cell that is seen there now.
    assert opened.hover("#experts-map", 1, 3, (2, 4))[0] == "Layer 4, slot 5 on rank 2"
    page.mouse.dblclick(*start)
    opened.settle()
    assert page.evaluate(zoomed) == [[0, 7], [0, 2]]
    opened.fine()


def test_light_and_dark(browser: Browser, report: Path) -> None:
    context = browser.new_context(viewport=LAPTOP, color_scheme="dark")
    opened = Opened(context.new_page(), report)
    page = opened.page
    shape = (planted.LAYERS, planted.RANKS)

    def look() -> tuple[str, list[int]]:
        opened.settle()
        back = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return back, opened.pixel("#ranks-map", 2, 2, shape)

    dark = look()
    assert sum(map(int, re.findall(r"\d+", dark[0]))) < 120
    page.click("#theme")
    light = look()
    assert sum(map(int, re.findall(r"\d+", light[0]))) > 650
    assert sum(light[1]) > sum(dark[1]) + 150
    page.click("#theme")
    assert look() == dark
    opened.fine()
    context.close()


def test_on_paper_all_of_it_is_light(opened: Opened, tmp_path: Path) -> None:
    page = opened.page
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.evaluate("document.querySelector('#experts-map canvas').clientWidth") <= 720
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert len(page.pdf(format="A4")) > 20_000
    opened.fine()


@pytest.mark.parametrize("width", [320, 360, 390, 640, 800])
def test_on_a_phone_tables_scroll_inside_their_cards(browser: Browser, report: Path, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844}, reduced_motion="reduce")
    opened = Opened(context.new_page(), report)
    page = opened.page
    page.select_option("#layer", label="3")
    opened.settle()
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    # Nothing is out of sight but what can be scrolled to.
    lost = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((e) => e.checkVisibility()
            && !e.closest(".scroll > *, .chart > *") && e.getBoundingClientRect().right > innerWidth + 0.5)
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert lost == []
    assert page.evaluate(
        """() => [...document.querySelectorAll("table")].every((t) => t.offsetWidth === 0
            || t.parentElement.scrollWidth <= t.parentElement.clientWidth
            || getComputedStyle(t.parentElement).overflowX === "auto")"""
    )
    left = page.evaluate("[...document.querySelectorAll('.tile')].map((t) => t.offsetLeft)")
    assert len(set(left)) == (2 if width <= 640 else 3)
    assert page.evaluate(
        "[...document.querySelectorAll('.tile *')].every((e) => e.scrollWidth <= e.clientWidth)"
    )
    opened.fine()
    context.close()


def test_no_line_ends_between_a_figure_and_its_unit(opened: Opened) -> None:
    text = opened.page.evaluate("document.body.innerText")
    assert re.findall(r"\d (?:[%×]|(?:µs|ms|s|min|h)\b)", text) == []
    assert len(re.findall(r"\d%", text)) > 20
    # How many times the page shows depends on this machine's; it always shows the run's duration.
    assert re.search(rf"\d{NO_BREAK}(?:µs|ms|s)\b", text)
    assert re.search(rf"\d\.\d\dx{NO_BREAK}the mean", text)


def test_steps_are_chosen_in_bins_and_the_page_says_so(opened: Opened) -> None:
    page = opened.page
    widths = {b - a for a, b in itertools.pairwise(EDGES)}
    assert widths == {3, 4}
    assert page.inner_text("#bins") == "in bins of 3 or 4 steps"
    page.fill("#to", "120")
    page.press("#to", "Tab")
    opened.settle()
    assert opened.chosen()[1] + 1 in EDGES
    # All bins have a complete step, so there is no gap to explain.
    assert not page.locator("#gaps").is_visible()
    assert not page.locator("#layer-unknown").is_visible()
    opened.fine()


def test_what_has_no_complete_step_is_explained(browser: Browser, tmp_path: Path) -> None:
    for rank in range(2):
        with ExpertLoadWriter(
            tmp_path / "dump", model="m", num_logical_experts=4, ep_size=2, ep_rank=rank, run_id="r"
        ) as writer:
            for step in range(40 if rank else 25):
                writer.record(step, np.full((2, 6), 10 + step), np.tile([0, 1, 2, 3, 0, 1], (2, 1)))
    with opened_for(browser, tmp_path) as opened:
        page = opened.page
        assert np.isnan(opened.map_values("layerMap")[:, 25:]).all()
        assert page.inner_text("#layer-unknown").strip() == "no complete step"
        grey = page.evaluate("getComputedStyle(document.querySelector('i.unknown')).backgroundColor")
        shown = opened.pixel("#layer-map", 1, 30, (2, 40))
        assert [int(part) for part in re.findall(r"\d+", grey)] == shown
        assert "if no step is complete" in page.inner_text("#gaps")
        assert page.inner_text("#bins") == ""


def test_balancedness_that_sums_of_ranks_do_not_show_is_explained(browser: Browser, tmp_path: Path) -> None:
    for rank in range(2):
        with ExpertLoadWriter(
            tmp_path / "dump", model="m", num_logical_experts=4, ep_size=2, ep_rank=rank, run_id="r"
        ) as writer:
            for step in range(40):
                writer.record(step, np.full((2, 6), 10 + step), np.tile([0, 1, 2, 3, 0, 1], (2, 1)))
    for folder in session_folders(tmp_path):
        thin_to(folder, {Tier.MINUTES: [0]})
    with opened_for(browser, tmp_path) as opened:
        tiles = opened.page.inner_text("#tiles")
        assert "sums of single ranks do not show it" in tiles
        assert "no complete step" not in tiles


def test_one_step_is_not_several(browser: Browser, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_loads(tmp_path / "dump", [rng.poisson(50, (2, 6))], [np.tile([0, 1, 2, 3, 0, 0], (2, 1))])
    with opened_for(browser, tmp_path) as opened:
        page = opened.page
        text = plain(page.evaluate("document.body.innerText"))
        assert re.findall(r"\b1 steps|(\d+) to \1\b", text) == []
        assert "UTC, 1 step ·" in text
        # A single window cannot distinguish a burst from a permanent load.
        assert "burst" not in text
        assert "--window-steps" not in text
        assert "always hot" not in text
        ticks = page.evaluate(
            "line.chart.getModel().getComponent('xAxis').axis.getTicksCoords().map((t) => t.tickValue)"
        )
        assert ticks == [0, 1]
        # Experts 0's replicas in slots 4 and 5 are both on rank 1.
        row = page.locator("#hot-table tbody tr", has_text="two replicas share a rank").first.inner_text()
        assert row.split("\t")[1] == "0"


def test_names_of_strangers_stay_text(browser: Browser, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    planted.record(tmp_path / "dump", model=hostile, engine=hostile)
    with opened_for(browser, tmp_path) as opened:
        assert opened.page.inner_text("h1") == hostile
        assert hostile in opened.page.inner_text("#subtitle")
        assert opened.page.locator("img").count() == 0
        assert hostile in opened.page.title()


def test_incomplete_data_stands_at_the_top(browser: Browser, tmp_path: Path) -> None:
    write(tmp_path / "dump", ranks=1)
    with opened_for(browser, tmp_path) as opened:
        page = opened.page
        assert page.inner_text("#banners").startswith("INCOMPLETE DATA: Of 2 ranks, these wrote nothing: 1.")
        assert page.inner_text("#verdict") == "INCOMPLETE DATA"
        assert "estimate from 1 of 2 ranks" in page.inner_text("#answer")
        assert "missing: rank 1" in page.inner_text("#tiles")
        assert "ranks missing\trank 1" in page.inner_text("#complete-tables")
        assert "wrote nothing" in page.inner_text("#findings")


def test_other_runs_of_scripts_are_refused(opened: Opened) -> None:
    """The policy at work: neither a script put into the page nor a request of its own gets through."""
    page = opened.page
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
        }"""
    )
    assert page.evaluate("window.ran") is None
    assert page.evaluate("fetch('data:text/plain,x').then(() => 'through', () => 'refused')") == "refused"
    assert all("Content Security Policy" in text for text in opened.complaints)
    assert json.dumps(opened.complaints).count("script-src") >= 1


def test_large_counts_and_token_replication(browser: Browser, tmp_path: Path) -> None:
    """Counts beyond 16 bits, each token counted four times by the engine."""
    rng = np.random.default_rng(5)
    loads = rng.integers(0, 3_000_000, (20, 2, 6))
    slots = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]])
    write_loads(tmp_path / "dump", list(loads), [slots] * 20, token_replication=4)
    with opened_for(browser, tmp_path) as opened:
        by_slot = loads.sum(axis=0)
        np.testing.assert_allclose(opened.map_values("expertMap"), times_mean(by_slot), rtol=1e-4)
        said = opened.hover("#experts-map", 1, 2, (2, 6))[1]
        assert float(said.split(" tokens")[0].replace(",", "")) == pytest.approx(by_slot[1, 2] / 4, rel=1e-4)


@pytest.mark.parametrize("kind", ["elastic", "no placement", "one step", "no token in a layer"])
def test_odd_runs_are_shown(browser: Browser, tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    steps = 1 if kind == "one step" else 30
    widths = [6 if kind == "elastic" and step < 20 else 4 for step in range(steps)]
    loads = [rng.poisson(50, (2, width)) for width in widths]
    slots: list[Any] = [np.tile(np.arange(width) % 4, (2, 1)) for width in widths]
    if kind == "no placement":
        slots = [None] * steps
    if kind == "no token in a layer":
        for load in loads:
            load[1] = 0
    write_loads(tmp_path / "dump", loads, slots)
    with opened_for(browser, tmp_path) as opened:
        page, last = opened.page, [load for load in loads if load.shape[1] == 4]
        expected = np.full((2, 4), np.nan)
        total = np.sum(last, axis=0)
        np.divide(
            total, total.mean(axis=1, keepdims=True), out=expected, where=total.sum(axis=1, keepdims=True) > 0
        )
        np.testing.assert_allclose(opened.map_values("expertMap"), expected, rtol=1e-12)
        if kind == "elastic":
            assert "maps: 10 steps of the last configuration" in page.inner_text("#chosen-text")
            assert "30 complete steps" in page.inner_text("#chosen-text")
        if kind == "no token in a layer":
            assert opened.hover("#experts-map", 1, 0, (2, 4))[1] == "0 tokens, no token in this layer"
        if kind == "no placement":
            assert not page.locator("#hot").is_visible()
            assert opened.hover("#experts-map", 0, 3, (2, 4))[2] == "whose slot it is, is not known"


def test_lost_rank_and_empty_slots_are_in_no_mean_and_no_replica(browser: Browser, tmp_path: Path) -> None:
    """Rank 1 of 4 dies at step 20; its slots keep experts that nobody serves, and slot 7 is empty."""
    rng = np.random.default_rng(2)
    placement = np.array([[0, 1, 0, 0, 2, 3, 0, -1]])
    loads = rng.integers(40, 60, (60, 4, 1, 8)) * (placement >= 0)
    loads[:, :, :, 0] += 200
    loads[20:, :, :, 2:4] = 0
    for rank in range(4):
        with ExpertLoadWriter(
            tmp_path / "dump", model="m", num_logical_experts=4, ep_size=4, ep_rank=rank, run_id="r"
        ) as writer:
            for step in range(20 if rank == 1 else 60):
                writer.record(step, loads[step, rank], placement)
    total = loads[20:, [0, 2, 3]].sum(axis=(0, 1, 2))
    kept = [0, 1, 4, 5, 6, 7]
    with opened_for(browser, tmp_path) as opened:
        by_rank = total.reshape(4, 2).sum(axis=1)
        times = np.where(np.arange(4) == 1, np.nan, by_rank * 3 / total.sum())
        np.testing.assert_allclose(opened.map_values("rankMap"), times[np.newaxis])
        by_slot = np.full(8, np.nan)
        by_slot[kept] = total[kept] * 6 / total.sum()
        np.testing.assert_allclose(opened.map_values("expertMap"), by_slot[np.newaxis])
        over_time = opened.map_values("layerMap")
        assert np.isnan(over_time[1]).all()
        np.testing.assert_allclose(np.nanmean(over_time[:, -1]), 1)
        share = (total[0] + total[6]) / total.sum()
        lines = opened.hover("#experts-map", 0, 0, (1, 8))
        assert lines[4] == f"2 replicas, on ranks 0, 3; due: {5 * share:.1f}"
        assert opened.hover("#experts-map", 0, 2, (1, 8))[1:] == ["the rank is lost"]
        assert opened.hover("#ranks-map", 0, 1, (1, 4))[1:] == ["the rank is lost"]
        hot = plain(opened.page.locator("#hot-table tbody tr").first.inner_text()).split("\t")
        assert hot[5:7] == ["2", f"{5 * share:.1f} !"]
        assert "a lost rank" in opened.page.inner_text("#layer-unknown-text")


def write_loads(root: Path, loads: list[Any], slots: list[Any], **options: Any) -> None:
    """Record loads ``[layers, slots]`` a step and their placements, already summed over two ranks."""
    with ExpertLoadWriter(
        root, model="m", num_logical_experts=4, ep_size=2, run_id="r", scope="global", **options
    ) as writer:
        for load, placement in zip(loads, slots, strict=True):
            writer.record(None, load, placement)


@contextlib.contextmanager
def opened_for(browser: Browser, folder: Path) -> Iterator[Opened]:
    """The report of the dump in a folder, which must give no reason to complain."""
    write_report(open_run(folder / "dump"), folder / "report.html")
    context = browser.new_context(viewport=LAPTOP, reduced_motion="reduce")
    opened = Opened(context.new_page(), folder / "report.html")
    yield opened
    opened.fine()
    context.close()
