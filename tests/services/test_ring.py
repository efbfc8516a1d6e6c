"""Whatever happens to connections: each frame reaches the service once or is told in a hole, words keep their place, and the
account balances."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.events import GapReason, Stop
from gateway.media import MULAW_8K
from gateway.services.framed import Flags
from gateway.services.ring import MOST_RUNS, MOST_WORD_BYTES, Entry, Frame, Hole, Ring, Word

SIZE, HEARD = 160, 160
CAPACITY_MS = 200  # ten frames


def ring(capacity_ms: int = CAPACITY_MS) -> Ring:
    return Ring(MULAW_8K, SIZE, capacity_ms)


def hear(ring: Ring, count: int = 1) -> None:
    for _ in range(count):
        ring.hear(ring.next_seq.to_bytes(4, "little") * 40, HEARD)


def drained(ring: Ring, *, keep: bool = True) -> list[Any]:
    """Frames by number, words by text, holes by frames."""
    out: list[Any] = []
    while (entry := ring.take(keep=keep)) is not None:
        match entry:
            case Frame():
                out.append(entry.seq)
            case Word():
                out.append(entry.message)
            case Hole():
                out.append(entry)
    return out


def hole(frames: int, reason: GapReason) -> Hole:
    return Hole(frames * SIZE, reason)


def test_what_is_acknowledged_is_forgotten_with_the_words_before_it() -> None:
    subject = ring()
    hear(subject, 2)
    subject.say("a", 0.0)
    hear(subject, 2)
    subject.say("b", 0.0)
    assert [0, 1, "a", 2, 3, "b"] == drained(subject)
    assert subject.ack(2)
    assert (3, 160) == (subject.oldest, subject.audio_bytes)
    subject.resume(3)
    assert [3, "b"] == drained(subject)
    assert not subject.ack(4), "never sent"
    assert subject.ack(1), "an old acknowledgement is harmless"


def test_a_resume_replays_from_where_the_service_is() -> None:
    subject = ring()
    hear(subject, 3)
    drained(subject)
    hear(subject, 2)
    assert 0 == subject.resume(2)
    assert [2, 3, 4] == drained(subject)
    assert 5 * HEARD == subject.forwarded


def test_an_outage_longer_than_the_ring_is_one_hole_exact_to_the_frame() -> None:
    subject = ring()
    hear(subject, 5)
    drained(subject)
    subject.ack(2)
    subject.say("x", 0.0)
    hear(subject, 20)
    assert 15 == subject.oldest
    assert 12 * SIZE == subject.resume(3)
    assert ["x", hole(12, GapReason.RESUME), *range(15, 25)] == drained(subject)
    assert 13 * HEARD == subject.forwarded


def test_live_leaves_out_the_audio_and_keeps_the_words() -> None:
    subject = ring()
    hear(subject, 5)
    drained(subject)
    subject.ack(1)
    subject.say("x", 0.0)
    hear(subject, 4)
    assert 7 * SIZE == subject.resume(None)
    assert ["x", hole(7, GapReason.RESUME)] == drained(subject)
    hear(subject)
    assert [9] == drained(subject)
    assert 3 * HEARD == subject.forwarded


def test_raw_mode_goes_on_live_and_tells_exactly_what_was_missed() -> None:
    subject = ring()
    hear(subject, 5)
    assert [*range(5)] == drained(subject, keep=False)
    subject.say("x", 0.0)
    hear(subject, 14)  # four more than fit
    assert 14 * SIZE == subject.live()
    hear(subject)
    assert ["x", hole(14, GapReason.RESUME), 19] == drained(subject, keep=False)
    assert 6 * HEARD == subject.forwarded


def test_a_service_that_never_took_the_call_leaves_everything_to_the_next() -> None:
    subject = ring()
    hear(subject, 3)
    subject.say("x", 0.0)
    assert [0, 1, 2, "x"] == drained(subject)
    subject.rewind()
    assert [0, 1, 2, "x"] == drained(subject)
    assert 3 * HEARD == subject.forwarded


def test_what_could_not_be_sent_waits_in_its_place() -> None:
    subject = ring()
    hear(subject, 2)
    for keep in (True, False):
        entry = subject.take(keep=keep)
        assert isinstance(entry, Frame)
        subject.put_back(entry)
        assert (0, 2 * SIZE, 2 * SIZE) == (subject.forwarded, subject.audio_bytes, subject.waiting_bytes)
    assert [0, 1] == drained(subject)


def test_overflow_is_told_before_the_first_frame_left_and_before_the_stop() -> None:
    subject = ring()
    subject.say("x", 0.0)
    hear(subject, 13)
    assert ["x", hole(3, GapReason.OVERFLOW), *range(3, 13)] == drained(subject)
    subject = ring(20)
    hear(subject, 2)
    subject.take(keep=False)
    hear(subject)
    subject.take(keep=False)
    subject.say(stop := Stop(), 0.0)
    assert [2, stop] == drained(subject)


def test_time_without_audio_is_a_discontinuity() -> None:
    subject = ring()
    hear(subject)
    subject.skip(800)
    hear(subject, 2)
    frames = [subject.take(keep=True) for _ in range(3)]
    assert [0, 960, 1120] == [frame.pos for frame in frames if isinstance(frame, Frame)]
    assert [0, Flags.DISCONTINUITY, 0] == [frame.flags for frame in frames if isinstance(frame, Frame)]


def test_words_are_bounded_and_those_of_a_text_stream_age() -> None:
    subject = Ring(None, SIZE, 10_000)
    for second in range(30):
        subject.say(f"word {second}", float(second))
        drained(subject)
    subject.rewind()
    assert [f"word {second}" for second in range(19, 30)] == drained(subject)
    for _ in range(5):
        subject.say("x" * (MOST_WORD_BYTES // 4), 30.0)
    assert 1 == subject.dropped_words
    subject.say(stop := Stop(), 31.0)
    assert stop == drained(subject)[-1]


@settings(deadline=None)  # other tests run beside this one
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("hear"), st.integers(1, 15)),
            st.tuples(st.just("say"), st.just(0)),
            st.tuples(st.just("send"), st.integers(1, 20)),
            st.tuples(st.just("ack"), st.just(0)),
            st.tuples(st.just("kill"), st.integers(0, 6)),
            st.tuples(st.just("arrive"), st.integers(0, 6)),
            st.tuples(st.just("fail"), st.just(0)),
        ),
        max_size=60,
    )
)
@example([("hear", 1), ("send", 1), ("hear", 11), ("send", 3), ("hear", 1)])
@example([("say", 0), ("hear", 1), ("hear", 1), ("send", 2), ("hear", 9)])
def test_nothing_is_lost_untold_and_nothing_comes_twice(steps: list[tuple[str, int]]) -> None:
    """A service in framed mode that remembers; `kill` loses the last so many messages that were on their way."""
    subject = ring()
    got: list[int] = []
    words: list[str] = []
    told = 0  # frames that holes have told missing since the last frame
    flight: list[Entry | Hole] = []
    said = 0

    def arrive(entries: list[Entry | Hole]) -> None:
        nonlocal told
        for entry in entries:
            match entry:
                case Frame():
                    assert (got[-1] + 1 if got else 0) + told == entry.seq
                    assert entry.payload == entry.seq.to_bytes(4, "little") * 40
                    got.append(entry.seq)
                    told = 0
                case Word():
                    if str(entry.message) not in words:
                        words.append(str(entry.message))
                case Hole():
                    told += entry.size // SIZE

    def kill(lost: int) -> None:
        nonlocal told
        arrive(flight[: max(0, len(flight) - lost)])
        flight.clear()
        told = 0
        subject.resume(got[-1] + 1 if got else 0)

    for what, count in steps:
        if what == "hear":
            hear(subject, count)
        elif what == "say":
            subject.say(str(said), 0.0)
            said += 1
        elif what == "send":
            for _ in range(count):
                if (entry := subject.take(keep=True)) is not None:
                    flight.append(entry)
        elif what == "fail":
            if (entry := subject.take(keep=True)) is not None:
                subject.put_back(entry)
        elif what == "arrive":
            arrive(flight[:count])
            del flight[:count]
        elif what == "ack":
            arrive(flight)
            flight.clear()
            if got:
                assert subject.ack(got[-1])
        else:
            kill(count)
        assert subject.audio_bytes <= 10 * SIZE
        assert 0 <= subject.waiting_bytes <= subject.audio_bytes
        assert 0 <= subject.forwarded <= subject.next_seq * HEARD
    kill(3)
    while (entry := subject.take(keep=True)) is not None:
        arrive([entry])
    assert words == [str(n) for n in range(said)]
    assert subject.next_seq - 1 == (got[-1] if got else -1)
    assert len(got) * HEARD == subject.forwarded


def test_what_is_remembered_of_a_service_that_never_acknowledges_is_bounded() -> None:
    subject = ring()
    for _ in range(1000):
        hear(subject, 11)  # one too many
        drained(subject, keep=True)
    assert MOST_RUNS == len(subject._gone)
    told = subject.forwarded
    assert subject.resume(None) > 0
    assert 0 == subject.forwarded < told
