"""The tool that asks whether the tests would notice: what it changes, what becomes of it, and that its list is of today."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutation
from tests.results import load

SOURCE = '''
"""A docstring."""
from math import pi
LIMIT: int = 3
class Point(Struct, frozen=True):
    x: "int" = 0
    def far(self, most=10):
        """Another."""
        if self.x > most and not self.odd:
            raise ValueError("far")
        self.seen = True
        return self.x == -1
'''


def test_a_module_is_changed_in_one_small_place_after_the_other() -> None:
    assert [
        "module: LIMIT: int = 3 → LIMIT: int = 4",
        "module: LIMIT: int = 3 → LIMIT: int = 2",
        'Point: x: "int" = 0 → x: "int" = 1'.replace('"', "'"),
        'Point: x: "int" = 0 → x: "int" = -1'.replace('"', "'"),
        "Point.far: if self.x > most and (not self.odd): → pass",
        "Point.far: self.seen = True → pass",
        "Point.far: def far(self, most=10): → def far(self, most=11):",
        "Point.far: def far(self, most=10): → def far(self, most=9):",
        "Point.far: if self.x > most and (not self.odd): → if not (self.x > most and (not self.odd)):",
        "Point.far: raise ValueError('far') → pass",
        "Point.far: if self.x > most and (not self.odd): → if self.x > most or not self.odd:",
        "Point.far: if self.x > most and (not self.odd): → if self.x >= most and (not self.odd):",
        "Point.far: if self.x > most and (not self.odd): → if self.x > most and (not not self.odd):",
        "Point.far: self.seen = True → self.seen = False",
        "Point.far: return self.x == -1 → return None",
        "Point.far: return self.x == -1 → return self.x != -1",
        "Point.far: return self.x == -1 → return self.x == +1",
        "Point.far: return self.x == -1 → return self.x == -2",
        "Point.far: return self.x == -1 → return self.x == -0",
    ] == [mutant.change for mutant in mutation.mutants(SOURCE)]


def test_parts_are_the_whole() -> None:
    parts = [mutant for start in range(3) for mutant in mutation.mutants(SOURCE, slice(start, None, 3))]
    assert [*mutation.mutants(SOURCE)] == sorted(parts)


TESTS = """
from gateway.media import seen

def test_it():
    assert 3 == seen(3)
"""


@pytest.mark.parametrize(
    ("body", "end"),
    [("return n", "survived"), ("return n + 1", "killed"), ("raise SystemExit", "killed"), ("while n: pass", "looped")],
)
def test_what_becomes_of_a_mutant(tmp_path: Path, body: str, end: str) -> None:
    """In a process of its own, since whoever is forked must not have loaded the module."""
    (tmp_path / "test_seen.py").write_text(TESTS)
    program = (
        "import sys; from tests import mutation; sys.dont_write_bytecode = True; mutation.load_all_but('gateway.media');"
        f"print(mutation.run('gateway.media', 'def seen(n):\\n  {body}', [{str(tmp_path / 'test_seen.py')!r}], 2).end)"
    )
    command = [sys.executable, "-c", program]
    assert f"{end}\n" == subprocess.run(command, cwd=mutation.ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout


def test_the_sum_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [("a", "killed"), ("b", "survived"), ("c", "looped"), ("d", "stuck"), ("e", "survived")]
    reasons = [{"module": "m", "change": "b", "reason": "why"}, {"module": "other", "change": "e", "reason": "why"}]
    monkeypatch.setattr(mutation, "digest", lambda name: f"of {name}")
    figures = mutation.summed("m", ends, reasons)
    expected = {"source": "of m", "mutants": 5, "killed": 2, "harmless": 1}
    assert expected | {"excused": ["b"], "looped": ["c"], "survived": ["d", "e"]} == figures
    assert not mutation.passes(figures)
    again = mutation.summed(
        "m", [("d", "survived"), ("e", "killed")], [*reasons, {"module": "m", "change": "d", "reason": "why"}]
    )
    expected |= {"killed": 3, "harmless": 2}
    assert expected | {"excused": ["b", "d"], "looped": ["c"], "survived": []} == mutation.merged(figures, again)
    assert mutation.passes({"mutants": 100, "killed": 85, "harmless": 15, "survived": []})
    assert not mutation.passes({"mutants": 100, "killed": 84, "harmless": 16, "survived": []})
    assert not mutation.passes({"mutants": 100, "killed": 99, "harmless": 0, "survived": ["x"]})


@pytest.mark.parametrize("name", mutation.TESTS)
def test_what_is_called_harmless_is_still_there(name: str) -> None:
    reasons = mutation.excuses()
    assert [] == mutation.stale(name, mutation.source_of(name).read_text(), reasons)
    assert set() == {each["module"] for each in reasons} - mutation.TESTS.keys()
    changes = [each["change"] for each in reasons if each["module"] == name]
    assert len(set(changes)) == len(changes)


def test_figures_are_of_modules_that_there_are() -> None:
    stored = load()["mutation"].figures
    assert set() == stored.keys() - mutation.TESTS.keys()
    assert json.dumps(stored)
