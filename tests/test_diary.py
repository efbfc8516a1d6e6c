"""What a signed request is, by what became of its call."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import ledger
from gateway.diary import ENTRY_BYTES, RETRY_SECS, Entry, Kind, Verdict, judge, unpack

T = 1_800_000_000
F, G = b"F" * 8, b"G" * 8
FRESH, RETRY, EARLY, REPLAY = Verdict
LETTERS = {"F": (Kind.ANSWERED, F), "G": (Kind.ANSWERED, G), "e": (Kind.ENTERED,), "l": (Kind.LEFT,), "o": (Kind.OVER,)}


def diary(text: str) -> list[Entry]:
    """One entry a second: F and G were answered, a stream entered, left, the call is over."""
    return [Entry(LETTERS[letter][0], T + number, *LETTERS[letter][1:]) for number, letter in enumerate(text)]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("", FRESH),
        ("G", FRESH),
        ("Ge", FRESH),
        ("F", RETRY),
        ("FG", RETRY),
        ("Fl", RETRY),
        ("Fe", EARLY),
        ("FeG", EARLY),
        ("Fel", FRESH),
        ("FelF", RETRY),
        ("FelFe", EARLY),
        ("FelFel", FRESH),
        ("Felo", REPLAY),
        ("elo", REPLAY),
        ("Fo", REPLAY),
        ("oF", REPLAY),
    ],
)
def test_of_a_request_that_begins_a_call(what: str, expected: Verdict) -> None:
    assert expected is judge(diary(what), F, T + 20, asks_for_stream=True, nonce=False)


@pytest.mark.parametrize(
    ("what", "expected"),
    [("", FRESH), ("G", FRESH), ("F", RETRY), ("Fe", REPLAY), ("Fel", REPLAY), ("GelF", RETRY), ("Gelo", REPLAY)],
)
def test_a_nonce_is_good_for_one_stream(what: str, expected: Verdict) -> None:
    assert expected is judge(diary(what), F, T + 20, asks_for_stream=True, nonce=True)


@pytest.mark.parametrize(
    ("what", "expected"),
    [("Gel", FRESH), ("GelF", RETRY), ("GelFo", RETRY), ("GeFol", RETRY), ("GeFloe", REPLAY), ("Gelo", FRESH), ("GFe", EARLY)],
)
@pytest.mark.parametrize("nonce", [True, False])
def test_what_a_carrier_says_after_a_call_it_may_say_again_at_once(what: str, expected: Verdict, nonce: bool) -> None:
    expected = REPLAY if nonce and expected is EARLY else expected
    assert expected is judge(diary(what), F, T + 20, asks_for_stream=False, nonce=nonce)


@pytest.mark.parametrize(("age", "expected"), [(RETRY_SECS - 1, RETRY), (RETRY_SECS, REPLAY), (3600, REPLAY)])
@pytest.mark.parametrize("asks_for_stream", [True, False])
@pytest.mark.parametrize("nonce", [True, False])
def test_a_retry_comes_soon(age: float, expected: Verdict, asks_for_stream: bool, nonce: bool) -> None:
    assert expected is judge(diary("F"), F, T + age, asks_for_stream=asks_for_stream, nonce=nonce)
    again = diary("FelF")  # the call came back: it is its last answer that was lost
    assert expected is judge(again, F, again[-1].at + age, asks_for_stream=asks_for_stream, nonce=nonce)


@given(st.text("FGelo", max_size=12), st.booleans(), st.booleans(), st.integers(0, 100))
def test_what_has_not_been_answered_is_no_replay_unless_the_call_is_over(what: str, asks: bool, nonce: bool, age: int) -> None:
    verdict = judge(diary(what), b"H" * 8, T + age, asks_for_stream=asks, nonce=nonce)
    assert (REPLAY if asks and "o" in what else FRESH) is verdict


@given(st.text("FGelo", max_size=12), st.integers(20, 100))
def test_after_an_entry_nothing_that_was_answered_before_is_a_retry(what: str, age: int) -> None:
    for nonce in (True, False):
        assert judge(diary(f"F{what}e"), F, T + age, asks_for_stream=True, nonce=nonce) in (EARLY, REPLAY)


def test_entries_are_as_long_as_the_ledgers_notes_and_come_back() -> None:
    entries = diary("FelGo")
    packed = [entry.pack() for entry in entries]
    assert ENTRY_BYTES == ledger.NOTE_BYTES == len(packed[0])
    assert entries == unpack(packed)
    assert 60 == RETRY_SECS
    written = [b"%c\x6b\x49\xd2%c" % (kind, number) for number, kind in enumerate((1, 2, 3, 1, 4))]
    assert written == [each[:5] for each in packed], "processes of an older version may have written them"
    assert entries[1:] == unpack([b"\x09" + packed[0][1:], *packed[1:]]), "a kind that is not known"
