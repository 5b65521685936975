"""Plots over steps: the scale of the sparkline, and labels that never cover each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eplb_analyze.cli.charts import labeled_marks, sparkline
from eplb_analyze.metrics.losses import Bin


def test_flat_run_looks_flat() -> None:
    line, low, high = sparkline([0.917, 0.928, None, 0.922])
    assert (round(low, 3), round(high, 3)) == (0.85, 0.95)
    assert line[2] == " "
    assert len({*line} - {" "}) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=64))
def test_scale_covers_all_figures_and_spans_a_tenth(values: list[float]) -> None:
    line, low, high = sparkline(values)
    assert low <= min(values) <= max(values) <= high
    assert 0 <= low < high <= 1
    assert high - low >= 0.1 - 1e-12
    assert len(line) == len(values)
    assert " " not in line


@given(
    st.integers(8, 64),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 639), st.sampled_from(["hot expert", "rearrangement"])), max_size=12),
)
def test_every_marked_bin_has_a_mark_and_no_label_is_cut(
    count: int, repeat: int, marks: list[tuple[int, str]]
) -> None:
    bins = [Bin(10 * i, 10 * i + 9, None) for i in range(count)]
    line = labeled_marks(bins, marks, repeat)
    columns = {step // 10 * repeat for step, _ in marks if step < 10 * count}
    assert {i for i, c in enumerate(line) if c == "^"} == columns
    assert len(line) <= count * repeat
    words = set(line.replace("^", " ").replace("hot expert", " ").split())
    assert words <= {"rearrangement"}
