"""The carrier's playout queue and speech synthesis: examples to the sample, and laws that hold under any interleaving."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.ear import Cut, Ear, Fate, Mark
from gateway.events import BargeIn, Checkpoint, Clear, Event, Outcome, Party, Play, Say, Speech, Spoken
from gateway.media import MULAW_8K, Encoding, MediaFormat
from gateway.provider import Habits
from gateway.voice import Voice

ECHOES = Habits(echoes_cleared=True)
CONFIRMS = Habits(confirms_clear=True)
PLAYED, CLEARED, LOST = Outcome.PLAYED, Outcome.CLEARED, Outcome.LOST


def ms(count: float, byte: bytes = b"a") -> bytes:
    return byte * int(count * 8)


def test_a_mark_is_reached_when_the_audio_before_it_has_played() -> None:
    ear = Ear(MULAW_8K, ECHOES)
    ear.media(ms(100), 10.0)
    assert ear.checkpoint("a", 10.0) == []
    ear.media(ms(60), 10.05)
    assert ear.checkpoint("b", 10.05) == []
    assert ear.next_event() == 10.1
    assert ear.advance(10.099) == []
    assert [Checkpoint("a", PLAYED, 100)] == ear.advance(10.1)
    assert [Checkpoint("b", PLAYED, 60)] == ear.advance(99.0)
    assert None is ear.next_event()
    assert [Mark("a", PLAYED, 100, True, 10.1), Mark("b", PLAYED, 60, True, 10.16)] == ear.marks


def test_a_mark_on_an_empty_queue_is_echoed_at_once() -> None:
    ear = Ear(MULAW_8K)
    assert [Checkpoint("a", PLAYED, 0)] == ear.checkpoint("a", 1.0)
    ear.media(ms(20), 1.0)
    ear.advance(2.0)
    assert [Checkpoint("b", PLAYED, 20)] == ear.checkpoint("b", 2.0)
    assert [mark.at for mark in ear.marks] == [1.0, 2.0]


def test_the_same_name_twice_comes_back_twice() -> None:
    ear = Ear(MULAW_8K)
    for _ in range(2):
        ear.media(ms(20), 0.0)
        ear.checkpoint("a", 0.0)
    assert [Checkpoint("a", PLAYED, 20), Checkpoint("a", PLAYED, 20)] == ear.advance(1.0)


def test_marks_overtaken_by_arriving_audio_are_not_forgotten() -> None:
    ear = Ear(MULAW_8K)
    ear.media(ms(20), 0.0)
    ear.checkpoint("a", 0.0)
    ear.media(ms(20), 0.5)
    assert ear.next_event() == 0.02
    assert [Checkpoint("a", PLAYED, 20)] == ear.advance(0.5)


def test_clear_echoes_pending_marks_as_if_they_had_played_but_the_truth_says_cleared() -> None:
    ear = Ear(MULAW_8K, ECHOES)
    for name in "abc":
        ear.media(ms(100), 0.0)
        ear.checkpoint(name, 0.0)
    ear.barge_in(0.1)
    assert [Checkpoint("a", PLAYED, 100), Checkpoint("b", CLEARED, 50), Checkpoint("c", CLEARED, 0)] == ear.clear(0.15)
    assert [mark.echoed for mark in ear.marks] == [True, True, True]
    assert [Cut(0.15, 50, 150, 0.0, 50.0)] == [
        Cut(c.at, c.played_ms, c.cleared_ms, c.time_to_silence_ms, round(c.since_barge_in_ms or 0, 6)) for c in ear.cuts
    ]
    assert not ear.sounding(0.15)
    assert ms(150) == bytes(ear.heard)


def test_clear_that_is_confirmed_never_returns_its_checkpoints() -> None:
    ear = Ear(MULAW_8K, CONFIRMS)
    ear.media(ms(100), 0.0)
    ear.checkpoint("a", 0.0)
    assert [Clear(40, 60)] == ear.clear(0.04)
    assert ear.advance(9.0) == []
    assert [Mark("a", CLEARED, 40, False, 0.04)] == ear.marks


def test_audio_after_a_clear_is_a_new_queue() -> None:
    ear = Ear(MULAW_8K, ECHOES)
    ear.media(ms(100), 0.0)
    ear.clear(0.04)
    ear.media(ms(20, b"b"), 0.06)
    assert ear.checkpoint("b", 0.06) == []
    assert [Checkpoint("b", PLAYED, 20)] == ear.advance(0.08)
    assert ms(40) + ms(20, b"\xff") + ms(20, b"b") == bytes(ear.heard)
    assert ear.underruns == 0


def test_silence_is_heard_where_the_queue_ran_dry_and_counted_in_mid_speech_only() -> None:
    ear = Ear(MULAW_8K)
    ear.media(ms(20), 5.0)
    ear.media(ms(20, b"b"), 5.05)
    ear.media(ms(20, b"c"), 5.07)
    assert (ear.underruns, round(ear.underrun_ms, 6)) == (1, 30.0)
    ear.media(ms(20, b"d"), 6.0)
    ear.advance(7.0)
    assert ear.underruns == 1
    assert ms(20) + ms(30, b"\xff") + ms(20, b"b") + ms(20, b"c") + ms(910, b"\xff") + ms(20, b"d") == bytes(ear.heard)


def test_jitter_covers_chunks_that_come_a_little_late() -> None:
    ear = Ear(MULAW_8K, jitter_ms=20)
    for k in range(50):
        ear.media(ms(20), k * 0.02 + (k % 3) * 0.005)
    ear.advance(5.0)
    assert (0, 0.02, ms(1000)) == (ear.underruns, ear.first_heard_at, bytes(ear.heard))


def test_buffered_milliseconds_and_their_maximum() -> None:
    ear = Ear(MULAW_8K)
    assert ear.buffered_ms(0.0) == 0
    ear.media(ms(300), 0.0)
    ear.media(ms(100), 0.1)
    ear.media(ms(50), 0.2)
    assert [ear.max_buffered_ms, *(round(ear.buffered_ms(t), 6) for t in (0.2, 0.4, 9.0))] == [300, 250, 50, 0]


def test_half_a_sample_waits_for_its_other_half() -> None:
    ear = Ear(MediaFormat(Encoding.PCM_S16LE, 8000))
    ear.media(b"\x01\x02\x03", 0.0)
    ear.media(b"\x04", 0.0)
    ear.advance(1.0)
    assert bytes(ear.heard) == b"\x01\x02\x03\x04"


def test_the_end_of_the_stream_loses_what_has_not_sounded() -> None:
    ear = Ear(MULAW_8K, ECHOES)
    ear.media(ms(100), 0.0)
    ear.checkpoint("a", 0.0)
    ear.end(0.03)
    assert [Mark("a", LOST, 30, False, 0.03)] == ear.marks
    assert ear.advance(9.0) == []
    assert (ear.received, ear.played, ear.lost) == (800, 240, 560)


def test_echoes_can_be_late_doubled_or_missing_and_keep_their_order() -> None:
    fates = {"a": Fate(late_ms=500), "b": Fate(copies=2), "c": Fate(copies=0)}
    ear = Ear(MULAW_8K, fate=fates.__getitem__)
    for name in "abc":
        ear.media(ms(20), 0.0)
        ear.checkpoint(name, 0.0)
    assert ear.advance(0.3) == []
    assert ear.next_event() == 0.52
    assert [event.name for event in ear.advance(0.6) if isinstance(event, Checkpoint)] == ["a", "b", "b"]
    assert [(mark.name, mark.echoed) for mark in ear.marks] == [("a", True), ("b", True), ("c", False)]


step = st.one_of(
    st.tuples(st.just("media"), st.integers(0, 4000)),
    st.tuples(st.just("mark"), st.just(0)),
    st.tuples(st.just("clear"), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 600)),
)


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(step, max_size=40),
    habits=st.sampled_from([ECHOES, CONFIRMS, Habits()]),
    width=st.sampled_from([MULAW_8K, MediaFormat(Encoding.PCM_S16LE, 16000)]),
    jitter=st.sampled_from([0, 20]),
)
def test_no_sample_and_no_mark_is_ever_lost_or_doubled(
    steps: list[tuple[str, int]], habits: Habits, width: MediaFormat, jitter: int
) -> None:
    ear, now, sent, silences = Ear(width, habits, jitter_ms=jitter), 100.0, 0, 0
    names: list[str] = []
    echoed: list[Event] = []
    for what, amount in steps:
        match what:
            case "media":
                ear.media(b"a" * amount, now)
                sent += amount
            case "mark":
                names.append(f"m{len(names)}")
                echoed += ear.checkpoint(names[-1], now)
            case "clear":
                echoed += ear.clear(now)
                sent -= sent % width.sample_bytes
                silences += 1
            case _:
                now += amount / 1000
                echoed += ear.advance(now)
        assert ear.received == ear.played + ear.cleared + ear.lost + round(ear.buffered_ms(now) * width.sample_rate / 1000)
        assert sent // width.sample_bytes == ear.received
    settled = len(ear.marks)
    ear.end(now)
    assert ear.received == ear.played + ear.cleared + ear.lost
    assert ear.played == bytes(ear.heard).count(b"a") // width.sample_bytes
    assert names == [mark.name for mark in ear.marks]
    returned = [event.name for event in echoed if isinstance(event, Checkpoint)]
    assert returned == [mark.name for mark in ear.marks[:settled] if mark.echoed]
    assert len(returned) == len(set(returned))
    assert silences == len(ear.cuts)
    assert silences * habits.confirms_clear == sum(isinstance(event, Clear) for event in echoed)
    told = sum(mark.played_ms for mark in ear.marks if mark.outcome is not LOST)
    told += sum(cut.played_ms for cut in ear.cuts) - sum(m.played_ms for m in ear.marks if m.outcome is CLEARED)
    unmarked = sum(mark.played_ms for mark in ear.marks if mark.outcome is LOST)
    assert told + unmarked <= ear.played * 1000 / width.sample_rate + len(ear.marks) + len(ear.cuts)


def test_text_is_spoken_at_its_pace_in_the_carriers_own_pieces() -> None:
    voice = Voice(chars_per_sec=10, latency_secs=0.3)
    for token, final in [("I", False), (" heard:", False), (" Holding.", True)]:
        assert voice.say(Say(token, final), 0.0) == []
    assert voice.next_event() == 0.3
    assert [Speech(Party.AGENT, True)] == voice.advance(0.3)
    assert [Spoken("I heard:")] == voice.advance(1.11)
    assert [Spoken(" Holding."), Speech(Party.AGENT, False)] == voice.advance(2.01)
    assert (voice.spoken, voice.next_event()) == ("I heard: Holding.", None)


def test_digits_wait_behind_speech_and_are_confirmed() -> None:
    voice = Voice(chars_per_sec=10, latency_secs=0)
    voice.say(Say("Wait"), 0.0)
    voice.tones("12#", 0.0)
    assert [Spoken("Wait")] == voice.advance(0.45)
    assert [Spoken("12#"), Speech(Party.AGENT, False)] == voice.advance(1.0)
    assert voice.digits == "12#"


def test_an_interrupt_tells_the_words_of_the_current_piece_and_drops_the_rest() -> None:
    voice = Voice(chars_per_sec=10, latency_secs=0)
    voice.say(Say("One done. Two words here"), 0.0)
    voice.say(Say("Never heard."), 0.0)
    assert [Spoken("One done.")] == voice.advance(1.0)
    assert [Spoken(" Two "), BargeIn("Two", 700), Speech(Party.AGENT, False)] == voice.interrupt(1.6)
    assert voice.advance(99.0) == []
    assert voice.spoken == "One done. Two "


def test_speech_that_must_not_be_interrupted_goes_on() -> None:
    voice = Voice(chars_per_sec=10, latency_secs=0)
    voice.say(Say("Legal text", interruptible=False), 0.0)
    assert voice.interrupt(0.5) == []
    assert [Spoken("Legal text"), Speech(Party.AGENT, False)] == voice.advance(1.01)


def test_a_preemptible_message_is_cut_by_the_next_turn_without_an_interrupt() -> None:
    voice = Voice(chars_per_sec=10, latency_secs=0)
    voice.say(Say("Please hold the", final=False, preemptible=True), 0.0)
    voice.say(Say(" line", preemptible=True), 0.0)
    assert [Spoken("Please")] == voice.say(Say("Found."), 0.6)
    assert [Spoken("Found."), Speech(Party.AGENT, False)] == voice.advance(3.0)


def test_a_clip_takes_its_time_and_nothing_confirms_it() -> None:
    voice = Voice(latency_secs=0, clip_secs=1)
    assert [Speech(Party.AGENT, True)] == voice.play(Play("https://example.com/a.mp3"), 0.0)
    assert voice.advance(0.5) == []
    assert [Speech(Party.AGENT, False)] == voice.advance(1.0)
    assert voice.clips == ["https://example.com/a.mp3"]


@settings(max_examples=150, deadline=None)
@given(tokens=st.lists(st.text(alphabet="ab .,!", max_size=60), max_size=12), step=st.integers(1, 3000))
def test_pieces_of_a_turn_add_up_to_its_text(tokens: list[str], step: int) -> None:
    voice, now, said = Voice(), 0.0, ""
    for index, token in enumerate(tokens):
        voice.say(Say(token, index == len(tokens) - 1), now)
    for _ in range(100_000):
        said += "".join(event.text for event in voice.advance(now) if isinstance(event, Spoken))
        if voice.next_event() is None:
            break
        now += step / 1000
    assert "".join(tokens) == said == voice.spoken
