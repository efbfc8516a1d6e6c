"""The quoted figures are what the code gives. A difference of one in the last digit is another machine's arithmetic."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.benchmarks.audio import readme_rows

ROOT = Path(__file__).parents[2]
QUOTING = [
    path
    for path in (ROOT / "README.md", ROOT / "tests" / "benchmarks" / "README.md")
    if path.exists() and "<!-- audio-table -->" in path.read_text(encoding="utf-8")
]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def measured() -> list[str]:
    return readme_rows().splitlines()


@pytest.mark.parametrize("path", QUOTING, ids=lambda path: str(path.relative_to(ROOT)))
def test_quoted_table_is_what_the_code_gives(path: Path, measured: list[str]) -> None:
    text = path.read_text(encoding="utf-8")
    quoted = text.split("<!-- audio-table -->")[1].split("<!-- /audio-table -->")[0].strip().splitlines()
    rows = {_subject(row): row for row in measured}
    assert len(quoted) > 5
    for actual in quoted:
        expected = rows[_subject(actual)]
        assert NUMBER.sub("#", expected) == NUMBER.sub("#", actual)
        for a, b in zip(NUMBER.findall(expected), NUMBER.findall(actual), strict=True):
            digits = len(b.partition(".")[2])
            assert float(a) == pytest.approx(float(b), abs=1.001 * 10**-digits), f"measured {expected}, quoted {actual}"


def test_both_readmes_quote_it_and_the_benchmarks_quote_all_of_it(measured: list[str]) -> None:
    assert [ROOT / "README.md", ROOT / "tests" / "benchmarks" / "README.md"] == QUOTING
    text = QUOTING[1].read_text(encoding="utf-8")
    assert len(measured) == len(text.split("<!-- audio-table -->")[1].split("<!-- /audio-table -->")[0].strip().splitlines())


def _subject(row: str) -> tuple[str, ...]:
    """A row's conversion and what it was done by."""
    return tuple(cell.strip() for cell in row.split("|")[1:3])
