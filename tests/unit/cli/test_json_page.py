"""docs/json.md describes every key of every JSON document, and is what the code says now."""

from __future__ import annotations

from typing import Any

import pytest
from command_lines import ARGUMENTS
from json_page import PAGE, RENEW, REPORTS, documents, generate, undocumented


@pytest.fixture(scope="module")
def real() -> list[tuple[str, dict[str, Any]]]:
    return list(documents())


def test_page_is_up_to_date(real: list[tuple[str, dict[str, Any]]]) -> None:
    assert PAGE.read_text() == generate(real), f"docs/json.md is out of date: run `{RENEW}` and commit it"


def test_every_key_of_real_output_is_documented(real: list[tuple[str, dict[str, Any]]]) -> None:
    assert {command for command, _ in real} == set(ARGUMENTS)
    assert undocumented(PAGE.read_text(), real) == [], f"run `{RENEW}` and commit docs/json.md"


def test_key_that_the_page_lacks_is_found(real: list[tuple[str, dict[str, Any]]]) -> None:
    more = [("check", {**document, "odd": 1}) for command, document in real if command == "check"]
    assert undocumented(PAGE.read_text(), [*real, *more]) == ["check: odd"]


def test_every_command_has_a_section_and_most_have_a_report_class() -> None:
    page = PAGE.read_text()
    assert [command for command in ARGUMENTS if f"\n## {command}\n" not in page] == []
    assert set(ARGUMENTS) - set(REPORTS) == {"formulas"}
