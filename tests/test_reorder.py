"""Frames out of order: row F7 without a network."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import providers
from gateway.events import Audio, Checkpoint, Dtmf, Event, Gap, Outcome, Start, Stop, StopReason
from gateway.media import MULAW_8K
from gateway.provider import Numbered
from gateway.reorder import WINDOW, Reorder
from gateway.session import Session

KINDS = ["twilio_media_streams", "plivo_audio_streaming"]
FRAME_MS = 20


@st.composite
def shuffled(draw: st.DrawFn, most: int = 60) -> list[int]:
    """0 to n in an order in which none is overtaken by more than WINDOW others."""
    left, order = [*range(draw(st.integers(1, most)))], list[int]()
    overtaken = dict.fromkeys(left, 0)
    while left:
        ahead = draw(st.integers(0, min(WINDOW, len(left) - 1)))
        while any(overtaken[number] == WINDOW for number in left[:ahead]):
            ahead -= 1
        for number in left[:ahead]:
            overtaken[number] += 1
        order.append(left.pop(ahead))
    return order


# --- the window alone --------------------------------------------------------------------------------------------------------


@given(shuffled())
def test_whatever_is_overtaken_by_no_more_than_the_window_comes_in_order(order: list[int]) -> None:
    reorder = Reorder[int](0)
    assert [*range(len(order))] == [each for number in order for each in reorder.put(number, number)]
    assert not reorder.holds


@given(st.lists(st.integers(0, 30), max_size=60))
def test_nothing_is_lost_or_doubled_and_no_more_than_the_window_is_held(numbers: list[int]) -> None:
    reorder, out = Reorder[tuple[int, int]](0), list[tuple[int, int]]()
    came = [*enumerate(numbers)]
    for taken, each in enumerate(came, 1):
        out += reorder.put(each[1], each)
        assert taken - len(out) <= WINDOW
    out += reorder.give_up()
    assert sorted(came) == sorted(out)


# --- with its carrier's frames -----------------------------------------------------------------------------------------------


def say(number: int) -> bytes:
    return number.to_bytes(2, "big") * 80


class Stage:
    """A session and the frames of a carrier, to be sent in any order."""

    def __init__(self, kind: str, *, numbered_start: bool = True) -> None:
        provider = providers.load(kind)
        self.carrier = provider.carrier()
        codec = provider(provider.Config(auth="none")).codec()
        assert isinstance(codec, Numbered)
        self.told: list[Event] = []
        self.session = Session(codec, emit=self.told.append, note=lambda what, values: None)
        start = self.carrier.encode(Start("s", "c", media_format=MULAW_8K))
        self.receive(start if numbered_start else [str(frame).replace('"sequenceNumber"', '"was"') for frame in start])

    def receive(self, frames: object) -> None:
        for frame in frames:  # type: ignore[attr-defined]
            self.session.receive(frame, 0.0)

    def frame(self, number: int) -> str | bytes:
        (frame,) = self.carrier.encode(Audio(say(number), timestamp_ms=1000 + FRAME_MS * number))
        return frame

    @property
    def heard(self) -> list[int]:
        """Numbers of frames; a gap's milliseconds are negative."""
        return [
            int.from_bytes(each.payload[:2], "big") if isinstance(each, Audio) else -each.lost_ms
            for each in self.told
            if isinstance(each, Audio | Gap)
        ]


@pytest.mark.parametrize("kind", KINDS)
@given(order=shuffled(), twice=st.sets(st.integers(0, 59)))
def test_f7_any_order_within_the_window_is_heard_in_order_and_once(kind: str, order: list[int], twice: set[int]) -> None:
    stage = Stage(kind)
    frames = [stage.frame(number) for number in range(len(order))]
    for number in order:
        stage.receive([frames[number]])
    stage.session.end(StopReason.CALLER_HANGUP, 0.0)
    assert [*range(len(order))] == stage.heard
    assert 160 * len(order) == stage.session.received_bytes

    stage = Stage(kind)  # and once more, each of some at once again: that is no reason to overtake anybody
    frames = [stage.frame(number) for number in range(len(order))]
    for number in range(len(order)):
        stage.receive([frames[number]] * (2 if number in twice else 1))
    assert [*range(len(order))] == stage.heard
    assert 160 * len([number for number in twice if number < len(order)]) == stage.session.duplicate_bytes


@pytest.mark.parametrize("kind", KINDS)
@given(lost=st.sets(st.integers(1, 58)))
def test_f7_what_never_comes_is_told_as_a_gap_of_its_length(kind: str, lost: set[int]) -> None:
    stage = Stage(kind)
    for number in range(60):
        frame = stage.frame(number)
        if number not in lost:
            stage.receive([frame])
    stage.session.end(StopReason.CALLER_HANGUP, 0.0)
    expected, run = [], 0
    for number in range(60):
        if number in lost:
            run += FRAME_MS
        else:
            expected += [-run, number] if run else [number]
            run = 0
    assert expected == stage.heard


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_f7_order_and_loss_and_other_messages_together_lose_nothing_that_came_in_time(kind: str, seed: int) -> None:
    stage, random = Stage(kind), Random(seed)
    sent: list[tuple[float, int | None, str | bytes]] = []
    for number in range(500):
        sent.append((number, number, stage.frame(number)))
        if random.random() < 0.1:
            others: list[Event] = [Dtmf("5"), Checkpoint("x", Outcome.PLAYED)]
            sent += [(number + 0.5, None, frame) for frame in stage.carrier.encode(random.choice(others))]
    kept = [each for each in sent if each[1] in (0, 499) or random.random() > 0.02]
    kept.sort(key=lambda each: each[0] + (2.9 if random.random() < 0.05 else 0))
    for _, _, frame in kept:
        stage.receive([frame])
    stage.session.end(StopReason.CALLER_HANGUP, 0.0)
    numbers = [each for each in stage.heard if each >= 0]
    assert sorted({*numbers}) == numbers
    assert 500 * FRAME_MS == FRAME_MS * len(numbers) - sum(each for each in stage.heard if each < 0)
    late = {
        number
        for at, (when, number, _) in enumerate(kept)
        if number is not None and sum(other > when for other, _, _ in kept[:at]) > WINDOW
    }
    came = {number for _, number, _ in kept if number is not None}
    assert came - late <= {*numbers}, "overtaken by no more than the window"


@pytest.mark.parametrize("kind", KINDS)
def test_f7_a_hole_is_waited_for_three_frames_long_and_no_longer(kind: str) -> None:
    stage = Stage(kind)
    frames = [stage.frame(number) for number in range(10)]
    stage.receive(frames[:2])
    for frame in frames[3:6]:
        stage.receive([frame])
        assert [0, 1] == stage.heard
    stage.receive([frames[6]])
    assert [0, 1, -FRAME_MS, 3, 4, 5, 6] == stage.heard
    stage.receive([frames[2], frames[7]])
    assert [0, 1, -FRAME_MS, 3, 4, 5, 6, 7] == stage.heard
    assert 160 == stage.session.duplicate_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_f7_time_that_the_carrier_left_out_is_told_at_once(kind: str) -> None:
    """Its numbers go on: nothing is on its way."""
    stage = Stage(kind)
    stage.receive([stage.frame(0), stage.frame(1), stage.frame(3)])
    assert [0, 1, -FRAME_MS, 3] == stage.heard


@pytest.mark.parametrize("kind", KINDS)
def test_f7_a_hole_of_more_than_the_window_is_told_at_once(kind: str) -> None:
    stage = Stage(kind)
    frames = [stage.frame(number) for number in range(10)]
    stage.receive([frames[0], frames[1 + WINDOW + 1]])
    assert [0, -(WINDOW + 1) * FRAME_MS, WINDOW + 2] == stage.heard


@pytest.mark.parametrize("kind", KINDS)
def test_f7_what_is_held_is_heard_before_the_end_and_when_nothing_more_comes(kind: str) -> None:
    stage = Stage(kind)
    frames = [stage.frame(number) for number in range(10)]
    stage.receive([frames[0], frames[2]])
    assert [0] == stage.heard
    stage.session.settle()
    assert [0, -FRAME_MS, 2] == stage.heard
    stage.receive([frames[4]])
    stage.session.end(StopReason.CALLER_HANGUP, 0.0)
    assert [0, -FRAME_MS, 2, -FRAME_MS, 4] == stage.heard
    assert isinstance(stage.told[-1], Stop)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", ['"x"', "null", "1e300", "-7", "[]", '"9999999999999999999999"'])
def test_f7_numbers_that_are_none_leave_everything_as_it_comes(kind: str, number: str) -> None:
    stage = Stage(kind)
    frames = [str(stage.frame(each)).replace('"sequenceNumber":', f'"sequenceNumber":{number},"was":') for each in range(6)]
    stage.receive([frames[0], frames[3], frames[1], frames[4]])
    assert [0, -2 * FRAME_MS, 3, 4] == stage.heard


@pytest.mark.parametrize("kind", KINDS)
def test_f7_whoever_has_given_no_number_yet_has_left_none_out(kind: str) -> None:
    stage = Stage(kind, numbered_start=False)
    frames = [stage.frame(number) for number in range(4)]
    stage.receive(frames[1:])
    assert [1, 2, 3] == stage.heard


def key(stage: Stage) -> str:
    """A frame that is no audio, with the carrier's next number."""
    (frame,) = stage.carrier.encode(Dtmf("5"))
    return str(frame)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [False, True])
def test_f7_a_frame_that_is_no_audio_has_its_place_in_the_order(kind: str, broken: bool) -> None:
    stage = Stage(kind)
    frames = [stage.frame(0), stage.frame(1), key(stage), stage.frame(2)]
    if broken:
        frames[2] = str(frames[2]).replace('"digit":"5"', '"digit":[]')
    stage.receive([frames[0], frames[2], frames[3]])
    assert [0] == stage.heard
    assert (not broken) == (Dtmf("5") in stage.told), "what is no audio waits for none"
    stage.receive([frames[1]])
    assert [0, 1, 2] == stage.heard
    assert broken == bool(stage.session.bad)


@pytest.mark.parametrize("kind", KINDS)
def test_f7_a_frame_without_number_and_audio_ends_no_waiting_and_audio_without_number_does(kind: str) -> None:
    for numbered, expected in ((True, [0, 1, 2]), (False, [0, -FRAME_MS, 2, 3])):
        stage = Stage(kind)
        frames = [stage.frame(each) for each in range(4)]
        stage.receive([frames[0], frames[2], '{"event": "surprise"}'])
        assert [0] == stage.heard
        stage.receive([frames[1] if numbered else str(frames[3]).replace('"sequenceNumber"', '"was"')])
        assert expected == stage.heard


@pytest.mark.parametrize("kind", KINDS)
def test_f7_a_copy_that_has_a_number_of_its_own_leaves_no_hole(kind: str) -> None:
    stage = Stage(kind)
    stage.receive([stage.frame(0), stage.frame(0), stage.frame(2)])
    assert [0, -FRAME_MS, 2] == stage.heard
    assert 160 == stage.session.duplicate_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_f7_once_all_are_in_order_a_number_left_out_holds_nothing_up(kind: str) -> None:
    """Only together with time that is missing is it a frame of audio, and may come."""
    stage = Stage(kind)
    frames = [stage.frame(number) for number in range(3)]
    stage.receive([frames[0], frames[2], frames[1]])
    key(stage)
    stage.receive([stage.frame(3)])
    assert [0, 1, 2, 3] == stage.heard
