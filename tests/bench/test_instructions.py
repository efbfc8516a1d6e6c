"""What a frame costs in instructions, counted and not timed, is what the repository says."""

from __future__ import annotations

import shutil

import pytest

from tests.benchmarks import instructions


@pytest.mark.parametrize("path", instructions.PATHS)
def test_every_path_carries_its_frames(path: str) -> None:
    """Or what is counted would be nothing: the paths assert what comes out of them."""
    carry = instructions.frame_by_frame(path)
    for tick in range(30):
        carry(tick)
    assert path in instructions.recorded()["instructions"]  # type: ignore[operator]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_a_frame_costs_what_is_recorded() -> None:
    """If this fails and the change is meant: `python tests/benchmarks/instructions.py --record`, and say why in the commit."""
    recorded = instructions.recorded()
    if instructions.versions() != recorded["versions"]:
        pytest.skip(f"recorded with {recorded['versions']}")
    counted = instructions.count(instructions.PATHS)
    changes = {path: counted[path] / figure - 1 for path, figure in recorded["instructions"].items()}  # type: ignore[attr-defined]
    assert {} == {path: f"{change:+.1%}" for path, change in changes.items() if abs(change) > instructions.MOST}
