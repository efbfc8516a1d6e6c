"""Fuzzing in short (F1, D6), and everything that has failed before. Long runs: `python -m tests.fuzz`."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.fuzz import decode, session
from tests.fuzz.codecs import TARGETS, transcripts
from tests.fuzz.decode import REGRESSIONS, Failure

KEPT = {path.stem: msgspec.json.decode(path.read_bytes(), type=Failure) for path in sorted(REGRESSIONS.glob("*.json"))}


@pytest.mark.parametrize("codec", TARGETS)
def test_f1_d6_any_frame_is_read_or_malformed(codec: str) -> None:
    figures = decode.run(codec, 4000, seed=len(codec))
    assert [] == [failure.error for failure in figures.failures]
    assert 4000 == figures.frames
    assert figures.reasons["read"] > 40, "a fuzzer whose frames are all rubbish tests one line"
    assert figures.reasons.total() - figures.reasons["read"] > 1000


@pytest.mark.parametrize("kind", session.KINDS)
def test_f1_d6_a_session_keeps_its_promises_between_two_that_talk_rubbish(kind: str) -> None:
    figures = session.run(kind, 5000, seed=7)
    assert [] == [failure.error for failure in figures.failures]
    assert figures.frames >= 5000
    assert figures.reasons["calls"] >= 10


@pytest.mark.parametrize("name", KEPT)
def test_f1_what_has_failed_once_does_not_fail_again(name: str) -> None:
    failure = KEPT[name]
    if failure.level == "decode":
        decode.replay(TARGETS[failure.codec](), failure.script, failure.given())
    else:
        session.replay(transcripts(failure.codec)[failure.script], failure.given())


def test_the_same_seed_is_the_same_run() -> None:
    one, other = (decode.run("native", 2000, seed=3).reasons for _ in range(2))
    assert one == other
    assert one != decode.run("native", 2000, seed=4).reasons


def test_a_failure_is_found_kept_and_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer itself: a decoder with a hole in it."""
    target = TARGETS["native"]()

    def make(_: int) -> object:
        good = target.make(0)

        def bad(frame: str | bytes) -> object:
            if '"clear"' in str(frame):
                raise KeyError("clear")
            return good(frame)

        return bad

    holed = target._replace(make=make)  # type: ignore[arg-type]
    monkeypatch.setitem(TARGETS, "native", lambda: holed)
    figures = decode.run("native", 4000, seed=1)
    assert "KeyError: 'clear'" in {failure.error for failure in figures.failures}
    kept = msgspec.json.decode(msgspec.json.encode(figures.failures[0]), type=Failure)
    with pytest.raises(KeyError):
        decode.replay(holed, kept.script, kept.given())
    decode.replay(target, kept.script, kept.given())
