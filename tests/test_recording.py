"""What the caller heard, as a track, and both tracks of a call side by side: nothing is ever at another time than it was."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import groupby

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.audio.g711 import encode_mulaw
from gateway.ear import Ear
from gateway.events import Audio, Checkpoint, Clear, Dtmf, Event, Gap, Start, Stop, StopReason
from gateway.media import MULAW_8K, Encoding, MediaFormat, Track
from gateway.outbound import LARGEST_SILENCE_MS
from gateway.playout import Playout
from gateway.provider import Limits
from gateway.recording import HOLD_MS, Layout
from tests.playbook import Stage

AUDIO_KINDS = ("twilio_media_streams", "plivo_audio_streaming")
LOUD = b"\x00"  # as loud as mu-law gets
QUIET = b"\xff"


def listening(stage: Stage) -> Stage:
    """A stage whose stream is followed from its start, as with a listener on it."""
    emit = stage.session._emit

    def emitted(event: Event) -> None:
        if isinstance(event, Start):
            stage.session.follow_playout(stage.now)
        emit(event)

    stage.session._emit = emitted
    stage.start()
    return stage


def heard(events: Iterable[Event], sample_bytes: int = 1) -> bytes:
    """The outbound track."""
    parts = []
    for event in events:
        if isinstance(event, Audio) and event.track is Track.OUTBOUND:
            parts.append(event.payload)
        elif isinstance(event, Gap) and event.track is Track.OUTBOUND:
            parts.append(QUIET * 8 * event.lost_ms * sample_bytes)
    return b"".join(parts)


def recorded(events: Iterable[Event], start: Start | None = None) -> npt.NDArray[np.int16]:
    """The recording of these events: a column for each track."""
    layout = None
    out = []
    for event in events:
        if isinstance(event, Start):
            layout = Layout(start or event)
        elif layout is not None:
            layout.add(event)
            out += layout.frames()
    assert layout is not None
    layout.finish()
    out += layout.frames()
    return np.frombuffer(b"".join(out), "<i2").reshape(-1, 2)


# --- what the caller heard -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", AUDIO_KINDS)
def test_what_plays_stands_at_its_time_with_silence_around_it(kind: str) -> None:
    stage = listening(Stage(kind))
    stage.wait(500)
    stage.perform(Audio(LOUD * 8 * 300))
    stage.wait(1000)
    stage.perform(Audio(LOUD * 8 * 100))
    stage.wait(400)
    track = heard(stage.events)
    expected = QUIET * 4000 + LOUD * 2400 + QUIET * 5600 + LOUD * 800
    assert expected == track[: len(expected)]
    assert set(track[len(expected) :]) <= {0xFF}


@pytest.mark.parametrize("kind", AUDIO_KINDS)
def test_a_clear_cuts_it_where_the_ear_was_cut(kind: str) -> None:
    stage = listening(Stage(kind))
    stage.perform(Audio(LOUD * 8 * 5000))
    stage.wait(1234.5)
    stage.perform(Clear())
    stage.wait(700)
    stage.perform(Audio(LOUD * 160))
    stage.wait(100)
    (cut,) = [event for event in stage.events if isinstance(event, Clear)]
    assert cut.played_ms in (1234, 1235)
    track = heard(stage.events)
    assert track.startswith(LOUD * 9875)
    begin, cut_at, again = (track.index(*each) for each in ((LOUD,), (QUIET,), (LOUD, track.index(QUIET))))
    assert (begin, 9876, 9876 + 5600) == (begin, pytest.approx(cut_at, abs=1), pytest.approx(again, abs=1))
    assert stage.session.playout is not None
    assert track.count(LOUD) == stage.session.playout.totals(stage.now)[1], "to the sample, what the account says was played"


def test_the_track_never_runs_ahead_of_the_ear_and_keeps_up_with_it() -> None:
    stage = listening(Stage("twilio_media_streams"))
    began = stage.now
    for step in range(100):
        if step % 10 == 3:
            stage.perform(Audio(LOUD * 8 * 77))
        stage.wait(17)
        ms = len(heard(stage.events)) / 8
        assert (stage.now - began) * 1000 - 21 <= ms <= (stage.now - began) * 1000 + 0.13


def test_nobody_listens_and_nothing_is_told() -> None:
    stage = Stage("twilio_media_streams")
    stage.start()
    stage.perform(Audio(LOUD * 800))
    stage.wait(1000)
    assert not heard(stage.events)
    assert stage.session.next_due() is None, "no timer runs for it"


def test_a_process_that_slept_tells_a_gap() -> None:
    stage = listening(Stage("twilio_media_streams"))
    stage.now += 3 * LARGEST_SILENCE_MS / 1000
    stage.pump()
    assert [3 * LARGEST_SILENCE_MS] == [event.lost_ms for event in stage.events if isinstance(event, Gap)]


@pytest.mark.parametrize("kind", AUDIO_KINDS)
@pytest.mark.parametrize("before_ms", [0, 37, 1000])
def test_who_listens_from_mid_speech_on_hears_it_at_its_time(kind: str, before_ms: int) -> None:
    stage = Stage(kind)
    stage.start()
    stage.perform(Audio(LOUD * 8 * 3000))
    stage.wait(before_ms)
    playout = stage.session.playout
    assert playout is not None
    ahead_ms = playout.ahead_ms(stage.now)
    assert 0 < ahead_ms < 500
    stage.session.follow_playout(stage.now)
    stage.wait(700)
    stage.perform(Clear())
    stage.wait(300)
    track = heard(stage.events)
    # What the carrier had already is not ours to tell any more; from there to the cut.
    assert [ahead_ms, 700, 1000] == pytest.approx([track.index(LOUD) / 8, track.rindex(LOUD) / 8, len(track) / 8], abs=21)
    assert track.count(LOUD) / 8 == pytest.approx(700 - ahead_ms, abs=1)


@pytest.mark.parametrize("kind", AUDIO_KINDS)
def test_whatever_is_told_stands_behind_what_was_heard_up_to_then(kind: str) -> None:
    stage = listening(Stage(kind))
    stage.wait(13)
    stage.tell(chunk(13, at=0))
    stage.wait(9)
    stage.tell(Dtmf("5"))
    stage.wait(7)
    stage.session.end(StopReason.CARRIER_CLOSED, stage.now)
    told, ms = [], 0.0
    for event in stage.events:
        if isinstance(event, Audio) and event.track is Track.OUTBOUND:
            ms += len(event.payload) / 8
        else:
            told.append((type(event), pytest.approx(ms, abs=0.2)))
    assert told == [(Start, 0), (Audio, 13), (Dtmf, 22), (Stop, 29)]
    assert stage.session.next_due() is None


def test_while_nothing_happens_the_track_comes_in_chunks_of_20_ms() -> None:
    stage = listening(Stage("twilio_media_streams"))
    stage.wait(401)
    assert [20] * 20 == [round(len(event.payload) / 8) for event in stage.events if isinstance(event, Audio)]


@pytest.mark.parametrize("kind", AUDIO_KINDS)
def test_the_track_is_as_long_as_the_carrier_says_that_it_is(kind: str) -> None:
    """Its clock is fast, 100 ms come every 90. What is no audio or comes twice takes no time there, what is missing does."""
    stage = listening(Stage(kind))
    stage.wait(50)
    stage.tell(Dtmf("5"))
    stage.wait(40)
    for at in (0, 100, 200, 360, 460):
        for frame in [*stage.carrier.encode(chunk(100, at=at))] * (2 if at == 200 else 1):
            stage.session.receive(frame, stage.now)
        stage.wait(90)
    stage.session.tell_heard(stage.now)
    assert (800, 60) == (stage.session.duplicate_bytes, stage.session.gap_ms)
    assert pytest.approx(560 + 90, abs=0.2) == len(heard(stage.events)) / 8


def test_a_clock_that_is_put_right_breaks_no_speech_and_puts_what_begins_anew_at_its_time() -> None:
    playout = Playout(MULAW_8K, Limits(), capacity_ms=1000)
    now = 0.0
    playout.follow(now)
    outbound = playout.outbound
    assert outbound is not None
    events: list[Event] = []

    def say(samples: int) -> None:
        nonlocal now
        playout.push(LOUD * samples, now)
        assert Audio(LOUD * samples) == playout.next_frame(now)
        now += samples / 8000  # where the carrier has nothing to play any more

    playout.push(LOUD, now)
    playout.checkpoint("a")
    assert Audio(LOUD) == playout.next_frame(now)
    assert isinstance(playout.next_frame(now), Checkpoint)
    now += 1 / 8000
    say(160)
    events += outbound.take(1, now - 160 / 8000)
    say(160)
    outbound.sync(40, 0.03)  # the caller's timeline is 10 ms ahead of our clock
    events += outbound.take(playout.position(now), now)
    playout.clear(now)
    say(160)
    outbound.sync(80, 0.05)  # no, 30 ms
    events += outbound.take(playout.position(now), now)
    runs = [(byte, len([*run])) for byte, run in groupby(heard(events))]
    assert [0, 255, 0] == [byte for byte, _ in runs]
    assert [321, 240, 160] == pytest.approx([length for _, length in runs], abs=2)


@settings(max_examples=60, deadline=None)
@example([37, "mark"])
@given(st.lists(st.one_of(st.integers(1, 900), st.just("clear"), st.just("mark"), st.floats(0.1, 400)), max_size=30))
def test_any_conversation_is_heard_as_the_account_has_it(steps: list[int | float | str]) -> None:
    """What is told as heard is, to the byte, what the account says was played, whatever the service does when."""
    stage = listening(Stage("twilio_media_streams"))
    for step in steps:
        match step:
            case "clear":
                stage.perform(Clear())
            case "mark":
                stage.perform(Checkpoint("m"))
            case int():
                stage.perform(Audio(LOUD * 8 * step))
            case float():
                stage.wait(step)
        playout = stage.session.playout
        assert playout is not None
        stage.session.tell_heard(stage.now)
        _, played, _, _ = playout.totals(stage.now)
        assert played == heard(stage.events).count(LOUD)


# --- both tracks ---------------------------------------------------------------------------------------------------------

CONVERSE = Start("MZ1", "CA1", media_format=MULAW_8K, accepts=("audio", "clear"))
LISTEN = Start("MZ1", "CA1", media_format=MULAW_8K, tracks=(Track.INBOUND, Track.OUTBOUND))


def chunk(ms: int, track: Track = Track.INBOUND, at: int | None = None, loud: bool = True) -> Audio:
    return Audio((LOUD if loud else QUIET) * 8 * ms, track, at)


def edges(column: npt.NDArray[np.int16]) -> list[float]:
    """Milliseconds at which sound begins and ends."""
    return [float(at) / 8 for at in np.flatnonzero(np.diff((np.abs(column) > 1000).astype(int), prepend=0, append=0))]


def test_the_callers_first_chunk_ends_where_the_other_track_stands() -> None:
    both = recorded([CONVERSE, chunk(50, Track.OUTBOUND, 0), chunk(20), chunk(30, Track.OUTBOUND, 50)])
    assert ([30, 50], [0, 80]) == (edges(both[:, 0]), edges(both[:, 1]))


def test_a_gap_is_silence_of_its_length() -> None:
    both = recorded([CONVERSE, chunk(20), Gap(500), chunk(20), chunk(540, Track.OUTBOUND, loud=False)])
    assert [0, 20, 520, 540] == edges(both[:, 0])


def test_tracks_of_a_listening_stream_are_laid_out_by_their_timestamps() -> None:
    both = recorded([LISTEN, chunk(20, at=100), chunk(20, at=120), chunk(20, Track.OUTBOUND, 130), chunk(20, at=140)])
    assert ([0, 60], [30, 50]) == (edges(both[:, 0]), edges(both[:, 1]))


def test_a_track_that_stays_away_is_waited_for_and_then_set_off() -> None:
    events: list[Event] = [CONVERSE, chunk(20, Track.OUTBOUND, loud=False), chunk(20)]
    events += [chunk(1000, Track.OUTBOUND, loud=False)] * 40
    late = HOLD_MS + 5000
    events += [Gap(late), chunk(1000), chunk(4000)]
    both = recorded(events)
    assert [0, 20, 20 + late, 40_020] == edges(both[:, 0])
    assert 40_020 == len(both) / 8


def test_a_track_that_does_not_exist_is_silence_and_is_not_waited_for() -> None:
    layout = Layout(Start("MZ1", "CA1", media_format=MULAW_8K, tracks=(Track.INBOUND,)))
    layout.add(chunk(20, at=0))
    both = np.frombuffer(b"".join(layout.frames()), "<i2").reshape(-1, 2)
    assert 160 == len(both)
    assert not both[:, 1].any()


def test_a_timestamp_of_nonsense_does_not_fill_the_disk() -> None:
    layout = Layout(CONVERSE)
    layout.add(chunk(20))
    layout.add(Gap(10**12))
    layout.finish()
    assert sum(len(block) for block in layout.frames()) <= 3601 * 32_000


def test_wide_samples_are_kept_bit_exact() -> None:
    wide = MediaFormat(Encoding.PCM_S16LE, 16000)
    samples = np.arange(-320, 320, dtype="<i2")
    both = recorded([Start("s", "c", media_format=wide, accepts=("audio",)), Audio(samples.tobytes())])
    assert samples.tolist() == both[:, 0].tolist()


# --- an hour -------------------------------------------------------------------------------------------------------------

CLICK = encode_mulaw(np.full(160, 20_000, np.int16)).tobytes()


def worst_error_ms(hours: float, drift_ppm: float, *, seed: int = 7) -> tuple[float, float, float]:
    """A call in compressed time. Returns milliseconds: the worst misplacement of the caller's clicks, of what the caller
    heard against the caller's own audio, and how far the recording's length is off.

    The carrier has a clock of its own, its frames come late by a random way and in bursts after stalls, some are lost; its ear
    plays what we send by its own clock. A click is spoken, and one played, every few seconds.
    """
    rng = random.Random(seed)
    frame_ms = 100
    stage = listening(Stage("twilio_media_streams"))
    began = stage.now
    pace = 1 + drift_ppm / 1e6  # our seconds per carrier's second
    ear = Ear(MULAW_8K)
    heard_at: list[float] = []  # carrier's milliseconds
    said_at: list[float] = []
    stall_until = 0.0
    next_click, next_word = 5_000.0, 7_000.0
    total = int(hours * 3_600_000)
    position = 0

    def carry(until: float) -> None:
        """Our side's time passes; what leaves reaches the ear at once."""
        while (due := stage.session.next_due()) is not None and due < until:
            stage.now = max(stage.now, due)
            pump()
            if (again := stage.session.next_due()) is not None and again <= stage.now:
                break
        stage.now = until
        pump()

    def pump() -> None:
        while (frame := stage.session.next_frame(stage.now)) is not None:
            for command in stage.carrier.decode(frame):
                now = (stage.now - began) / pace
                if isinstance(command, Audio):
                    before = ear.buffered_ms(now)
                    ear.media(command.payload, now)
                    if CLICK in command.payload:
                        heard_at.append(now * 1000 + before + command.payload.index(CLICK) / 8)

    stage.pump = pump  # type: ignore[method-assign]
    while position < total:
        payload = bytearray(QUIET * 8 * frame_ms)
        if position >= next_click:
            payload[: len(CLICK)] = CLICK
            said_at.append(position)
            next_click += rng.uniform(3_000, 30_000)
        captured = (position + frame_ms) / 1000 * pace
        late = rng.expovariate(100)
        if rng.random() < 0.0005:
            stall_until = captured + rng.uniform(0.2, 8)
        arrives = max(began + captured + late, began + stall_until, stage.now)
        carry(arrives)
        if rng.random() < 0.001 and CLICK not in payload and position:
            pass  # this frame is lost; its successor's timestamp tells
        else:
            stage.tell(Audio(bytes(payload), Track.INBOUND, position))
        position += frame_ms
        if position >= next_word:
            stage.perform(Audio(CLICK + QUIET * 8 * rng.randrange(20, 3000)))
            next_word += rng.uniform(4_000, 40_000)
    carry(began + total / 1000 * pace)
    both = recorded(event for event in stage.events)
    left, right = (np.array(edges(both[:, side])[::2]) for side in (0, 1))
    assert (len(said_at), len(heard_at)) == (len(left), len(right))
    # Both were shifted alike by what came before the caller's first sample.
    shift = left[0] - said_at[0]
    said = np.abs(left - shift - np.array(said_at)).max()
    ear_error = np.abs(right - shift - np.array(heard_at)).max()
    return float(said), float(ear_error), abs(len(both) / 8 - shift - total)


@pytest.mark.parametrize("drift_ppm", [-200, 200])
def test_a_quarter_of_an_hour_is_aligned_within_a_frame(drift_ppm: float) -> None:
    said, ear, length = worst_error_ms(0.25, drift_ppm)
    assert said <= 1
    assert ear <= 20
    assert length <= 120, "the last frame is on its way"


@pytest.mark.long
@pytest.mark.parametrize("drift_ppm", [-200, -50, 0, 50, 200])
def test_an_hour_is_aligned_within_a_frame(drift_ppm: float) -> None:
    said, ear, length = worst_error_ms(1, drift_ppm)
    assert said <= 1
    assert ear <= 20
    assert length <= 120


if __name__ == "__main__":
    for ppm in (-200, -50, 0, 50, 200):
        print(ppm, "ppm, one hour:", *(f"{error:.2f} ms" for error in worst_error_ms(1, ppm)))
