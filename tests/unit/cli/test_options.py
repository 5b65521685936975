"""Values of options: ranges of steps, and what to write instead of a wrong one."""

from __future__ import annotations

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from eplb_analyze.cli.options import one_range, parse_steps
from eplb_analyze.sessions.step_range import NO_END, StepRange


@pytest.mark.parametrize(
    ("text", "first", "end"),
    [("1000-1999", 1000, 2000), ("7-7", 7, 8), ("1000-", 1000, NO_END), ("-1999", 0, 2000), ("-0", 0, 1)],
)
def test_range_of_steps_includes_both_ends(text: str, first: int, end: int) -> None:
    assert parse_steps(text) == StepRange(first, end)


@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_printed_range_is_what_the_option_takes(first: int, count: int) -> None:
    for steps in (StepRange(first, first + count + 1), StepRange(first)):
        assert parse_steps(str(steps)) == steps


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("1000:2000", "write --steps 1000-1999, which includes both ends"),
        ("1000:", "write --steps 1000-,"),
        (":2000", "write --steps 0-1999,"),
        ("9", "write --step 9"),
        ("9-3", "its end is before its start"),
        ("9:3", "write M-N"),
        (":", "write M-N"),
        ("-", "write M-N"),
        ("1 to 5", "write M-N"),
        ("", "write M-N"),
    ],
)
def test_text_that_is_no_range_says_what_to_write(text: str, remedy: str) -> None:
    with pytest.raises(typer.BadParameter) as raised:
        parse_steps(text)
    assert remedy in raised.value.message


def test_one_step_is_a_range_of_one() -> None:
    assert one_range(None, 9) == StepRange(9, 10)
    assert one_range(StepRange(1, 2), None) == StepRange(1, 2)
    assert one_range(None, None) is None
    with pytest.raises(typer.BadParameter, match="--step and --steps cannot be combined"):
        one_range(StepRange(1, 2), 9)
