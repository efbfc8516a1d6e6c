"""The fault table is whole, names only what there is, and is what the README shows."""

from __future__ import annotations

import re

from tests import faults
from tests.results import load


def test_every_row_has_a_test_or_a_reason() -> None:
    tests = faults.collected()
    assert [] == [row.id for row in faults.ROWS if not (faults.tests_of(row, tests) or row.open or row.limits)]


def test_every_id_is_there_once_and_every_id_of_a_test_has_a_row() -> None:
    ids = [row.id for row in faults.ROWS]
    assert len(ids) == len(set(ids))
    sizes = {"F": 14, "T": 10, "D": 10, "P": 7, "O": 13, "S": 16}
    assert {f"{letter}{number}" for letter, size in sizes.items() for number in range(1, size + 1)} == set(ids)
    assert set() == set(faults.collected()) - set(ids)


def test_tests_that_are_named_exist() -> None:
    assert set() == {test for row in faults.ROWS for test in row.tests} - faults.every()


def test_figures_have_a_reader_and_a_row() -> None:
    of_modules = {"mutation"}
    assert {name for row in faults.ROWS for name in row.results} | of_modules == set(faults.FIGURES)
    assert set(load()) <= set(faults.FIGURES)
    for name, result in load().items():
        assert re.search(r"\d", faults.FIGURES[name](result.figures))
        assert name == result.name


def test_the_readme_is_what_the_command_writes() -> None:
    text = faults.README.read_text()
    assert faults.rewritten(text) == text, "run: python -m tests.faults"
